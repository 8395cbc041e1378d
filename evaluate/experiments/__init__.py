"""The experiments by name: each module loads its items and turns answers into metrics."""

from types import ModuleType

from selfcorrect.evaluate.experiments import bbq, law_school, winogender

EXPERIMENTS: dict[str, ModuleType] = {
    bbq.NAME: bbq,
    winogender.NAME: winogender,
    law_school.NAME: law_school,
}
