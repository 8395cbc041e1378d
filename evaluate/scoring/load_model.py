"""Loading a causal LM and its tokenizer for evaluation: from a folder, the hub, PEFT, or GGUF."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.run_folder import check_saved
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import visible
from selfcorrect.recipes.foundation.ranks import best_device

ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def load_model(
    path: str | Path,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str | None = None,
) -> tuple[Any, Any]:
    """Load (model, tokenizer), in eval mode on `device` (default: CUDA, then MPS, then CPU).

    `path` is a Hugging Face folder, a hub id, a PEFT adapter folder, or a .gguf file. Weights are
    read from safetensors or GGUF, never from pickles. The base of an adapter is the one that its
    adapter_config.json names; when that path has moved, its name is looked for beside the adapter.

    With `trust_remote_code`, Python code that comes with the model is run; that is said on stderr.

    Raises InputError, in one line, for everything that cannot be loaded.
    """
    given = Path(path).expanduser()
    if trust_remote_code:
        say_trust(path)
    if given.suffix == ".gguf" and given.is_file():
        path, gguf_file = given.parent, given.name
    source = _source(str(path))
    check_saved(Path(source))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    adapter = Path(source) / ADAPTER
    if adapter.is_file():
        base = base_of(adapter)
        check_saved(Path(base))
        model = _load_weights(base, dtype, {"trust_remote_code": trust_remote_code})
        model = _load_adapter(model, source)
        tokenizer = _load_tokenizer(source, base, {"trust_remote_code": trust_remote_code})
    else:
        if gguf_file is not None:
            options["gguf_file"] = gguf_file
        elif Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise InputError(f"{path}: no config.json here, so this is not a model folder")
        model = _load_weights(source, dtype, options)
        tokenizer = _load_tokenizer(source, source, options)
    _check_vocabulary(source, model, tokenizer)
    return model.to(device or best_device()).eval(), tokenizer


def say_trust(path: str | Path) -> None:
    """Tell the user whose code is about to run."""
    sys.stderr.write(f"{visible(path)}: trust_remote_code is on: code that comes with it is run\n")


@contextmanager
def no_pickles(source: str | Path) -> Iterator[None]:
    """Inside, nothing can unpickle: InputError where a library would, with the remedy.

    Libraries fall back to pickles where a folder has no safetensors, or where an index names them.
    """
    import torch

    refuse_pickles(source)

    def refuse(*_: Any, **__: Any) -> None:
        raise _pickled(source)

    before = torch.load
    torch.load = refuse
    try:
        yield
    finally:
        torch.load = before


def refuse_pickles(folder: str | Path) -> None:
    """InputError where a folder's weights are pickles alone, or its index leads out of it."""
    folder = Path(folder)
    if not any(folder.glob("*.safetensors")):
        if any(path.suffix in PICKLES for path in folder.glob("*model*")):
            raise _pickled(folder)
        return
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # none, or one that the loader says is damaged
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise InputError(f"{index}: names {str(name)[:80]!r}, which is no file of this folder")


def _pickled(source: str | Path) -> InputError:
    return InputError(
        f"{source}: its weights are pickles, which can run code and are never loaded; where you "
        "trust their source, convert them to safetensors (load them with the library that wrote "
        "them, then save_pretrained)"
    )


def _source(path: str) -> str:
    """`path` as transformers takes it; a folder that is not there never becomes a hub lookup."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise InputError(f"{path}: a file; give a model folder, a .gguf file or a hub id")
    parts = path.split("/")
    looks_local = (
        path.startswith((".", "/", "~"))
        or "\\" in path
        or len(parts) > 2
        or "" in parts
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )
    if looks_local:
        raise InputError(f"{path}: no such model folder")
    return path


def base_of(adapter: Path) -> str:
    """Where the base of an adapter_config.json is: as named, or beside the adapter."""
    try:
        named = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{adapter}: names no base model (base_model_name_or_path)") from None
    if not named:
        raise InputError(f"{adapter}: base_model_name_or_path is empty; put the base's path there")
    folder = adapter.parent.resolve()
    around = [folder / named, *(parent / Path(named).name for parent in folder.parents[:3])]
    for candidate in (Path(named).expanduser(), *around):
        if (candidate / "config.json").is_file():
            return str(candidate)
    try:
        return _source(named)
    except InputError:
        raise InputError(
            f"{adapter}: the base model {named} is neither there nor beside the adapter; "
            "set base_model_name_or_path to its folder"
        ) from None


def _load_weights(source: str, dtype: str, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    # A GGUF file is read by its own loader, which takes no notice of safetensors.
    safe = {} if "gguf_file" in options else {"use_safetensors": True}
    with _InputErrors(source, "model"), no_pickles(source):
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **safe, **options)


def _load_adapter(model: Any, source: str) -> Any:
    from peft import PeftModel

    if not (Path(source) / "adapter_model.safetensors").is_file():
        raise InputError(f"{source}: no adapter_model.safetensors; save the adapter as safetensors")
    with _InputErrors(source, "adapter"), no_pickles(source):
        return PeftModel.from_pretrained(model, source, is_trainable=False)


def _load_tokenizer(source: str, otherwise: str, options: dict[str, Any]) -> Any:
    """The tokenizer of `source`, or of `otherwise` when `source` is a folder without one."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and "gguf_file" not in options:
        source = otherwise
    with _InputErrors(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, **options)


def _check_vocabulary(source: str, model: Any, tokenizer: Any) -> None:
    embeddings = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= embeddings > 0:
        raise InputError(
            f"{source}: the tokenizer knows {largest + 1} tokens but the model only {embeddings}; "
            "they do not belong together"
        )


class _InputErrors:
    """Turns what the libraries raise for a user's mistake into one line with a remedy."""

    def __init__(self, source: str, what: str) -> None:
        self.source = source
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # The libraries underneath raise whatever comes, tokenizers a plain Exception, or a panic.
        panicked = type(error).__name__ == "PanicException"
        if not (isinstance(error, Exception) or panicked):
            return
        if isinstance(error, RuntimeError) and "out of memory" in str(error):
            return
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "give a model folder, or a hub id (with network, or the model in the local cache)"
        if Path(self.source).is_dir():
            remedy = "it needs config.json, *.safetensors and the tokenizer's files"
        if "custom code" in reason:
            reason = "code that comes with it would have to run"
            remedy = "where you trust it, say trust_remote_code: true for this model in a recipe"
        message = f"{self.source}: cannot load the {self.what}: {reason.rstrip('.')}; {remedy}"
        raise InputError(message) from error
