"""The command `selfcorrect`: exit 0 done, 1 failed while running, 2 the input is wrong."""

import sys
from typing import NoReturn

import typer

from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.errors import InputError, RunFailure, outside_cause
from selfcorrect.recipes.foundation.messages import log_to_stderr
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.scripts.commands import (
    data,
    evaluate,
    export,
    launch,
    plan,
    probe,
    push,
    recipes,
    report,
    run,
    score,
    show,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train RLHF checkpoints at chosen steps across model sizes, and measure moral "
    "self-correction at each of them.",
)
app.command("run")(run.run)
app.command("train")(run.train)
app.command("launch")(launch.launch)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)
app.command("plan")(plan.plan)
app.command("probe")(probe.probe)
app.command("show")(show.show)
app.command("export")(export.export)
app.command("push")(push.push)
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
        _stop("stopped by SIGTERM, state saved; run the same command to resume", 0)
    except InputError as error:
        _stop(str(error), 2)
    except RunFailure as error:
        _stop(str(error), 1)
    except NotADirectoryError as error:
        _stop(f"{error.filename}: part of this path is a file; name another folder", 2)
    except SystemExit as error:
        if error.code == 130:  # typer turns Ctrl-C into this
            _stop("stopped; run the same command to resume", 130)
        raise
    except Exception as error:  # a full disk, a folder that is not writable, a lost connection
        line = outside_cause(error)
        if line is None:
            raise
        _stop(line, 1)


def _stop(message: str, code: int) -> NoReturn:
    line = escape_controls(" ".join(message.split()))  # it may quote untrusted names and texts
    sys.stderr.write(f"selfcorrect: {line}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
