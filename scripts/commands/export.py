"""`selfcorrect export`: results in the formats of other tools."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError

if TYPE_CHECKING:
    from selfcorrect.evaluate.run_folder import CheckpointRecord

FORMATS = ("lm-eval", "model-card", "every-eval-ever", "dataset")


def export(
    source: Annotated[Path, typer.Argument(help="A run, or a folder of evaluation files.")],
    format: Annotated[str, typer.Option("--format", help=" or ".join(FORMATS) + ".")] = "lm-eval",
    out: Annotated[Path, typer.Option(help="Folder for the exported files.")] = Path("exported"),
    organization: Annotated[
        str, typer.Option(help="Who trained and measured the models (every-eval-ever).")
    ] = "unknown",
) -> None:
    """Write results in lm-eval's format, as model cards, for Every Eval Ever, or as a data set."""
    if format not in FORMATS:
        raise InputError(f"--format {format}: give {' or '.join(FORMATS)}")
    from selfcorrect.evaluate.export import write_lm_eval, write_model_card
    from selfcorrect.evaluate.publish.dataset import write_dataset
    from selfcorrect.evaluate.publish.every_eval_ever import write_every_eval_ever

    if format == "dataset":
        for path in write_dataset(source, out):
            typer.echo(path)
        return
    for folder, name, record in _models(source):
        if format == "every-eval-ever":
            for path in write_every_eval_ever(folder, name, record, organization, out):
                typer.echo(path)
            continue
        if format == "lm-eval":
            for path in write_lm_eval(folder, name, out):
                typer.echo(path)
        else:
            typer.echo(write_model_card(folder, name, out / name / "README.md"))


def _models(source: Path) -> "list[tuple[Path, str, CheckpointRecord | None]]":
    """Return each model's folder of evaluation files, name (safe as a file's) and record."""
    from selfcorrect.evaluate.run_folder import find_checkpoints

    if not (source / "recipe.yaml").is_file():
        if not any(source.glob("*.parquet")):
            raise InputError(
                f"{source}: not a run folder, nor a folder of evaluation files (*.parquet)"
            )
        # evaluations/<model>/<digest>: the parent folder has the model's name.
        return [(source, source.resolve().parent.name, None)]
    models: list[tuple[Path, str, CheckpointRecord | None]] = []
    for checkpoint in find_checkpoints(source):
        if any(checkpoint.evaluation.glob("*.parquet")):
            # The folders' names, unlike the record's, are valid file names already.
            model, seed, _, step = checkpoint.folder.parts[-4:]
            models.append((checkpoint.evaluation, f"{model}-{seed}-{step}", checkpoint.record))
    if not models:
        raise InputError(
            f"{source}: no checkpoint is measured; run `selfcorrect evaluate {source}`"
        )
    return models
