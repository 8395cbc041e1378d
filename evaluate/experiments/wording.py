"""Stimuli files: the paper's wording, this project's controls, and a user's own on top of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.prompts.stimuli import Section
from selfcorrect.recipes.foundation.atomic_files import read_text
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.yaml_text import parse_yaml

PAPER = Path(__file__).parents[1] / "prompts" / "paper.yaml"
CONTROLS = PAPER.with_name("controls.yaml")


@dataclass(frozen=True)
class Stimuli:
    """The stimuli of every experiment."""

    sections: Mapping[str, Section]

    def section(self, experiment: str) -> Section:
        """The section of an experiment by its name; raises InputError when there is none."""
        if experiment not in self.sections:
            known = ", ".join(self.sections)
            raise InputError(f"experiment {experiment!r}: unknown, choose from {known}")
        return self.sections[experiment]


def load_stimuli(own: Path | None = None, base: Path | None = None) -> Stimuli:
    """The stimuli of `base` (default: the paper's, with the controls), and `own` on top of them.

    An own file names what it adds or changes, experiment by experiment; its conditions, controls
    and texts join those of the base or replace the ones of the same name. Experiments which the
    base does not speak of bring their own wording.

    Raises InputError naming file and key.
    """
    data: dict[str, Any] = {
        name: experiment.default_wording
        for name, experiment in EXPERIMENTS.items()
        if experiment.default_wording is not None
    }
    paths = [PAPER, CONTROLS] if base is None else [base]
    for path in [*paths, *([] if own is None else [own])]:
        for name, section in _read(path, list(EXPERIMENTS)).items():
            if path == paths[0]:
                data[name] = section
            else:
                data[name] = _joined(data.get(name, {}), section)
    return Stimuli(
        {
            name: _section(experiment.wording, data[name], own or paths[-1], name)
            for name, experiment in EXPERIMENTS.items()
            if name in data
        }
    )


def _read(path: Path, experiments: list[str]) -> dict[str, dict[str, Any]]:
    data = parse_yaml(read_text(path), str(path))
    if not isinstance(data, dict) or not all(isinstance(part, dict) for part in data.values()):
        raise InputError(f"{path}: needs a section an experiment: {', '.join(experiments)}")
    for name in data:
        if name not in experiments:
            raise InputError(f"{path}: {name}: no such experiment; {', '.join(experiments)}")
    return data


def _joined(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` on top of `below`; what maps names in both (conditions, texts) is joined by name."""
    joined = {**below, **above}
    for key in ("texts", "conditions", "controls"):
        parts = [part[key] for part in (below, above) if key in part]
        if len(parts) == 2 and all(isinstance(part, dict) for part in parts):
            joined[key] = {**parts[0], **parts[1]}
    # A control that the upper file gives as a condition has become one.
    if isinstance(joined.get("controls"), dict) and isinstance(above.get("conditions"), dict):
        joined["controls"] = {
            name: control
            for name, control in joined["controls"].items()
            if name not in above["conditions"]
        }
    return joined


def _section(kind: type[Section], data: Mapping[str, Any], path: Path, name: str) -> Section:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (name, *first["loc"]))
        reason = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise InputError(f"{path}: {key}: {reason}") from None
