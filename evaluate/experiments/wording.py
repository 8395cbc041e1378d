"""Load stimuli files: the paper's wording, this project's own, and a user's file on top."""

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
TRANSLATIONS = PAPER.with_name("translations.yaml")


@dataclass(frozen=True)
class Stimuli:
    """The stimuli of every experiment."""

    sections: Mapping[str, Section]

    def section(self, experiment: str) -> Section:
        """Return the section of an experiment; raises InputError if there is none."""
        if experiment not in self.sections:
            known = ", ".join(self.sections)
            raise InputError(f"experiment {experiment!r}: unknown, choose from {known}")
        return self.sections[experiment]


def load_stimuli(own: Path | None = None, base: Path | None = None) -> Stimuli:
    """Return the stimuli of `base` (default: the paper's and this project's) with `own` on top.

    An own file holds additions and changes, by experiment; its conditions, controls and texts are
    added to those of the base or replace those of the same name. An experiment without a section
    in the base has its default wording, or the base's section of the experiment that it names as
    `wording_of`. Raises InputError naming file and key.
    """
    data: dict[str, Any] = {
        name: experiment.default_wording
        for name, experiment in EXPERIMENTS.items()
        if experiment.default_wording is not None
    }
    paths = [PAPER, CONTROLS, TRANSLATIONS] if base is None else [base]
    for path in paths:
        for name, section in _read_sections(path, list(EXPERIMENTS)).items():
            data[name] = section if path == paths[0] else _merge(data.get(name, {}), section)
    for name, experiment in EXPERIMENTS.items():
        if experiment.wording_of in data:
            data[name] = _merge(data[experiment.wording_of], data.get(name, {}))
    if own is not None:
        for name, section in _read_sections(own, list(EXPERIMENTS)).items():
            if isinstance(critiques := section.get("critiques"), str):
                section = {**section, "critiques": own.parent / critiques}
            data[name] = _merge(data.get(name, {}), section)
    return Stimuli(
        {
            name: _check_section(experiment.wording, data[name], own or paths[-1], name)
            for name, experiment in EXPERIMENTS.items()
            if name in data
        }
    )


def _read_sections(path: Path, experiments: list[str]) -> dict[str, dict[str, Any]]:
    data = parse_yaml(read_text(path), str(path))
    if not isinstance(data, dict) or not all(isinstance(part, dict) for part in data.values()):
        raise InputError(f"{path}: must have a section per experiment ({', '.join(experiments)})")
    for name in data:
        if name not in experiments:
            raise InputError(
                f"{path}: {name}: unknown experiment; choose from {', '.join(experiments)}"
            )
    return data


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a section on top of another; texts, conditions and controls are merged by name.

    So are the translations of each language.
    """
    merged = {**below, **above}
    for key in ("texts", "conditions", "controls", "translations"):
        parts = [part[key] for part in (below, above) if key in part]
        if len(parts) == 2 and all(isinstance(part, dict) for part in parts):
            merged[key] = {**parts[0], **parts[1]}
            if key == "translations":
                for language in set(parts[0]) & set(parts[1]):
                    texts = [part[language] for part in parts]
                    if all(isinstance(part, dict) for part in texts):
                        merged[key][language] = {**texts[0], **texts[1]}
    # A control that the upper file lists as a condition becomes a condition.
    if isinstance(merged.get("controls"), dict) and isinstance(above.get("conditions"), dict):
        merged["controls"] = {
            name: control
            for name, control in merged["controls"].items()
            if name not in above["conditions"]
        }
    return merged


def _check_section(
    wording: type[Section], data: Mapping[str, Any], path: Path, name: str
) -> Section:
    try:
        return wording.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (name, *first["loc"]))
        reason = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise InputError(f"{path}: {key}: {reason}") from None
