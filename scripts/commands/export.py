"""`selfcorrect export`: results in lm-eval's format, or as model-card metadata."""

from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError

FORMATS = ("lm-eval", "model-card")


def export(
    source: Annotated[Path, typer.Argument(help="A run, or a folder of evaluation files.")],
    format: Annotated[str, typer.Option("--format", help="lm-eval or model-card.")] = "lm-eval",
    out: Annotated[Path, typer.Option(help="Folder for the exported files.")] = Path("exported"),
) -> None:
    """Write results in lm-eval's format, or as model cards."""
    if format not in FORMATS:
        raise InputError(f"--format {format}: give {' or '.join(FORMATS)}")
    from selfcorrect.evaluate.export import write_lm_eval, write_model_card
    from selfcorrect.evaluate.results import summarise

    for folder, name in _models(source):
        frame = summarise(folder, name)
        if format == "lm-eval":
            for path in write_lm_eval(folder, frame, name, out):
                typer.echo(path)
        else:
            typer.echo(write_model_card(frame, name, out / name / "README.md"))


def _models(source: Path) -> list[tuple[Path, str]]:
    """Return the folder of evaluation files, and a name safe as a file name, of each model."""
    from selfcorrect.evaluate.run_folder import find_checkpoints

    if not (source / "recipe.yaml").is_file():
        if not any(source.glob("*.parquet")):
            raise InputError(
                f"{source}: not a run folder, nor a folder of evaluation files (*.parquet)"
            )
        # evaluations/<model>/<digest>: the parent folder has the model's name.
        return [(source, source.resolve().parent.name)]
    models = []
    for checkpoint in find_checkpoints(source):
        if any(checkpoint.evaluation.glob("*.parquet")):
            # The folders' names, unlike the record's, are valid file names already.
            model, seed, _, step = checkpoint.folder.parts[-4:]
            models.append((checkpoint.evaluation, f"{model}-{seed}-{step}"))
    if not models:
        raise InputError(
            f"{source}: no checkpoint is measured; run `selfcorrect evaluate {source}`"
        )
    return models
