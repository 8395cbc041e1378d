"""From a YAML file and dotted overrides to a checked recipe; every error is one line."""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.foundation.checksums import UNSEALED, is_whole, sealed
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Recipe, rename_old_sections

SHIPPED = Path(__file__).parent
LARGEST_YAML = 1_000_000  # bytes, and also values, each counted as often as aliases repeat it
NOT_AS_SAVED = (
    "damaged or changed since it was saved; copy it here again, or delete its first line where you "
    "have changed it yourself"
)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number (YAML 1.2) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is one word, no list and no section", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 4:00:00 as a number to the base of 60; in 1.2, and for SLURM, it is a time.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in kinds if tag != "tag:yaml.org,2002:int"]
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML with the safe loader; InputError with the line where it goes wrong.

    An alias costs nothing to read and may stand for a billion values: what it stands for counts.
    """
    if len(text) > LARGEST_YAML:
        raise InputError(f"{source}: more than {LARGEST_YAML:,} characters of YAML, the limit")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > LARGEST_YAML:
            raise InputError(f"{source}: aliases that stand for too many values, or for themselves")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not YAML"
        raise InputError(f"{source}:{where} {reason}") from None


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Values below a node, aliases written out; infinite where one stands for itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # until all below it is counted
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]


def read_yaml(path: Path) -> str:
    """The text of a YAML file; InputError where it cannot be read or is beyond all measure."""
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise InputError(f"{path}: more than {LARGEST_YAML:,} bytes, the limit for YAML")
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def shipped_recipes() -> list[Path]:
    """The recipes that come with the package."""
    folders = (SHIPPED, SHIPPED / "study", SHIPPED / "ladders")
    return sorted((p for folder in folders for p in folder.glob("*.yaml")), key=lambda p: p.stem)


def recipe_path(name: str) -> Path:
    """A file, or the name of a shipped recipe, with or without .yaml."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in shipped_recipes()}
    name_alone = path.name.removesuffix(".yaml")
    if name_alone in shipped:  # recipes/quickstart.yaml works from any folder
        return shipped[name_alone]
    names = ", ".join(shipped)
    raise InputError(f"{name}: no such recipe file; shipped recipes: {names}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply dotted overrides such as `policy.steps=20`, and check all of it."""
    path = recipe_path(name)
    content = _read_recipe(path)
    for override in overrides:
        apply_override(content, override)
    return check_recipe(content, str(path))


def _read_recipe(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's content; where it is made `from` another, that one's with the changes in it."""
    text = read_yaml(path)
    if not is_whole(text.encode()):
        raise InputError(f"{path}: {NOT_AS_SAVED}")
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections (name, models, data, ...)")
    try:
        content = rename_old_sections(content)  # before it meets another recipe's sections
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if "from" not in content:
        return content
    parent = content.pop("from")
    if not isinstance(parent, str) or not parent:
        raise InputError(f"{path}: from: is the name of another recipe, for example quickstart")
    beside = path.parent / parent
    try:
        found = beside if beside.is_file() else recipe_path(parent)
    except InputError as error:
        raise InputError(f"{path}: from: {error}") from None
    children = (*children, path.resolve())
    if found.resolve() in children:
        raise InputError(f"{path}: from: {parent} is made from this one; name another")
    changed: dict[str, Any] = _changed(_read_recipe(found, children), content)
    return changed


def _changed(parent: Any, child: Any) -> Any:
    """Sections are merged key by key; lists and values take the place of the parent's."""
    if isinstance(parent, dict) and isinstance(child, dict):
        return {**parent, **{key: _changed(parent.get(key), new) for key, new in child.items()}}
    return child


def file_schema() -> dict[str, Any]:
    """The JSON schema of a recipe's file, whole or `from` another.

    Sections name no keys that must be there: they may stand in the other recipe.
    """
    schema = Recipe.model_json_schema()
    schema["properties"]["from"] = {
        "type": "string",
        "description": "another recipe, beside this one or shipped, that this one changes",
    }
    whole = {"required": schema.pop("required")}
    for section in schema["$defs"].values():
        section.pop("required", None)
    return {**schema, "anyOf": [{"required": ["from", "name"]}, whole]}


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one dotted key; list entries are named by their position, as in models.0.name=x."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override}: an override is key=value, for example policy.steps=20")
    value = parse_yaml(text, override) if text else None
    place: Any = content
    *parents, last = key.split(".")
    if parents and parents[0] == "ppo":
        parents[0] = "policy"  # the section's name since
    for part in parents:
        place = _enter(place, part, key)
    if isinstance(place, list):
        _enter(place, last, key)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise InputError(f"{key}: {parents[-1]} is a value, not a section")


def _enter(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        if not part.isdecimal() or int(part) >= len(place):
            raise InputError(f"{key}: {part} is not a position in a list of {len(place)}")
        return place[int(part)]
    if not isinstance(place, dict):
        raise InputError(f"{key}: nothing can stand below {part}")
    if place.get(part) is None:
        place[part] = {}
    return place[part]


def check_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Validate a parsed recipe; InputError names the first wrong key and counts the others."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    problem = problems[0]
    parts = [str(part) for part in problem["loc"] if part != "[key]"]
    key = ".".join(parts)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"unknown key{_suggestion(parts)}"
    elif problem["type"] == "missing":
        message = "is missing"
    else:
        given = problem.get("input")
        if isinstance(given, str | int | float | bool):
            message = f"{message} (got {str(given)[:80]!r})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {message}{more}" if key else f"{message}{more}"


def _suggestion(parts: list[str]) -> str:
    """The keys that could have been meant, from the schema along the path."""
    section: Any = Recipe
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


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, sealed in its first line."""
    write_text(path, sealed(f"# {UNSEALED}\n{recipe_text(recipe)}".encode()).decode())


def training_digest(recipe: Recipe, model: str, seed: int) -> str:
    """SHA-256 over everything that decides the weights of one model and seed."""
    parts = recipe.model_dump(mode="json", include={"data", "base", "reward", "policy"})
    for key in ("checkpoints", "resume_every", "resume_minutes"):
        del parts["policy"][key]  # what is kept changes no weight
    del parts["data"]["benchmarks"], parts["data"]["stimuli"]
    if (
        recipe.launch.starts_processes
    ):  # batches are per process; DeepSpeed clips and rounds its way
        parts["launch"] = [recipe.launch.processes, recipe.launch.deepspeed]
    parts["model"] = next(m for m in recipe.models if m.name == model).model_dump(mode="json")
    parts["seed"] = seed
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
