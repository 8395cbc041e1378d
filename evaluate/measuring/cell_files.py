"""One parquet file a cell: a row per item, order and draw, and what was asked in its metadata."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from selfcorrect.evaluate.measuring.plan import PlannedCell, cell_file_name
from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.checksums import (
    CHECKSUM_PLACEHOLDER,
    file_has_valid_checksum,
    insert_file_checksum,
    without_checksum,
)
from selfcorrect.recipes.foundation.errors import InputError, RunFailure

METADATA_KEY = b"selfcorrect"  # of a file's schema; holds the settings as JSON
_COLUMNS = pa.schema(
    [
        ("item", pa.string()),
        ("cluster", pa.string()),
        ("category", pa.string()),
        ("weight", pa.float64()),
        ("order", pa.string()),
        ("options", pa.list_(pa.string())),
        ("logprobs", pa.list_(pa.float64())),
        ("probabilities", pa.list_(pa.float64())),
        ("mass", pa.float64()),
        ("draw", pa.int64()),
        ("samples", pa.list_(pa.string())),
        ("truncated", pa.bool_()),
    ]
)

Row = dict[str, Any]

_verified: set[tuple[str, int, int, int]] = set()
"""(path, mtime, size, inode) of the files whose checksum has been checked."""


@dataclass(frozen=True)
class Origin:
    """Whose answers they are: a digest of the weights, and the engine (each rounds differently)."""

    weights: str
    engine: str = "packed"


class CellWriter:
    """Takes a cell's rows slice by slice, so that memory does not grow with their number.

    `keep` puts them on disk as a part of their own, beside the cell's file. A later writer of the
    same cell and origin finds the parts: `num_items` says how many items they hold.
    """

    def __init__(self, path: Path, cell: PlannedCell, origin: Origin) -> None:
        metadata = {
            "checksum": CHECKSUM_PLACEHOLDER,
            "experiment": cell.experiment,
            "condition": cell.condition,
            "settings_digest": cell.settings_digest,
            "origin": asdict(origin),
            "num_items": len(cell.items),
            "left_out": cell.left_out,
        }
        facts = cell.loaded.fact_types
        if clash := set(facts) & set(_COLUMNS.names):
            raise ValueError(f"{cell.name}: facts named like columns: {sorted(clash)}")
        # One value of each type tells Arrow's type as well as all of them.
        samples = {
            name: [None if kind is type(None) else kind() for kind in kinds]
            for name, kinds in facts.items()
        }
        own = [pa.field(name, pa.array(values).type) for name, values in samples.items()]
        self.schema = pa.schema([*_COLUMNS, *own]).with_metadata(
            {METADATA_KEY: json.dumps(metadata).encode()}
        )
        self.path = path
        self._folder = path.with_name(f".{path.name}.parts")
        self._parts = self._found()
        self._held: list[pa.Table] = []
        self.num_items = self._parts[-1][1] if self._parts else 0

    def _found(self) -> list[tuple[int, int, Path]]:
        """The parts on disk, as (first item, end, file), as far as they are whole and ours."""
        found: list[tuple[int, int, Path]] = []
        for path in sorted(self._folder.glob("*.parquet")):
            first, _, last = path.stem.partition("-")
            expected = found[-1][1] if found else 0
            try:
                ours = file_has_valid_checksum(path) and _facts(pq.read_schema(path)) == _facts(
                    self.schema
                )
                if not ours or int(first) != expected or not int(last) > expected:
                    break
            except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
                break
            found.append((int(first), int(last), path))
        return found

    def go_back(self, num_items: int) -> None:
        """Forget the items from `num_items` on: other cells of the same slices have no more."""
        self._parts = [part for part in self._parts if part[1] <= num_items]
        self.num_items = self._parts[-1][1] if self._parts else 0

    def write(self, rows: Sequence[Row], num_items: int) -> None:
        """Add the rows of the next `num_items` items, in the order of the items."""
        columns = [
            pa.array([row.get(field.name) for row in rows], field.type) for field in self.schema
        ]
        self._held.append(pa.Table.from_arrays(columns, schema=self.schema))
        self.num_items += num_items

    def keep(self) -> None:
        """Put on disk what has been written since the last part."""
        if not self._held:
            return
        first = self._parts[-1][1] if self._parts else 0
        path = self._folder / f"{first:09d}-{self.num_items:09d}.parquet"
        with atomic_file(path) as temporary:
            with _table_writer(temporary, self.schema) as file:
                for table in self._held:
                    file.write_table(table)
            insert_file_checksum(temporary)
        self._parts.append((first, self.num_items, path))
        self._held = []

    def write_whole(self, path: Path) -> None:
        """Write all of the cell to `path`, of the parts and what is held: a row group a slice."""
        with _table_writer(path, self.schema) as file:
            for _, _, part in self._parts:
                try:
                    if not file_has_valid_checksum(part):
                        raise pa.ArrowInvalid("not as it was written")
                    rows = pq.ParquetFile(part, page_checksum_verification=True)
                    for group in range(rows.num_row_groups):
                        file.write_table(rows.read_row_group(group))
                except (pa.ArrowException, OSError):
                    part.unlink(missing_ok=True)
                    raise RunFailure(
                        f"{part}: damaged while the cell was measured; run the same command again"
                    ) from None
            for table in self._held:
                file.write_table(table)
        insert_file_checksum(path)

    def clear(self) -> None:
        """Remove the parts: the cell's file has them all."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _facts(schema: pa.Schema) -> dict[str, Any]:
    """Return a file's metadata without its checksum."""
    return without_checksum(json.loads(schema.metadata[METADATA_KEY]))


def _table_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


@contextmanager
def writing(
    paths: Sequence[Path], cells: Sequence[PlannedCell], origin: Origin
) -> Iterator[list[CellWriter]]:
    """Writers of cells that are measured together; each file appears whole or not at all.

    All go on after the same number of items. What was written stays for the next time, unless the
    data or the weights are at fault.
    """
    writers = [CellWriter(path, cell, origin) for path, cell in zip(paths, cells, strict=True)]
    while len({writer.num_items for writer in writers}) > 1:  # parts may end at other items
        common = min(writer.num_items for writer in writers)
        for writer in writers:
            writer.go_back(common)
    try:
        yield writers
    except (InputError, RunFailure):
        raise
    except BaseException:  # Ctrl-C too
        for writer in writers:
            writer.keep()
        raise
    with ExitStack() as files:  # all are written before the first takes its name
        for writer in writers:
            writer.write_whole(files.enter_context(atomic_file(writer.path)))
    for writer in writers:
        writer.clear()


def is_cell_measured(path: Path, cell: PlannedCell, origin: Origin | None = None) -> bool:
    """Whether `path` is an undamaged file of this very cell, and of `origin` if one is given."""
    if not path.is_file():
        return False
    try:
        _, metadata = read_cell(path)
    except InputError:
        return False
    theirs = metadata.get("origin")
    return metadata.get("settings_digest") == cell.settings_digest and (
        origin is None or theirs == asdict(origin)
    )


def read_settings(path: Path) -> dict[str, Any]:
    """Return the metadata of an evaluation file: experiment, condition, num_items, left_out, ...

    Raises InputError if the file is damaged, or if its name is that of another cell.
    """
    try:
        _verify_checksum(path)
        metadata = pq.read_schema(path).metadata or {}
        settings = without_checksum(json.loads(metadata[METADATA_KEY]))
        file_name = cell_file_name(settings["experiment"], settings["condition"])
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError):
        raise damaged_cell(path) from None
    if file_name != path.name:
        raise InputError(
            f"{path}: holds {settings['experiment']} {settings['condition']}; rename it to "
            f"{file_name}, or delete it and run `selfcorrect evaluate` again"
        )
    return settings


def _verify_checksum(path: Path) -> None:
    facts = path.stat()
    key = (str(path.resolve()), facts.st_mtime_ns, facts.st_size, facts.st_ino)
    if key not in _verified:
        if not file_has_valid_checksum(path):
            raise ValueError("checksum mismatch")
        _verified.add(key)


def read_table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Return those of `columns` that the file has (None: all); InputError if it is damaged."""
    try:
        present = set(pq.read_schema(path).names)
        wanted = None if columns is None else [name for name in columns if name in present]
        return pq.read_table(path, columns=wanted, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError):
        raise damaged_cell(path) from None


def damaged_cell(path: Path) -> InputError:
    """Return the error for a file that cannot be read as a cell."""
    return InputError(
        f"{path}: damaged, or not an evaluation file; "
        "delete it and run `selfcorrect evaluate` again"
    )


def read_cell(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of an evaluation file, and its metadata.

    Raises InputError if the file is missing, damaged, or not an evaluation file.
    """
    metadata = read_settings(path)
    return read_table(path, None).to_pandas(), metadata
