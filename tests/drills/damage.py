"""Damages every kind of file that is read back, and says what the readers make of it.

    python -m tests.drills.damage [--flips 6] [--seed 0] [--only TEXT] [--json FILE]

Trains a small run on the spot. Each file is cut short, emptied, bit-flipped, swapped with another
of its kind, overwritten, and made a folder; then the reader that a command calls is called.

    named       an InputError or RunFailure of one line, or a warning, with the file's name
    recomputed  the same result as of the undamaged file, which was made anew or done without
    harmless    the same result: nothing that counts was changed
    other input a file that was never read before, and is well-formed: nobody can know
    silent      another result, and no word: must be 0
    traceback   any other error: must be 0

Exit 1 where one of the last two is not 0.
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
from tests.drills.damage_readers import kinds
from tests.drills.damage_run import Kind, adapter_run, small_run

OUTCOMES = ("named", "recomputed", "harmless", "other input", "silent", "traceback")


def mutations(kind: Kind, flips: int, chance: random.Random) -> Iterator[tuple[str, object]]:
    """What is done to a file: a name, and the new bytes, or a function for what is no file."""
    data = kind.path.read_bytes()
    size = len(data)
    for share in (0.1, 0.5, 0.9):
        yield f"cut to {share:.0%}", data[: int(size * share)]
    yield "last byte gone", data[:-1]
    yield "emptied", b""
    for _ in range(flips):
        at, bit = chance.randrange(size), chance.randrange(8)
        yield f"bit {bit} of byte {at}", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
    start = chance.randrange(size)
    end = min(size, start + max(16, size // 8))
    yield f"zeros from byte {start}", data[:start] + b"\0" * (end - start) + data[end:]
    yield f"noise from byte {start}", data[:start] + chance.randbytes(end - start) + data[end:]
    yield "noise and no more", chance.randbytes(max(size, 64))
    yield "bytes behind the end", data + chance.randbytes(40)
    if kind.other.is_file() and kind.other.read_bytes() != data:
        yield f"swapped with {kind.other.name}", kind.other.read_bytes()
    yield "a folder", lambda path: path.mkdir()


def drill(every: Sequence[Kind], roots: list[Path], flips: int, seed: int,
          say: Callable[[str], None]) -> dict[str, Counter[str]]:  # fmt: skip
    """Outcomes by kind; `roots` are put back after each mutation. `say` hears of failures."""
    table: dict[str, Counter[str]] = {}
    restore = restorer(roots)
    for number, kind in enumerate(every):
        expected, _ = outcome(kind)
        if isinstance(expected, Exception):
            raise RuntimeError(f"{kind.name}: cannot be read before it is damaged") from expected
        restore()
        counted: Counter[str] = Counter()
        table[kind.name] = counted
        for what, content in mutations(kind, flips, random.Random(f"{seed} {number}")):
            kind.path.unlink()
            if isinstance(content, bytes):
                kind.path.write_bytes(content)
            else:
                kind.path.mkdir()
            found, said = outcome(kind)
            verdict = judge(kind, expected, found, said)
            counted[verdict] += 1
            if verdict in ("silent", "traceback"):
                say(f"{kind.name}, {what}: {verdict}: {str(found)[:300]!r} {said[:300]!r}")
            restore()
    return table


def outcome(kind: Kind) -> tuple[object, str]:
    """What the reader gives or raises, and what was said meanwhile."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(io.StringIO()):
            return repr(kind.read()), heard.getvalue()
    except Exception as error:
        return error, heard.getvalue()
    finally:
        logging.getLogger().removeHandler(handler)


def judge(kind: Kind, expected: object, found: object, said: str) -> str:
    """The name of the outcome; see the head of this file."""
    if isinstance(found, InputError | RunFailure):
        said = str(found)
        if "\n" in said.strip():
            return "traceback"
        return "named" if is_named(kind, said) else "silent"
    if isinstance(found, Exception):
        return "traceback"
    if found == expected:
        return "recomputed" if kind.derived else "harmless"
    if is_named(kind, said):
        return "named"
    return "silent" if kind.known else "other input"


def is_named(kind: Kind, said: str) -> bool:
    """Whether the words speak of the file, or of the folder that it is the heart of."""
    path = kind.path
    return path.name in said or str(path.parent) in said


def restorer(roots: list[Path]) -> Callable[[], None]:
    """What puts all files below `roots` back as they are now."""

    def state(path: Path) -> tuple[int, int, int]:
        facts = path.stat()
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    found = [p for root in roots for p in root.rglob("*") if p.is_file()]
    kept = {path: path.read_bytes() for path in found}
    states = {path: state(path) for path in found}

    def restore() -> None:
        for path in [p for root in roots for p in root.rglob("*")]:
            if path.is_dir() and path in kept:
                shutil.rmtree(path)
            elif path.is_file() and path not in kept:
                path.unlink()
        for path, data in kept.items():
            if not path.is_file() or state(path) != states[path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.write_bytes(data)
                states[path] = state(path)

    return restore


def as_markdown(table: dict[str, Counter[str]]) -> str:
    """The table, with its sums."""
    lines = [f"| kind | mutations | {' | '.join(OUTCOMES)} |", "|---" * 8 + "|"]
    total: Counter[str] = Counter()
    for name, counted in [*table.items(), ("all", total)]:
        cells = [str(counted[outcome] or "") for outcome in OUTCOMES[:4]]
        cells += [str(counted[outcome]) for outcome in OUTCOMES[4:]]
        lines.append(f"| {name} | {counted.total()} | {' | '.join(cells)} |")
        total.update(counted)
    return "\n".join(lines)


def main() -> None:
    """Print the table; exit 1 where something was used in silence or ended in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--flips", type=int, default=6, help="bit flips a kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name holds this text")
    parser.add_argument("--json", type=Path, help="write the counts there too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        every, roots = prepared(Path(folder))
        chosen = [kind for kind in every if asked.only in kind.name]
        table = drill(chosen, roots, asked.flips, asked.seed, lambda line: print(line, flush=True))
    print(as_markdown(table))
    if asked.json is not None:
        asked.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    bad = sum(counted["silent"] + counted["traceback"] for counted in table.values())
    sys.exit(1 if bad else 0)


def prepared(folder: Path) -> tuple[list[Kind], list[Path]]:
    """The kinds, with all their files below `folder`, and the folders to put back."""
    runs, room = folder / "runs", folder / "room"
    room.mkdir()
    run = small_run(runs)
    adapter = adapter_run(runs, run)
    every = list(kinds(run, adapter, runs / "small.work", room))
    return every, [run, adapter, runs / "small.work", room]


if __name__ == "__main__":
    main()
