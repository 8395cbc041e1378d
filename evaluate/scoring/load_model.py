"""Load a causal LM and its tokenizer from a folder, the hub, a PEFT adapter or a GGUF file."""

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.run_folder import check_saved
from selfcorrect.evaluate.scoring.precision import (
    check_dtype,
    chosen,
    fast_dtype,
    loading_options,
    num_parameters,
)
from selfcorrect.recipes.foundation.errors import InputError, is_from_outside, reason_of
from selfcorrect.recipes.foundation.ranks import best_device

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
DIVIDED = (
    "the adapter changes the embeddings or the head, which must lie on a device then: give "
    "device_map more memory, or merge the adapter into its base"
)
GGUF_ON_DISK = (
    "weights of a GGUF file cannot lie on the disk; raise max_memory, or use a folder with "
    "safetensors"
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def load_model(
    path: str | Path,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    placement: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Return (model, tokenizer), the model in eval mode on `device` (default: `best_device`).

    `placement` divides a model instead: transformers' `device_map` (auto: over all GPUs, then the
    CPU, then the disk), with `max_memory` by device and `offload_folder`.

    `path` is a model folder, a hub id, a PEFT adapter folder or a .gguf file. Weights are read from
    safetensors or GGUF, never from pickles. `dtype` is the type that they are held in: "auto" is
    the files' own, "fast" what `precision.chosen` says for the machine; an adapter's weights
    stay float32 on any base. An adapter's base is the one named in its adapter_config.json; if that
    path has moved, a folder of that name beside the adapter is used. With `trust_remote_code`,
    Python code that comes with the model is run, and a warning says so.

    Raises InputError, in one line, for everything that cannot be loaded.
    """
    if trust_remote_code:
        warn_trust_remote_code(path)
    file = Path(path).expanduser()
    if _is_gguf(file):
        path, gguf_file = file.parent, file.name
    source = source_of(str(path))
    check_saved(Path(source))
    device = device or best_device()
    check_dtype(dtype, device, str(path))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    adapter = Path(source) / ADAPTER
    if adapter.is_file():
        base = base_of(adapter)
        of_base: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if Path(base).is_file():
            base, of_base["gguf_file"] = str(Path(base).parent), Path(base).name
        elif Path(base).is_dir():
            check_saved(Path(base))
        elif revision_of_base := read_adapter(adapter).get("revision"):
            of_base["revision"] = revision_of_base
        model = _load_weights(base, dtype, of_base, device, placement)
        model = load_adapter(model, source)
        tokenizer = _load_tokenizer(source, base, of_base)
    else:
        if gguf_file is not None:
            options["gguf_file"] = gguf_file
        elif Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise InputError(f"{path}: not a model folder (no config.json)")
        model = _load_weights(source, dtype, options, device, placement)
        tokenizer = _load_tokenizer(source, source, options)
    _check_vocabulary(source, model, tokenizer)
    is_placed = placement or dtype == "4bit"
    return (model if is_placed else model.to(device)).eval(), tokenizer


def warn_trust_remote_code(path: str | Path) -> None:
    """Log a warning that code from `path` will run."""
    logger.warning("%s: trust_remote_code is on; the model's own code will run", path)


@contextmanager
def refuse_pickles(source: str | Path) -> Iterator[None]:
    """Raise InputError, with the remedy, if the block unpickles anything.

    Libraries fall back to pickles if a folder has no safetensors, or if an index names pickles.
    """
    import torch

    check_no_pickles(source)

    def refuse(*_: Any, **__: Any) -> None:
        raise _pickled(source)

    original = torch.load
    torch.load = refuse
    try:
        yield
    finally:
        torch.load = original


def check_no_pickles(folder: str | Path) -> None:
    """Raise InputError if a folder has only pickled weights, or an index of files outside it."""
    folder = Path(folder)
    if not any(folder.glob("*.safetensors")):
        if any(path.suffix in PICKLES for path in folder.glob("*model*")):
            raise _pickled(folder)
        return
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no index, or a damaged one, which the loader reports
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise InputError(f"{index}: {str(name)[:80]!r} is not a file of this folder")


def _pickled(source: str | Path) -> InputError:
    return InputError(
        f"{source}: the weights are pickles, which can run code and are never loaded; if you trust "
        "their source, convert them to safetensors (load them with the library that wrote them, "
        "then call save_pretrained)"
    )


def source_of(path: str) -> str:
    """Return `path` as libraries expect it; a missing folder never becomes a hub lookup."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if _is_gguf(folder):
        return str(folder)
    if folder.exists():
        raise InputError(f"{path}: not a model; give a model folder, a .gguf file or a hub id")
    parts = path.split("/")
    looks_local = (
        path.startswith((".", "/", "~"))
        or "\\" in path
        or len(parts) > 2
        or "" in parts
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )
    if looks_local:
        raise InputError(f"{path}: model folder not found; check the path, or give a hub id")
    return path


def base_of(adapter: Path) -> str:
    """Return the base model of an adapter_config.json: as named there, or beside the adapter.

    It is a model folder, a .gguf file or a hub id.
    """
    named = read_adapter(adapter).get("base_model_name_or_path")
    if not named:
        raise InputError(f"{adapter}: base_model_name_or_path: set it to the base model's path")
    folder = adapter.parent.resolve()
    beside = [folder / named, *(parent / Path(named).name for parent in folder.parents[:3])]
    for candidate in (Path(named).expanduser(), *beside):
        if (candidate / "config.json").is_file() or _is_gguf(candidate):
            return str(candidate)
    try:
        source = source_of(named)
    except InputError:
        raise InputError(
            f"{adapter}: the base model {named} is neither there nor beside the adapter; "
            "set base_model_name_or_path to its folder"
        ) from None
    if Path(source).is_dir():
        raise InputError(
            f"{adapter}: the base model {named} has no config.json; set base_model_name_or_path to "
            "a model folder or a .gguf file"
        )
    return source


def read_adapter(adapter: Path) -> dict[str, Any]:
    """Return an adapter_config.json; {} for a damaged one."""
    try:
        settings = json.loads(adapter.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _load_weights(
    source: str,
    dtype: str,
    options: dict[str, Any],
    device: str,
    placement: Mapping[str, Any] | None = None,
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    # GGUF files have their own loader, which ignores use_safetensors.
    safetensors = {} if "gguf_file" in options else {"use_safetensors": True}
    if "gguf_file" in options and dtype == "4bit":
        raise InputError(
            f"{_name(source, options)}: a GGUF file cannot be held in 4bit; use bfloat16, or a "
            "folder with safetensors"
        )
    remedy = "check device_map, max_memory and offload_folder" if placement else None
    with _input_errors(_name(source, options), "model", remedy), refuse_pickles(source):
        if dtype == "fast":
            config = AutoConfig.from_pretrained(source, **options)
            count = num_parameters(config, options["trust_remote_code"])
            dtype = chosen("auto", count, fast_dtype(device))
        held = loading_options(dtype, device) | _placement_options(placement)
        if "gguf_file" in options:
            # With `kernels`, transformers would keep some packed, where LoRA cannot train.
            held["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source, **held, **safetensors, **options)
    if "gguf_file" in options and "disk" in getattr(model, "hf_device_map", {}).values():
        # transformers leaves some weights out of the offloaded files.
        raise InputError(f"{_name(source, options)}: {GGUF_ON_DISK}")
    return model


def _name(source: str, options: Mapping[str, Any]) -> str:
    """Return the GGUF file among the options of `from_pretrained`, or else `source`."""
    return str(Path(source) / options["gguf_file"]) if "gguf_file" in options else source


def _placement_options(placement: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return transformers' arguments; GPUs are numbers, which YAML and JSON may write as text."""
    options = dict(placement or {})
    if "max_memory" in options:
        memory = options["max_memory"].items()
        options["max_memory"] = {
            int(place) if str(place).isdigit() else place: size for place, size in memory
        }
        options.setdefault("device_map", "auto")
    return options


def load_adapter(model: Any, source: str) -> Any:
    """Put the adapter of the folder `source` on its base model.

    The base's embeddings get as many rows as the adapter was trained with. Raises InputError for an
    adapter that changes the prompts, and for one that does not fit the base.
    """
    from peft import PeftConfig

    weights = Path(source) / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{source}: no adapter_model.safetensors; save the adapter as safetensors")
    with _input_errors(source, "adapter"), refuse_pickles(source), warnings.catch_warnings():
        # peft only warns of weights that are missing, and keeps their random initial values.
        warnings.filterwarnings("error", "Found missing adapter keys")
        config = PeftConfig.from_pretrained(source)
        if config.is_prompt_learning or config.peft_type == "POLY":
            raise InputError(
                f"{source}: adapters of the type {config.peft_type.value} put virtual tokens "
                "before each prompt, or need a task with it, which is not supported; give an "
                "adapter of the weights, such as LoRA"
            )
        shapes = tensor_shapes(weights)
        _fit_vocabulary(model, shapes, source)
        adapted = _adapted(model, source)
    modules, found = (
        sum(".lora_A." in name for name in names) for names in (shapes, adapted.state_dict())
    )
    if modules > found:
        raise InputError(
            f"{source}: the adapter has weights for {modules} modules, of which the base model has "
            f"{found}; set base_model_name_or_path in {ADAPTER} to the model it was trained on"
        )
    _untie(adapted.get_base_model(), shapes)
    return adapted


def _adapted(model: Any, source: str) -> Any:
    """Return the model with its adapter, whose parts are on the devices that their layers run on.

    Of a model with weights on the disk, peft would write a copy below the working directory, and
    it puts the adapter where the weights are: nowhere, until they are needed.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file

    device_map = getattr(model, "hf_device_map", None) or {}
    if len(device_map) < 2 and not {"cpu", "disk"} & set(device_map.values()):
        return PeftModel.from_pretrained(model, source, is_trainable=False)
    original = BaseTunerLayer._move_adapter_to_device_of_base_layer
    BaseTunerLayer._move_adapter_to_device_of_base_layer = _put_adapter
    del model.hf_device_map
    warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
    try:
        adapted = PeftModel.from_pretrained(model, source, is_trainable=False)
        weights = load_file(Path(source) / "adapter_model.safetensors")
        set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=True)
        return adapted
    finally:
        BaseTunerLayer._move_adapter_to_device_of_base_layer = original
        model.hf_device_map = device_map


def _put_adapter(layer: Any, adapter: str, device: Any = None) -> None:
    base = layer.get_base_layer()
    place = getattr(getattr(base, "_hf_hook", None), "execution_device", base.weight.device)
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        parts: Any = getattr(layer, name, None)
        if hasattr(parts, "to") and adapter in parts:
            parts[adapter] = parts[adapter].to(place)


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor of a safetensors file, from its header."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def _fit_vocabulary(model: Any, shapes: dict[str, list[int]], source: str) -> None:
    """Give a base model the vocabulary of its adapter.

    `shapes` are those of the adapter's file. Embeddings of another size than the base's must be in
    it, and the head too unless both are one: their new rows are nowhere else.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None else [embedding, head]
    names = [next(n for n, module in model.named_modules() if module is layer) for layer in layers]
    is_tied = head is not None and head.weight is embedding.weight
    saved = [
        {part: shape for part, shape in shapes.items() if f".{name}." in part} for name in names
    ]
    rows = [
        shape[0]
        for parts in saved
        for part, shape in parts.items()
        if part.endswith(".weight") and ".lora_" not in part
    ]
    wanted = {shape[1] for part, shape in saved[0].items() if part.endswith("lora_embedding_A")}
    wanted |= set(rows)
    if wanted - {embedding.weight.shape[0]}:
        if len(rows) < (1 if is_tied else len(layers)):
            raise InputError(
                f"{source}: the adapter was trained with {max(wanted)} tokens, its base has "
                f"{embedding.weight.shape[0]}, and the file lacks the embeddings or the head of "
                "the others; save it again with save_embedding_layers=True"
            )
        if embedding.weight.is_meta:
            raise InputError(DIVIDED)
        model.resize_token_embeddings(rows[0], mean_resizing=False)


def _untie(model: Any, shapes: dict[str, list[int]]) -> None:
    """Give the head weights of its own if an adapter changes the embeddings or the head.

    peft would merge such an adapter into the weights that both share.
    """
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [n for n, module in model.named_modules() if module in (embedding, head)]
    base_embedding, base_head = (getattr(part, "base_layer", part) for part in (embedding, head))
    is_tied = base_head is not None and base_head.weight is base_embedding.weight
    if is_tied and any(f".{name}.lora_" in part for name in names for part in shapes):
        if base_head.weight.is_meta:
            raise InputError(DIVIDED)
        base_head.weight = torch.nn.Parameter(base_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """Return the tokenizer of a model folder, an adapter, a hub name or a GGUF file.

    Raises InputError if it cannot be loaded.
    """
    source = source_of(model)
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    file = Path(source)
    if (file / ADAPTER).is_file():
        base = base_of(file / ADAPTER)
        if not any(file.glob("tokenizer*")) and Path(base).is_file():
            return load_tokenizer(base)
        return _load_tokenizer(source, base, options)
    if file.is_file():
        source, options["gguf_file"] = str(file.parent), file.name
    return _load_tokenizer(source, source, options)


def saved_dtype(model: str, revision: str | None = None) -> str:
    """Return the type in which a model's weights, or those of an adapter's base, were saved.

    It is that of the configuration, else that of the largest tensor in a folder, else float32.
    """
    from transformers import AutoConfig

    source = source_of(model)
    adapter = Path(source) / ADAPTER
    if adapter.is_file():
        base = base_of(adapter)
        return saved_dtype(
            base, None if Path(base).exists() else read_adapter(adapter).get("revision")
        )
    if not Path(source).is_file():
        with _input_errors(source, "model"):
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        for part in (config, config.get_text_config(decoder=True)):
            if getattr(part, "dtype", None) is not None:
                return str(part.dtype).removeprefix("torch.")
    return _largest_dtype(Path(source)) or "float32"


def _largest_dtype(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    found: dict[int, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(SafetensorError, OSError), safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_slice(name)
                found.setdefault(math.prod(tensor.get_shape()), tensor.get_dtype())
    return names.get(found[max(found)]) if found else None


def _load_tokenizer(source: str, fallback: str, options: dict[str, Any]) -> Any:
    """Load the tokenizer of `source`, or of `fallback` if `source` is a folder without one."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and "gguf_file" not in options:
        source = fallback
    with _input_errors(_name(source, options), "tokenizer"):
        return AutoTokenizer.from_pretrained(source, **options)


def _check_vocabulary(source: str, model: Any, tokenizer: Any) -> None:
    embeddings = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= embeddings > 0:
        remedy = "use the model's own tokenizer"
        if (Path(source) / ADAPTER).is_file():
            remedy += ", or save the adapter with save_embedding_layers=True"
        raise InputError(
            f"{source}: the tokenizer has {largest + 1} tokens but the model only {embeddings} "
            f"embeddings; {remedy}"
        )


@contextmanager
def _input_errors(source: str, part: str, remedy: str | None = None) -> Iterator[None]:
    """Convert the libraries' errors about `part` into one-line InputErrors with a remedy."""
    try:
        yield
    except BaseException as error:
        # The libraries raise all kinds of errors; tokenizers a plain Exception, or a Rust panic.
        if isinstance(error, InputError):
            raise
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        if is_from_outside(error):
            raise
        reason = reason_of(error)
        if source.endswith(".gguf") and "offload_folder" in reason:
            raise InputError(f"{source}: {GGUF_ON_DISK}") from error
        remedy = remedy or _remedy(source)
        if part == "adapter" and "size mismatch" in reason:
            remedy = "give it the base that it was trained on"
        if "custom code" in reason:
            reason = "it needs code of its own to run"
            remedy = (
                "if you trust that code, set trust_remote_code: true for this model in a recipe"
            )
        message = f"{source}: cannot load the {part}: {reason.rstrip('.')}; {remedy}"
        raise InputError(message) from error


def _remedy(source: str) -> str:
    if Path(source).is_dir():
        return "the folder needs config.json, *.safetensors and the tokenizer's files"
    if source.endswith(".gguf"):
        return "it may be damaged or incomplete: fetch it again"
    return "give a model folder, or a hub id (with network, or the model in the local cache)"
