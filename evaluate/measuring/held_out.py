"""Keep an evaluation apart from a run's own feedback: from its words, and from its groups."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.base import axes_of
from selfcorrect.evaluate.measuring.plan import PlannedCell
from selfcorrect.evaluate.prompts.stimuli import PLACEHOLDER
from selfcorrect.recipes.feedback import BenchmarkFeedback
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_measured
from selfcorrect.recipes.schema import Recipe

_SENTENCE_END = re.compile(r"[.!?:\n]+")
_logged: set[str] = set()
logger = logging.getLogger(__name__)


def check_wordings(feedback: BenchmarkFeedback, cells: Iterable[PlannedCell]) -> None:
    """Raise InputError if a condition asks with a sentence that the feedback says too.

    Sentences are compared by their words. Those of one word ("Answer:") say nothing.
    """
    said = {sentence: text for text in feedback.texts() for sentence in _sentences(text)}
    for cell in cells:
        for turn in cell.section.condition(cell.condition).dialogue:
            for sentence in _sentences(turn.text):
                if sentence in said:
                    raise InputError(
                        f"data.feedback: {said[sentence]!r} is a wording of {cell.name}; reword it "
                        "in data.feedback.wordings or in the stimuli, or do not ask that condition"
                    )


def _sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a template in lower case, without punctuation and placeholders."""
    for part in _SENTENCE_END.split(PLACEHOLDER.sub("\n", text)):
        words = re.findall(r"\w+", part.lower())
        if len(words) > 1:
            yield " ".join(words)


def notes(feedback: BenchmarkFeedback, experiments: Sequence[str]) -> list[str]:
    """Return sentences on what is not measured, and on what is although feedback spoke of it."""
    spoken = frozenset[str]().union(*map(axes_of, feedback.bbq))
    sentences = [
        f"Feedback was made of BBQ's {', '.join(feedback.bbq)}: no question of BBQ about the same "
        "groups is measured."
    ]
    for experiment in map(get_experiment, experiments):
        if shared := sorted(spoken & set(experiment.axes)):
            sentences.append(
                f"{experiment.title} is measured on groups that feedback spoke of "
                f"({', '.join(shared)}), in other questions."
            )
    return sentences


def warn_of_feedback(checkpoint: Path, experiments: Iterable[str]) -> None:
    """Log a warning if a checkpoint of a run is measured alone on what its feedback spoke of."""
    run = Path(*checkpoint.absolute().parts[:-4])  # below it: model, seed, method, checkpoint
    if not {"bbq", "mbbq"} & set(experiments) or not (run / "recipe.yaml").is_file():
        return
    with suppress(InputError):
        recipe = load_measured(str(run / "recipe.yaml"))
        if isinstance(recipe, Recipe) and recipe.data.feedback is not None:
            logger.warning(
                "%s: its feedback was made of BBQ's %s, which are measured here too; `selfcorrect "
                "evaluate %s` leaves them out",
                checkpoint, ", ".join(recipe.data.feedback.bbq), run,
            )  # fmt: skip


def log_notes(feedback: BenchmarkFeedback, experiments: Sequence[str]) -> None:
    """Log the notes, once a process."""
    for sentence in notes(feedback, experiments):
        if sentence not in _logged:
            _logged.add(sentence)
            logger.info("data.feedback: %s", sentence)
