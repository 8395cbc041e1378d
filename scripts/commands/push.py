"""`selfcorrect push`: results, or one checkpoint with its card, to the Hugging Face hub."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError


def push(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub, NAME or OWNER/NAME.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Push this checkpoint (MODEL/SEED/STEP) as a model, not the results."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Create a public repository; else it is private.")
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="Address of another hub [default: huggingface.co].")
    ] = None,
) -> None:
    """Upload the run's results as a data set, or one checkpoint as a model, with a card.

    Nothing is ever uploaded without this command.
    """
    from selfcorrect.evaluate.export import write_model_card
    from selfcorrect.evaluate.publish.dataset import write_dataset
    from selfcorrect.evaluate.publish.hub import push_folder
    from selfcorrect.evaluate.run_folder import check_saved, find_checkpoints

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "upload"
        if checkpoint is None:
            write_dataset(run, folder)
            kind = "dataset"
        else:
            found = [each for each in find_checkpoints(run) if str(each.key) == checkpoint]
            if not found:
                raise InputError(
                    f"--checkpoint {checkpoint}: not a checkpoint of {run}; give MODEL/SEED/STEP"
                )
            if found[0].record.source is not None:
                raise InputError(
                    f"--checkpoint {checkpoint}: was trained elsewhere; push the results without it"
                )
            check_saved(found[0].folder)
            shutil.copytree(
                found[0].folder, folder, ignore=shutil.ignore_patterns("evaluation", "probe", ".*")
            )
            if any(found[0].evaluation.glob("*.parquet")):
                write_model_card(found[0].evaluation, checkpoint, folder / "README.md")
            kind = "model"
        typer.echo(push_folder(folder, repo, kind=kind, private=not public, endpoint=endpoint))
