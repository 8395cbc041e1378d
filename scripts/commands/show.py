"""`selfcorrect show`: what an item was asked, token by token, and every checkpoint's answer."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls

_SUGGESTIONS = 3  # items named when the one that was asked for does not exist


def show(
    source: Annotated[Path, typer.Argument(help="A run, or a folder of evaluation files.")],
    item: Annotated[str, typer.Argument(help="An item, as in the column `item`.")],
    experiment: Annotated[str | None, typer.Option(help="Only this experiment.")] = None,
    condition: Annotated[str | None, typer.Option(help="Only this condition.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer [default: the checkpoint's].")
    ] = None,
) -> None:
    """Print an item's exact prompt, its tokens, and its options' log-probabilities everywhere."""
    groups: dict[tuple[str, str, str], list[_Answer]] = {}
    known: list[str] = []
    for name, path in cell_files(source):
        for answer in _answers(name, path, item, experiment, condition, known):
            groups.setdefault(answer.key, []).append(answer)
    if not groups:
        selection = " ".join(part for part in (experiment, condition) if part)
        some = ", ".join(known[:_SUGGESTIONS]) or "nothing"
        raise InputError(
            f"{source}: no item {escape_controls(item)!r}{selection and ' under ' + selection}; "
            f"there is, for example, {escape_controls(some)}"
        )
    for answers in groups.values():
        for line in _lines(answers, tokenizer):
            typer.echo(escape_controls(line))


def cell_files(source: Path) -> Iterator[tuple[str, Path]]:
    """Yield the evaluation files of a run or of a folder, each with its checkpoint's name."""
    from selfcorrect.evaluate.run_folder import find_checkpoints

    if (source / "recipe.yaml").is_file():
        for checkpoint in find_checkpoints(source):
            for path in sorted(checkpoint.evaluation.glob("*.parquet")):
                yield str(checkpoint.key), path
        return
    paths = sorted(source.glob("*.parquet"))
    if not paths:
        raise InputError(
            f"{source}: not a run folder, nor a folder of evaluation files (*.parquet)"
        )
    for path in paths:
        yield source.resolve().parent.name, path


class _Answer:
    """One row of an evaluation file: an item in one order under one condition."""

    def __init__(
        self, name: str, path: Path, settings: dict[str, Any], row: dict[str, Any]
    ) -> None:
        self.name, self.path, self.row = name, path, row
        self.key = settings["experiment"], settings["condition"], row["order"]


def _answers(
    name: str,
    path: Path,
    item: str,
    experiment: str | None,
    condition: str | None,
    known: list[str],
) -> Iterator[_Answer]:
    from pyarrow import compute as pc

    from selfcorrect.evaluate.measuring.cell_files import read_settings, read_table

    settings = read_settings(path)
    if experiment not in (None, settings["experiment"]):
        return
    if condition not in (None, settings["condition"]):
        return
    names = read_table(path, ["item"])["item"]
    if not pc.any(pc.equal(names, item)).as_py():
        known.extend(names.slice(0, _SUGGESTIONS).to_pylist())
        return
    table = read_table(path, None)
    for row in table.filter(pc.equal(table["item"], item)).to_pylist():
        yield _Answer(name, path, settings, row)


def _load_tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(
            f"{source}: no tokenizer here ({reason}); name one by --tokenizer"
        ) from None


def _model_folder(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's model, which may have been trained elsewhere."""
    from selfcorrect.evaluate.measuring.sources import local_model
    from selfcorrect.evaluate.run_folder import read_checkpoint

    with suppress(InputError, FileNotFoundError):
        source = read_checkpoint(checkpoint).record.source
        if source is not None and not source.on_hub:
            return local_model(source)
    return checkpoint


def _lines(answers: Sequence[_Answer], tokenizer: Path | None) -> Iterator[str]:
    """Yield the lines on one item in one order under one condition."""
    from selfcorrect.evaluate.measuring.prompt_files import read_prompts

    first = answers[0]
    experiment, condition, order = first.key
    item, options = first.row["item"], first.row["options"]
    yield f"=== {experiment}, {condition}, item {item}, order {order}"
    prompt = read_prompts(first.path, item).get((item, order))
    if prompt is None:
        yield "Prompt: not recorded (measured by an earlier version)"
    else:
        yield "Prompt:"
        yield prompt
        try:
            loaded = _load_tokenizer(tokenizer or _model_folder(first.path.parents[1]))
            yield from _token_lines(prompt, None if first.row["samples"] else options, loaded)
        except InputError as error:
            yield f"Tokens: not shown ({error})"
    yield "Log-probabilities of the options:"
    for answer in answers:
        row = answer.row
        scores = "  ".join(
            f"{option!r} {logprob:.6f}"
            for option, logprob in zip(row["options"], row["logprobs"], strict=True)
        )
        draw = f" draw {row['draw']}" if row.get("samples") else ""
        yield f"  {answer.name}{draw}: {scores}  (mass {row['mass']:.4f})"
        if row.get("prompt") is not None:
            yield "  after the prompt:"
            yield row["prompt"]
    yield ""


def _token_lines(prompt: str, options: Sequence[str] | None, tokenizer: Any) -> Iterator[str]:
    """Yield the tokens of a prompt, and of the options that were scored right after it."""
    from selfcorrect.evaluate.prompts.tokenized import continuations, token_ids

    def shown(ids: Sequence[int]) -> str:
        return " | ".join(f"{number} {tokenizer.decode([number])!r}" for number in ids)

    if options is None:
        given = token_ids(tokenizer, [prompt])[0]
        yield f"Tokens ({len(given)}): {shown(given)}"
        return
    scored = continuations(tokenizer, [(prompt, tuple(options))])[0]
    start = scored[0].start
    yield f"Tokens ({start}): {shown(scored[0].tokens[:start])}"
    for option, continuation in zip(options, scored, strict=True):
        yield f"Option {option!r}: {shown(continuation.tokens[start:])}"
