"""The command `selfcorrect`: exit 0 done, 1 failed while running, 2 the input is wrong."""

import sys

import typer

from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.errors import InputError, RunFailure, machine_fault
from selfcorrect.recipes.foundation.messages import log_to_stderr
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.scripts.commands import (
    data,
    evaluate,
    export,
    launch,
    plan,
    probe,
    recipes,
    report,
    run,
    score,
    train,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="RLHF checkpoints at chosen steps across model sizes, and self-correction at each.",
)
app.command("run")(run.run)
app.command("train")(train.train)
app.command("launch")(launch.launch)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)
app.command("plan")(plan.plan)
app.command("probe")(probe.probe)
app.command("export")(export.export)
app.add_typer(score.app, name="score")
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Run the command; a user's mistake is one line on stderr, never a traceback."""
    log_to_stderr()
    signals.listen()
    try:
        app()
    except signals.Terminated:
        _stop("ended as asked (SIGTERM); the same command goes on from here", 0)
    except InputError as error:
        _stop(str(error), 2)
    except RunFailure as error:
        _stop(str(error), 1)
    except SystemExit as ended:
        if ended.code == 130:  # Ctrl-C, which typer turns into this
            _stop("stopped; the same command goes on from here", 130)
        raise
    except Exception as error:  # a full disk, a folder that may not be written to, no memory
        said = machine_fault(error)
        if said is None and not isinstance(error, OSError):
            raise
        where = getattr(error, "filename", None) or ("the machine" if said else "file system")
        _stop(f"{where}: {said or getattr(error, 'strerror', None) or error}", 1)


def _stop(message: str, code: int) -> None:
    line = escape_controls(" ".join(message.split()))  # names and texts in it may be a stranger's
    sys.stderr.write(f"selfcorrect: {line}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
