"""The experiments by name."""

from selfcorrect.evaluate.experiments.base import Experiment
from selfcorrect.evaluate.experiments.bbq import BBQ
from selfcorrect.evaluate.experiments.crows_pairs import CROWS_PAIRS
from selfcorrect.evaluate.experiments.law_school import LAW_SCHOOL
from selfcorrect.evaluate.experiments.mbbq import MBBQ
from selfcorrect.evaluate.experiments.multiple_choice import MULTIPLE_CHOICE
from selfcorrect.evaluate.experiments.stereoset import STEREOSET
from selfcorrect.evaluate.experiments.winobias import WINOBIAS
from selfcorrect.evaluate.experiments.winogender import WINOGENDER
from selfcorrect.evaluate.experiments.winogenerated import WINOGENERATED
from selfcorrect.recipes.foundation.errors import InputError

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        BBQ,
        WINOGENDER,
        LAW_SCHOOL,
        CROWS_PAIRS,
        STEREOSET,
        WINOBIAS,
        WINOGENERATED,
        MBBQ,
        MULTIPLE_CHOICE,
    )
}


def get_experiment(name: str) -> Experiment:
    """Return the experiment of this name; raises InputError for an unknown one."""
    if name not in EXPERIMENTS:
        raise InputError(f"experiment {name!r}: unknown, choose from {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
