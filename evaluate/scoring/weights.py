"""Digests of weights, and loading a run's checkpoints one after another into one model."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.run_folder import check_saved
from selfcorrect.evaluate.scoring.load_model import ADAPTER, base_of, load_model
from selfcorrect.recipes.foundation.checksums import file_digest

_CONFIGS = (".json", ".jinja", ".txt", ".model", ".py")
# Config-like files that do not affect how to load.
_IGNORED = ("checkpoint.json", "stage.json", "model.safetensors.index.json")


def weights_digest(model: Any) -> str:
    """Return the SHA-256 of the names, types and values of a model's parameters."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = _offloaded(model, name) if tensor.is_meta else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _offloaded(model: Any, name: str) -> Any:
    """Return a tensor of a model with a `device_map` that lies on the CPU or the disk."""
    module, _, own = name.rpartition(".")
    hook = model.get_submodule(module)._hf_hook
    parts = [part for part in getattr(hook, "hooks", [hook]) if getattr(part, "weights_map", None)]
    return parts[0].weights_map[own]


def files_digest(model: str | Path, revision: str | None = None) -> str:
    """Return the SHA-256 of a folder's *.safetensors, or of a hub name and its revision.

    An adapter's digest covers the adapter's settings and the base's files. A hub name may come to
    mean other weights, unless its revision is a commit hash.
    """
    folder = Path(model)
    digest = hashlib.sha256()
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    for path in files:
        digest.update(path.name.encode() + bytes.fromhex(file_digest(path)))
    if not files:
        digest.update(f"{model}@{revision}".encode())
    elif (folder / ADAPTER).is_file():
        base = base_of(folder / ADAPTER)  # InputError if the settings cannot be read
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        settings.pop("base_model_name_or_path")  # may be another path to the same files
        digest.update(json.dumps(settings, sort_keys=True).encode())
        digest.update(files_digest(base).encode())
    return digest.hexdigest()


class CheckpointLoader:
    """Load checkpoints one after another.

    A checkpoint that differs from the last one only in its weights is read into the same module,
    tensor by tensor from the mapped file: no second model in memory, no tokenizer parsed again.
    """

    def __init__(
        self, device: str | None = None, placement: Mapping[str, Any] | None = None
    ) -> None:
        self.device = device
        self.placement = dict(placement or {})
        self.num_swapped = 0
        self._last: tuple[dict[str, str], Any, Any] | None = None

    def load(
        self, folder: Path, trust_remote_code: bool = False, dtype: str = "auto"
    ) -> tuple[Any, Any]:
        """Return (model, tokenizer), the model in eval mode, as `load_model` does.

        The model returned before must no longer be used: it may hold the new weights.
        Raises InputError for everything that cannot be loaded.
        """
        check_saved(folder)
        configs = config_digests(folder) | {"dtype": dtype}
        last, self._last = self._last, None  # a failed swap leaves a mixture behind
        if last is not None and last[0] == configs and _swapped(last[1], folder, dtype):
            self.num_swapped += 1
            self._last = last
        else:
            del last  # before the next model needs the memory
            loaded = load_model(
                folder,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                device=self.device,
                placement=self.placement,
            )
            self._last = (configs, *loaded)
        return self._last[1], self._last[2]


def config_digests(folder: Path) -> dict[str, str]:
    """Return the digests of all files that decide how to load: architecture, adapter, tokenizer."""
    return {
        path.name: file_digest(path)
        for path in folder.glob("*")
        if path.suffix in _CONFIGS and path.name not in _IGNORED and path.is_file()
    }


def _swapped(model: Any, folder: Path, dtype: str) -> bool:
    """Read the folder's weights into the model; False if they do not match it one to one."""
    from safetensors import SafetensorError

    try:
        if (folder / ADAPTER).is_file():
            return _swap_adapter(model, folder / "adapter_model.safetensors")
        return _swap_all(model, sorted(folder.glob("*.safetensors")), any_type=dtype != "auto")
    except (SafetensorError, OSError):
        return False  # loading a fresh model reports the error


def _swap_all(model: Any, files: list[Path], any_type: bool) -> bool:
    import torch
    from safetensors import safe_open

    targets, filled = model.state_dict(), set()
    if any(tensor.is_meta for tensor in targets.values()):
        return False  # offloaded
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, "pt")) for path in files]
        sources = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        # Some architectures save one tensor (GPT-NeoX its head) under an older name.
        unknown, missing = sources.keys() - targets.keys(), targets.keys() - sources.keys()
        is_renamed = len(unknown) == len(missing) == 1
        renamed = dict(zip(unknown, missing, strict=True)) if is_renamed else {}
        for name, file in sources.items():
            target, tensor = targets.get(renamed.get(name, name)), file.get_tensor(name)
            if target is None or target.shape != tensor.shape:
                return False
            if target.dtype != tensor.dtype and not any_type:
                return False
            with torch.no_grad():
                target.copy_(tensor)
            filled.add(target.data_ptr())
    # Tied tensors are saved once.
    return all(tensor.data_ptr() in filled for tensor in targets.values())


def _swap_adapter(model: Any, path: Path) -> bool:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    if any(tensor.is_meta for tensor in model.parameters()):
        return False
    new = load_file(path)
    old = get_peft_model_state_dict(model)
    if {n: (t.shape, t.dtype) for n, t in new.items()} != {
        n: (t.shape, t.dtype) for n, t in old.items()
    }:
        return False
    set_peft_model_state_dict(model, new)
    return True
