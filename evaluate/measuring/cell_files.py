"""Write and read a cell's parquet file: a row per item, order and draw; settings as metadata."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selfcorrect.evaluate.measuring.plan import PlannedCell, cell_file_name
from selfcorrect.evaluate.scoring.engine import DRAWS
from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.checksums import (
    CHECKSUM_PLACEHOLDER,
    file_has_valid_checksum,
    insert_file_checksum,
    without_checksum,
)
from selfcorrect.recipes.foundation.errors import InputError, RunFailure

METADATA_KEY = b"selfcorrect"  # of a file's schema; holds the settings as JSON
THINKING = "thinking"  # in the settings of a cell whose template has a block for thoughts
DATE = "chat_template_date"  # in the settings of a cell whose template asks for today's date
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
        ("prompt", pa.string()),
    ]
)

_GROUP_ROWS = 4096  # of a row group

# The condition that is not judged against a bias in files that do not say so themselves.
_UNJUDGED = "Match stats"

Row = dict[str, Any]

_verified: set[tuple[int, int, int, int]] = set()
"""(device, inode, mtime, size) of the files whose checksum has been checked."""


@dataclass(frozen=True)
class Origin:
    """The source of a cell's scores: a digest of the weights, and the engine (roundings differ).

    `tokenizer` is its `tokenizer_digest`; None where it is not known yet. `draws` is the version
    of the packed engine's random draws; None for a cell without any. `dtype` is the type in which
    weights were held; None where it is not known yet. `version` is that of another engine's
    library; None for the packed engine, and where the library is not installed.
    """

    weights: str
    engine: str = "packed"
    tokenizer: str | None = None
    draws: int | None = None
    dtype: str | None = None
    version: str | None = None

    def of(self, cell: PlannedCell) -> "Origin":
        """Return the origin of one cell."""
        is_drawn = cell.sampling is not None and cell.sampling.temperature > 0
        return replace(self, draws=DRAWS if is_drawn and self.engine == "packed" else None)

    def made(self, recorded: Any) -> bool:
        """Return whether a file with this origin in its settings is of this origin.

        Files of older versions do not say by which tokenizer they were made; they are float32.
        """
        if not isinstance(recorded, dict):
            return False
        of_old = "float32" if self.engine == "packed" else None
        known = {**asdict(self), "draws": None, "dtype": of_old, "version": None, **recorded}
        if self.version is None:
            known["version"] = None
        if None in (self.dtype, known["dtype"]):
            known["dtype"] = self.dtype
        if None in (self.tokenizer, known["tokenizer"]):
            known["tokenizer"] = self.tokenizer
        return known == asdict(self)


class CellWriter:
    """Write a cell's rows slice by slice, so that memory does not grow with their number.

    `flush` puts them on disk as a part beside the cell's file. A later writer of the same cell and
    origin continues after these parts, which hold `num_items` items.
    """

    def __init__(
        self, path: Path, cell: PlannedCell, origin: Origin, prompts: str | None = None
    ) -> None:
        metadata = {
            "checksum": CHECKSUM_PLACEHOLDER,
            "experiment": cell.experiment,
            "condition": cell.condition,
            "settings_digest": cell.settings_digest,
            "origin": asdict(origin.of(cell)),
            "num_items": len(cell.items),
            "left_out": cell.loaded.left_out,
            "judged": cell.section.condition(cell.condition).judged,
            "prompts": prompts,
        }
        if cell.style.arguments:
            metadata["chat_template_kwargs"] = dict(cell.style.arguments)
        if cell.style.date is not None:
            metadata[DATE] = cell.style.date
        if (continues := cell.section.continued(cell.condition)) is not None:
            metadata["continues"] = continues
        if cell.style.thinking is not None:
            metadata[THINKING] = asdict(cell.style.thinking)
            metadata["thoughts"] = cell.samples_thoughts
        facts = cell.loaded.fact_types
        if clash := set(facts) & set(_COLUMNS.names):
            raise ValueError(f"{cell.name}: facts named like columns: {sorted(clash)}")
        # Arrow infers the same type from one value of each Python type as from all values.
        samples = {
            name: [None if kind is type(None) else kind() for kind in kinds]
            for name, kinds in facts.items()
        }
        fact_fields = [pa.field(name, pa.array(values).type) for name, values in samples.items()]
        self.schema = pa.schema([*_COLUMNS, *fact_fields]).with_metadata(
            {METADATA_KEY: json.dumps(metadata).encode()}
        )
        self.path = path
        self._folder = path.with_name(f".{path.name}.parts")
        self._parts = self._usable_parts()
        self._pending: list[pa.Table] = []
        self.num_items = self._parts[-1][1] if self._parts else 0

    def _usable_parts(self) -> list[tuple[int, int, Path]]:
        """Return the parts on disk as (first item, end, file), up to the first unusable one.

        A part is usable if it is undamaged, of this cell and origin, and continues the one before.
        """
        parts: list[tuple[int, int, Path]] = []
        for path in sorted(self._folder.glob("*.parquet")):
            first, _, end = path.stem.partition("-")
            expected = parts[-1][1] if parts else 0
            try:
                is_usable = (
                    file_has_valid_checksum(path)
                    and _metadata(pq.read_schema(path)) == _metadata(self.schema)
                    and int(first) == expected < int(end)
                )
            except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
                break
            if not is_usable:
                break
            parts.append((int(first), int(end), path))
        return parts

    def rewind(self, num_items: int) -> None:
        """Drop the parts that go beyond `num_items` items."""
        self._parts = [part for part in self._parts if part[1] <= num_items]
        self.num_items = self._parts[-1][1] if self._parts else 0

    def write(self, rows: Sequence[Row], num_items: int) -> None:
        """Add the rows of the next `num_items` items, in the order of the items."""
        columns = [
            pa.array([row.get(field.name) for row in rows], field.type) for field in self.schema
        ]
        self._pending.append(pa.Table.from_arrays(columns, schema=self.schema))
        self.num_items += num_items

    def flush(self) -> None:
        """Write the pending rows to disk as a part."""
        if not self._pending:
            return
        first = self._parts[-1][1] if self._parts else 0
        path = self._folder / f"{first:09d}-{self.num_items:09d}.parquet"
        with atomic_file(path) as temporary:
            with table_writer(temporary, self.schema) as file:
                for table in self._pending:
                    file.write_table(table)
            insert_file_checksum(temporary)
        self._parts.append((first, self.num_items, path))
        self._pending = []

    def write_cell(self, path: Path) -> None:
        """Write the complete cell, parts and pending rows, to `path`.

        Its bytes do not depend on where the parts were cut.
        """
        with table_writer(path, self.schema) as file:
            for group in _row_groups(self._tables()):
                file.write_table(group)
        insert_file_checksum(path)

    def _tables(self) -> Iterator[pa.Table]:
        for _, _, part in self._parts:
            try:
                if not file_has_valid_checksum(part):
                    raise pa.ArrowInvalid("checksum mismatch")
                rows = pq.ParquetFile(part, page_checksum_verification=True)
                groups = [rows.read_row_group(group) for group in range(rows.num_row_groups)]
            except (pa.ArrowException, OSError):
                part.unlink(missing_ok=True)
                raise RunFailure(
                    f"{part}: damaged while the cell was measured; run the same command again"
                ) from None
            yield from groups
        yield from self._pending

    def clear(self) -> None:
        """Remove the parts, once the cell's file is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of all tables in contiguous tables of `_GROUP_ROWS`; the last may be shorter.

    Yields nothing if there are no rows.
    """
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= _GROUP_ROWS:
            rows = pa.concat_tables(waiting)
            yield rows.slice(0, _GROUP_ROWS).combine_chunks()
            waiting = [rows.slice(_GROUP_ROWS)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting).combine_chunks()


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    """Return a file's metadata without its checksum."""
    return without_checksum(json.loads(schema.metadata[METADATA_KEY]))


def table_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer of compressed parquet files with page checksums."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


@contextmanager
def cell_writers(
    paths: Sequence[Path],
    cells: Sequence[PlannedCell],
    origin: Origin,
    prompts: Mapping[str, str],
) -> Iterator[list[CellWriter]]:
    """Yield writers of cells that are measured together; a file appears complete or not at all.

    `prompts` names each cell's table of prompts (prompt_files.py), by the cell's name.
    All continue after the same number of items. If the block is interrupted, its rows are kept for
    the next call; after an InputError or RunFailure (data or weights are at fault) they are not.
    """
    writers = [
        CellWriter(path, cell, origin, prompts[cell.name])
        for path, cell in zip(paths, cells, strict=True)
    ]
    while len({writer.num_items for writer in writers}) > 1:  # parts may end at other items
        common = min(writer.num_items for writer in writers)
        for writer in writers:
            writer.rewind(common)
    try:
        yield writers
    except (InputError, RunFailure):
        raise
    except BaseException:  # Ctrl-C too
        for writer in writers:
            writer.flush()
        raise
    with ExitStack() as files:  # all files are written before the first gets its name
        for writer in writers:
            writer.write_cell(files.enter_context(atomic_file(writer.path)))
    for writer in writers:
        writer.clear()


def is_cell_measured(path: Path, cell: PlannedCell, origin: Origin | None = None) -> bool:
    """Return whether `path` is an undamaged file of this cell (and of `origin`, if given)."""
    if not path.is_file():
        return False
    try:
        _, metadata = read_cell(path)
    except InputError:
        return False
    return (
        metadata.get("settings_digest") == cell.settings_digest
        and metadata.get(DATE) in (None, cell.style.date)
        and (cell.style.thinking is None or metadata.get(THINKING) == asdict(cell.style.thinking))
        and metadata["judged"] == cell.section.condition(cell.condition).judged
        and (origin is None or origin.of(cell).made(metadata.get("origin")))
    )


def recorded_date(out: Path) -> str | None:
    """Return the latest date that a model's chat template got in an evaluation below `out`.

    `out` holds <model>/<digest>/, so that models measured on different days get the same date.
    """
    dates = set[str]()
    for path in [*out.glob("*/*/*.parquet"), *out.glob("*/*/probe/*.parquet")]:
        with suppress(pa.ArrowException, OSError, KeyError, ValueError, TypeError):
            dates.add(_metadata(pq.read_schema(path))[DATE])
    return max(dates, default=None)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the metadata of an evaluation file: experiment, condition, num_items, left_out, ...

    Raises InputError if the file is damaged, or if its name is that of another cell.
    """
    return read_footer(path)[0]


def read_footer(path: Path) -> tuple[dict[str, Any], pq.FileMetaData]:
    """Return `read_settings`, and what spares `read_table` from parsing the file's footer again."""
    try:
        _verify_checksum(path)
        with pq.ParquetFile(path) as file:
            schema, footer = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_cell(path, error) from None
    return _settings(path, schema), footer


def _settings(path: Path, schema: pa.Schema) -> dict[str, Any]:
    try:
        settings = _metadata(schema)
        settings.setdefault("judged", settings["condition"] != _UNJUDGED)
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
    key = (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size)
    if key not in _verified:
        if not file_has_valid_checksum(path):
            raise ValueError("checksum mismatch")
        _verified.add(key)


def read_table(
    path: Path,
    columns: Sequence[str] | None,
    leave_out: Sequence[str] = (),
    footer: pq.FileMetaData | None = None,
) -> pa.Table:
    """Return those of `columns` that the file has (None: all); InputError if it is damaged."""
    try:
        with pq.ParquetFile(path, metadata=footer, page_checksum_verification=True) as file:
            present = [name for name in file.schema_arrow.names if name not in leave_out]
            wanted = present if columns is None else [name for name in columns if name in present]
            # For most cells, threads cost more than they save.
            return file.read(wanted, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_cell(path, error) from None


def read_items(path: Path, items: Sequence[str]) -> list[Row]:
    """Return the rows of some items; memory does not grow with the other rows."""
    wanted, found = pa.array(items, pa.string()), []
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(2048):
                found += batch.filter(pc.is_in(batch["item"], value_set=wanted)).to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise damaged_cell(path, error) from None
    return found


def damaged_cell(path: Path, error: Exception | None = None) -> InputError:
    """Return the error for a file that cannot be read as a cell, because of `error`."""
    # Arrow's own complaints about a file's content have no number.
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(f"{path}: cannot be read ({error.strerror or error})")
    return InputError(
        f"{path}: damaged, or not an evaluation file; "
        "delete it and run `selfcorrect evaluate` again"
    )


def read_cell(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of an evaluation file, and its metadata; InputError as `read_cell_table`."""
    table, metadata = read_cell_table(path)
    return table.to_pandas(), metadata


def read_cell_table(path: Path, leave_out: Sequence[str] = ()) -> tuple[pa.Table, dict[str, Any]]:
    """Return the rows of an evaluation file without some columns, and its metadata.

    Raises InputError if the file is missing, damaged, or not an evaluation file.
    """
    try:
        _verify_checksum(path)
    except (OSError, ValueError) as error:
        raise damaged_cell(path, error) from None
    table = read_table(path, None, leave_out)
    return table, _settings(path, table.schema)
