"""Read YAML 1.2 safely: no code, no repeated keys, no alias that stands for a billion values."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from selfcorrect.recipes.foundation.atomic_files import read_text
from selfcorrect.recipes.foundation.errors import InputError

LARGEST_YAML = 1_000_000  # bytes, and also values, each counted as often as aliases repeat it


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number (YAML 1.2) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a word, not a list or a section"
            elif key.value in seen:
                problem = f"duplicate key {key.value!r}"
            if problem is not None:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
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


def read_yaml(path: Path) -> str:
    """Return the text of a YAML file; InputError if it is too large or cannot be read."""
    if path.is_file() and path.stat().st_size > LARGEST_YAML:
        raise InputError(f"{path}: larger than {LARGEST_YAML:,} bytes, the limit for YAML")
    return read_text(path)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document; InputError names `source` and the line.

    Aliases count as the values they stand for, since a short text may stand for a billion of them.
    """
    if len(text) > LARGEST_YAML:
        raise InputError(f"{source}: more than {LARGEST_YAML:,} characters, the limit for YAML")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > LARGEST_YAML:
            raise InputError(f"{source}: aliases expand to too many values, or to themselves")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not YAML"
        raise InputError(f"{source}:{where} {reason}") from None


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the values below a node, aliases expanded; infinite if an alias contains itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # until everything below it is counted
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]
