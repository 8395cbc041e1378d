"""Damage every kind of file that is read back, and classify what the readers do.

    python -m tests.drills.damage [--flips 6] [--seed 0] [--only TEXT] [--json FILE]

A small run is trained first. Each file is truncated, emptied, bit-flipped, swapped with another of
its kind, overwritten, and replaced by a folder; then the reader that a command uses is called.

    named       an InputError or RunFailure of one line, or a warning, with the file's name
    recomputed  the result of the undamaged file, which was computed again or not needed
    harmless    the same result: nothing relevant was changed
    other input a well-formed file that was never read before: damage cannot be recognised
    silent      a different result without a message: must be 0
    traceback   any other error: must be 0

Exit 1 if one of the last two is not 0.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from tests.drills.damage_readers import all_kinds
from tests.drills.damage_run import Kind, adapter_run, small_run

OUTCOMES = ("named", "recomputed", "harmless", "other input", "silent", "traceback")


def mutations(kind: Kind, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Yield names of mutations with the file's new bytes, or None for a folder in its place."""
    data = kind.path.read_bytes()
    size = len(data)
    for share in (0.1, 0.5, 0.9):
        yield f"cut to {share:.0%}", data[: int(size * share)]
    yield "last byte removed", data[:-1]
    yield "emptied", b""
    for _ in range(flips):
        at, bit = rng.randrange(size), rng.randrange(8)
        yield f"bit {bit} of byte {at}", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
    start = rng.randrange(size)
    end = min(size, start + max(16, size // 8))
    yield f"zeros from byte {start}", data[:start] + b"\0" * (end - start) + data[end:]
    yield f"noise from byte {start}", data[:start] + rng.randbytes(end - start) + data[end:]
    yield "noise only", rng.randbytes(max(size, 64))
    yield "bytes appended", data + rng.randbytes(40)
    if kind.other.is_file() and kind.other.read_bytes() != data:
        yield f"swapped with {kind.other.name}", kind.other.read_bytes()
    yield "a folder", None


def drill(kinds: Sequence[Kind], roots: list[Path], flips: int, seed: int,
          report: Callable[[str], None]) -> dict[str, Counter[str]]:  # fmt: skip
    """Return outcomes by kind; `roots` are restored after each mutation, failures `report`ed."""
    table: dict[str, Counter[str]] = {}
    restore = restorer(roots)
    for number, kind in enumerate(kinds):
        expected, _ = outcome(kind)
        if isinstance(expected, Exception):
            raise RuntimeError(f"{kind.name}: cannot be read even undamaged") from expected
        restore()
        counted: Counter[str] = Counter()
        table[kind.name] = counted
        for mutation, content in mutations(kind, flips, random.Random(f"{seed} {number}")):
            kind.path.unlink()
            if content is None:
                kind.path.mkdir()
            else:
                kind.path.write_bytes(content)
            result, messages = outcome(kind)
            verdict = judge(kind, expected, result, messages)
            counted[verdict] += 1
            if verdict in ("silent", "traceback"):
                report(
                    f"{kind.name}, {mutation}: {verdict}: {str(result)[:300]!r} {messages[:300]!r}"
                )
            restore()
    return table


def outcome(kind: Kind) -> tuple[object, str]:
    """Return the reader's result or error, and the messages meanwhile."""
    messages = io.StringIO()
    handler = logging.StreamHandler(messages)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(io.StringIO()):
            return repr(kind.read()), messages.getvalue()
    except Exception as error:
        return error, messages.getvalue()
    finally:
        logging.getLogger().removeHandler(handler)


def judge(kind: Kind, expected: object, result: object, messages: str) -> str:
    """Return the name of the outcome, as the head of this file defines it."""
    if isinstance(result, InputError | RunFailure):
        if "\n" in str(result).strip():
            return "traceback"
        return "named" if is_named(kind, str(result)) else "silent"
    if isinstance(result, Exception):
        return "traceback"
    if result == expected:
        return "recomputed" if kind.derived else "harmless"
    if is_named(kind, messages):
        return "named"
    return "silent" if kind.known else "other input"


def is_named(kind: Kind, messages: str) -> bool:
    """Return whether messages name the file, or its folder."""
    return kind.path.name in messages or str(kind.path.parent) in messages


def restorer(roots: list[Path]) -> Callable[[], None]:
    """Return a function that restores all files below `roots` to their present state."""

    def state(path: Path) -> tuple[int, int, int]:
        facts = path.stat()
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    paths = [path for root in roots for path in root.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in paths}
    states = {path: state(path) for path in paths}

    def restore() -> None:
        for path in [p for root in roots for p in root.rglob("*")]:
            if path.is_dir() and path in contents:
                shutil.rmtree(path)
            elif path.is_file() and path not in contents:
                path.unlink()
        for path, data in contents.items():
            if not path.is_file() or state(path) != states[path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.write_bytes(data)
                states[path] = state(path)

    return restore


def as_markdown(table: dict[str, Counter[str]]) -> str:
    """Return the table with its sums in Markdown."""
    lines = [f"| kind | mutations | {' | '.join(OUTCOMES)} |", "|---" * 8 + "|"]
    total: Counter[str] = Counter()
    for name, counted in [*table.items(), ("all", total)]:
        cells = [str(counted[outcome] or "") for outcome in OUTCOMES[:4]]
        cells += [str(counted[outcome]) for outcome in OUTCOMES[4:]]
        lines.append(f"| {name} | {counted.total()} | {' | '.join(cells)} |")
        total.update(counted)
    return "\n".join(lines)


def main() -> None:
    """Print the table; exit 1 if damage was used silently or ended in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--flips", type=int, default=6, help="bit flips per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only kinds whose name has this text")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kinds, roots = prepare(Path(folder))
        chosen = [kind for kind in kinds if arguments.only in kind.name]
        table = drill(
            chosen, roots, arguments.flips, arguments.seed, lambda line: print(line, flush=True)
        )
    print(as_markdown(table))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    bad = sum(counted["silent"] + counted["traceback"] for counted in table.values())
    sys.exit(1 if bad else 0)


def prepare(folder: Path) -> tuple[list[Kind], list[Path]]:
    """Return the kinds, with all their files below `folder`, and the folders to restore."""
    runs, room = folder / "runs", folder / "room"
    room.mkdir()
    run = small_run(runs)
    adapter = adapter_run(runs, run)
    kinds = list(all_kinds(run, adapter, runs / "small.work", room))
    return kinds, [run, adapter, runs / "small.work", room]


if __name__ == "__main__":
    main()
