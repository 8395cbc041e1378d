"""Load a recipe from YAML and dotted overrides, check it, and save it; errors are one line."""

import difflib
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.foundation.checksums import (
    CHECKSUM_PLACEHOLDER,
    has_valid_checksum,
    insert_checksum,
)
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.yaml_text import parse_yaml, read_yaml
from selfcorrect.recipes.schema import Precision, Recipe, rename_old_sections
from selfcorrect.recipes.series import Measured, Series

SHIPPED = Path(__file__).parent
TEMPLATE_KEYS = ("chat_template_kwargs", "chat_template_date")  # of a recipe, for all its stages

logger = logging.getLogger(__name__)

_changed_texts: set[tuple[Path, str]] = set()  # (path, text) of the warnings logged so far


def shipped_recipes() -> list[Path]:
    """Return the recipes that come with the package, sorted by name."""
    folders = (SHIPPED, SHIPPED / "study", SHIPPED / "ladders")
    paths = [path for folder in folders for path in folder.glob("*.yaml")]
    return sorted((path for path in paths if not _is_series(path)), key=lambda path: path.stem)


def shipped_series() -> list[Path]:
    """Return the series of published checkpoints that come with the package, sorted by name."""
    study = [path for path in (SHIPPED / "study").glob("*.yaml") if _is_series(path)]
    return sorted([*(SHIPPED / "published").glob("*.yaml"), *study], key=lambda path: path.stem)


def _is_series(path: Path) -> bool:
    lines = path.read_text(encoding="utf-8").splitlines()
    return any(line.startswith("checkpoints:") for line in lines)


def recipe_path(name: str) -> Path:
    """Return the path of a recipe file, or of a shipped recipe or series by name (.yaml optional).

    Raises InputError, which lists the shipped ones, if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {path.stem: path for path in [*shipped_recipes(), *shipped_series()]}
    stem = path.name.removesuffix(".yaml")
    if stem in shipped:  # recipes/quickstart.yaml works from any folder
        return shipped[stem]
    raise InputError(f"{name}: no such recipe file; shipped recipes: {', '.join(shipped)}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply dotted overrides such as `policy.steps=20`, and validate the result."""
    recipe = load_measured(name, overrides)
    if isinstance(recipe, Series):
        raise InputError(
            f"{name}: a series of checkpoints, with nothing to train: selfcorrect evaluate {name}"
        )
    return recipe


def load_measured(name: str, overrides: Sequence[str] = ()) -> Measured:
    """Read a recipe or a series as `load_recipe` does."""
    path = recipe_path(name)
    content = _read_recipe(path)
    for override in overrides:
        apply_override(content, override)
    if "checkpoints" in content:
        return check_series(content, str(path))
    return check_recipe(content, str(path))


def read_recipe_text(path: Path) -> str:
    """Return the text of a recipe file; warn once if it has changed since it was saved.

    Users may edit a run's recipe.yaml, so a checksum that does not match is not an error.
    """
    text = read_yaml(path)
    if not has_valid_checksum(text.encode()) and (path, text) not in _changed_texts:
        _changed_texts.add((path, text))
        logger.warning(
            "%s: edited or damaged since it was saved (checksum mismatch); used as it is", path
        )
    return text


def _read_recipe(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe's content, merged into that of the recipe named by `from`, if any.

    `children` are the files that led here through `from`.
    """
    content = parse_yaml(read_recipe_text(path), str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a recipe; write a mapping of sections (name, models, ...)")
    try:
        content = rename_old_sections(content)  # before the parent's sections are merged in
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if "from" not in content:
        return content
    parent = content.pop("from")
    if not isinstance(parent, str) or not parent:
        raise InputError(f"{path}: from: give the name of another recipe, for example quickstart")
    beside = path.parent / parent
    try:
        parent_path = beside if beside.is_file() else recipe_path(parent)
    except InputError as error:
        raise InputError(f"{path}: from: {error}") from None
    children = (*children, path.resolve())
    if parent_path.resolve() in children:
        raise InputError(f"{path}: from: {parent} is itself made from this recipe; name another")
    merged: dict[str, Any] = _merge(_read_recipe(parent_path, children), content)
    return merged


def _merge(parent: Any, child: Any) -> Any:
    """Merge sections key by key; the child's lists and values replace the parent's."""
    if isinstance(parent, dict) and isinstance(child, dict):
        return {**parent, **{key: _merge(parent.get(key), value) for key, value in child.items()}}
    return child


def file_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, complete or made `from` another.

    No key of a section is required, since the other recipe may hold it.
    """
    schema = Recipe.model_json_schema()
    schema["properties"]["from"] = {
        "type": "string",
        "description": "another recipe, in the same folder or shipped, that this one changes",
    }
    complete = {"required": schema.pop("required")}
    for section in schema["$defs"].values():
        section.pop("required", None)
    return {**schema, "anyOf": [{"required": ["from", "name"]}, complete]}


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one dotted key; list entries go by position, as in models.0.name=x."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override}: not an override; write key=value, as in policy.steps=20")
    value = parse_yaml(text, override) if text else None
    section: Any = content
    *parents, last = key.split(".")
    if parents and parents[0] == "ppo":
        parents[0] = "policy"  # the section was called ppo in earlier versions
    for part in parents:
        section = _child(section, part, key)
    if isinstance(section, list):
        _child(section, last, key)
        section[int(last)] = value
    elif isinstance(section, dict):
        section[last] = value
    else:
        raise InputError(f"{key}: {parents[-1]} is a value, not a section")


def _child(section: Any, part: str, key: str) -> Any:
    if isinstance(section, list):
        if not part.isdecimal() or int(part) >= len(section):
            raise InputError(f"{key}: {part} is not a position in a list of {len(section)}")
        return section[int(part)]
    if not isinstance(section, dict):
        raise InputError(f"{key}: {part} would lie in a value, not in a section")
    if section.get(part) is None:
        section[part] = {}
    return section[part]


def check_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Validate a parsed recipe; InputError names the first wrong key and counts the others."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(error, Recipe)}") from None


def check_series(content: dict[str, Any], source: str) -> Series:
    """Validate a parsed series as `check_recipe` does a recipe."""
    try:
        return Series.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(error, Series)}") from None


def _first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    problems = error.errors()
    problem = problems[0]
    parts = [str(part) for part in problem["loc"] if part != "[key]"]
    key = ".".join(parts)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"unknown key{_suggestion(parts, kind)}"
    elif problem["type"] == "missing":
        message = "is missing"
    else:
        given = problem.get("input")
        if isinstance(given, str | int | float | bool):
            message = f"{message} (got {str(given)[:80]!r})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {message}{more}" if key else f"{message}{more}"


def _suggestion(parts: list[str], kind: type[BaseModel]) -> str:
    """Return the closest known key of the section, or all of them, as the end of a message."""
    section: Any = kind
    for part in parts[:-1]:
        field = section.model_fields.get(part)
        if field is None:
            continue  # a position in a list, or a name in a mapping
        section = next(iter(_models_in(field.annotation)), None)
        if section is None:
            return ""
    keys = list(section.model_fields)
    close = difflib.get_close_matches(parts[-1], keys, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(keys)}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


def recipe_text(recipe: Measured) -> str:
    """Return the resolved recipe, or series, as YAML."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def save_recipe(recipe: Measured, path: Path) -> None:
    """Write the resolved recipe, with a checksum in its first line."""
    text = f"# {CHECKSUM_PLACEHOLDER}\n{recipe_text(recipe)}"
    write_text(path, insert_checksum(text.encode()).decode())


def training_digest(recipe: Recipe, model: str, seed: int) -> str:
    """Return the SHA-256 of everything that decides the weights of one model and seed."""
    parts = recipe.model_dump(mode="json", include={"data", "base", "reward", "policy"})
    for key in ("checkpoints", "resume_every", "resume_minutes"):
        del parts["policy"][key]  # which states are kept changes no weight
    del parts["data"]["benchmarks"], parts["data"]["stimuli"]
    if recipe.data.feedback is None:  # older runs have no such keys
        del parts["data"]["feedback"]
    if recipe.reward.functions == {"model": 1.0}:
        del parts["reward"]["functions"]
    if recipe.launch.starts_processes:  # batches are per process; DeepSpeed rounds differently
        parts["launch"] = [recipe.launch.processes, recipe.launch.deepspeed]
    parts["model"] = next(m for m in recipe.models if m.name == model).model_dump(mode="json")
    parts["seed"] = seed
    if recipe.precision != Precision():  # older runs have no such section
        parts["precision"] = recipe.precision.model_dump(mode="json")
    template = recipe.model_dump(mode="json", include=set(TEMPLATE_KEYS))
    parts |= {key: value for key, value in template.items() if value}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
