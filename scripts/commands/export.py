"""`selfcorrect export`: results in lm-eval's files, or as model-card metadata."""

from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError

FORMATS = ("lm-eval", "model-card")


def export(
    source: Annotated[Path, typer.Argument(help="A run, or a folder of evaluation files.")],
    format: Annotated[str, typer.Option("--format", help="lm-eval or model-card.")] = "lm-eval",
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("exported"),
) -> None:
    """Write what was measured of each checkpoint, or of one model, in another tool's format."""
    if format not in FORMATS:
        raise InputError(f"--format {format}: give {' or '.join(FORMATS)}")
    from selfcorrect.evaluate.export import write_lm_eval
    from selfcorrect.evaluate.model_card import write_model_card
    from selfcorrect.evaluate.results import summarise

    for folder, name in _models(source):
        frame = summarise(folder, name)
        frame = frame[frame["order"] == "all"]
        if format == "lm-eval":
            for path in write_lm_eval(folder, frame, name, out):
                typer.echo(path)
        else:
            typer.echo(write_model_card(frame, name, out / name / "README.md"))


def _models(source: Path) -> list[tuple[Path, str]]:
    """(folder of evaluation files, name safe as a file's) of each model in `source`."""
    from selfcorrect.evaluate.run_folder import find_checkpoints

    if not (source / "recipe.yaml").is_file():
        if not any(source.glob("*.parquet")):
            raise InputError(
                f"{source}: neither a run nor a folder of evaluation files (*.parquet)"
            )
        # evaluations/<model>/<digest>: the model's name is the parent's.
        return [(source, source.resolve().parent.name)]
    found = []
    for checkpoint in find_checkpoints(source):
        if any(checkpoint.evaluation.glob("*.parquet")):
            # The folders' names, not the record's: they are names of files already.
            model, seed, _, step = checkpoint.folder.parts[-4:]
            found.append((checkpoint.evaluation, f"{model}-{seed}-{step}"))
    if not found:
        raise InputError(f"{source}: nothing evaluated; run `selfcorrect evaluate {source}`")
    return found
