"""results.parquet and statistics.json on disk, with checksums that are verified on reading."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_json

from selfcorrect.evaluate.measuring.cell_files import METADATA_KEY
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.checksums import (
    CHECKSUM_PLACEHOLDER,
    file_has_valid_checksum,
    insert_file_checksum,
    read_record,
)
from selfcorrect.recipes.foundation.errors import InputError

# Columns of the tidy table, in order: (pandas type, meaning). Undefined is null, never 0.
COLUMNS: dict[str, tuple[str, str]] = {
    "run": ("str", "name of the run's folder"),
    "model": ("str", "the model's name in the recipe"),
    "parameters": ("Int64", "number of parameters of the model"),
    "seed": ("Int64", "training seed"),
    "step": ("Int64", "PPO updates (rollout batches) behind the checkpoint; a series has its own"),
    "episodes": ("Int64", "completions sampled in training up to the checkpoint"),
    "kl": ("float64", "mean sequence KL to the initial policy, nats, last rollout batch"),
    "reward": ("float64", "mean reward-model score of the last rollout batch"),
    "experiment": ("str", "name of an experiment, such as bbq"),
    "condition": ("str", "name of the condition, such as Q+IF"),
    "category": ("str", "a category of the benchmark, or 'overall'"),
    "order": ("str", "order of the options, such as '120'; 'all' for all orders together"),
    "metric": (
        "str",
        "see `metrics` of the experiment's class; over rounds, see QUANTITIES of rounds.py",
    ),
    "value": ("float64", "the metric over all items of the cell"),
    "low": ("float64", "lower end of the 95 % interval"),
    "high": ("float64", "upper end of the 95 % interval"),
    "num_items": (
        "Int64",
        "items behind the value; one asked in several orders or draws counts once",
    ),
    "num_clusters": ("Int64", "clusters (templates, occupations, students) behind the value"),
}


def write_table(path: Path, frame: pd.DataFrame, facts: Mapping[str, Any]) -> None:
    """Write a table as a parquet file with a checksum and with `facts` in its metadata."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    metadata = {METADATA_KEY: json.dumps({"checksum": CHECKSUM_PLACEHOLDER, **facts}).encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
        insert_file_checksum(temporary)


def read_results(path: Path) -> pd.DataFrame:
    """Load results.parquet; raises InputError if damaged or made from other checkpoints."""
    try:
        if not file_has_valid_checksum(path):
            raise ValueError("checksum mismatch")
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
        made_from = facts.get("made_from")
        frame = table.to_pandas()[list(COLUMNS)]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: damaged, or not a results table; {_remedy(path)}") from None
    _check_made_from(path, made_from)
    return frame


def read_statistics(path: Path) -> dict[str, Any]:
    """Load statistics.json; raises InputError if damaged or made from other checkpoints."""
    try:
        statistics = read_record(path, _remedy(path))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run `selfcorrect report {path.parent}` first") from None
    _check_made_from(path, statistics.pop("made_from", None))
    return statistics


def write_statistics(path: Path, statistics: Mapping[str, Any]) -> None:
    """Write statistics.json with a checksum, a row of each list per line.

    Raises ValueError for NaN and infinity.
    """
    with atomic_file(path) as temporary:
        with temporary.open("wb") as file:
            separator = b"{\n"
            for key, value in {"checksum": CHECKSUM_PLACEHOLDER, **statistics}.items():
                file.write(b"%b  %b: " % (separator, _encode(key)))
                if isinstance(value, list) and value:
                    file.write(b"[\n    " + _encode(value[0]))
                    file.writelines(b",\n    " + _encode(row) for row in value[1:])
                    file.write(b"\n  ]")
                else:
                    file.write(_encode(value))
                separator = b",\n"
            file.write(b"\n}\n")
        insert_file_checksum(temporary)


def _encode(value: Any) -> bytes:
    """Return the value as JSON, several times faster than Python's encoder: there are millions."""
    text = to_json(value)
    if b"NaN" in text or b"Infinity" in text:  # part of a name, or a number that JSON does not have
        return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return text


def _remedy(path: Path) -> str:
    return f"delete it and run `selfcorrect report {path.parent}` again"


def _check_made_from(path: Path, digest: str | None) -> None:
    if digest is not None and digest != checkpoints_digest(path.parent):
        raise InputError(f"{path}: was made from other checkpoints; {_remedy(path)}")


def checkpoints_digest(run: Path) -> str:
    """Return the SHA-256 over the records of a run's checkpoints, from which results are made."""
    digest = hashlib.sha256()
    for checkpoint in find_checkpoints(run):
        # Without defaults: facts that later versions add leave older results valid.
        digest.update(checkpoint.record.model_dump_json(exclude_defaults=True).encode())
    return digest.hexdigest()
