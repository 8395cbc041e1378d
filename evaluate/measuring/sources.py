"""The weights of checkpoints that were trained elsewhere: on this disk, or on the Hugging Face hub.

Other trainers are recognised by the files that they leave (docs/guides/series.md). Hub weights are
fetched when a checkpoint is measured, and may be dropped afterwards.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from selfcorrect.evaluate.run_folder import Checkpoint, Source
from selfcorrect.evaluate.scoring.load_model import ADAPTER, check_no_pickles
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.hub_errors import hub_errors

logger = logging.getLogger(__name__)

WEIGHTS = "weights"  # in a checkpoint's folder: what this run fetched for it
# Where the trainers put a model within a checkpoint's folder; the first that has weights counts.
_HOLDERS = (".", "actor/huggingface", "huggingface", "actor/lora_adapter", "lora_adapter")
_LOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py")
_LOADED_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model", ".py")
PAUSES = (2.0, 10.0, 30.0)  # seconds before the hub is asked again
_SPARE = 2**26  # bytes that a download leaves free

T = TypeVar("T")


# --- folders -------------------------------------------------------------------------------------


def model_in(folder: Path) -> Path | None:
    """Return the model within a trainer's checkpoint folder, None if it has none (yet).

    Raises InputError, with the remedy, for weights that are pickles or shards of a trainer's own.
    """
    if not folder.is_dir():
        return None
    if not (folder / "STABLE").exists() and any(folder.parent.glob("*/STABLE")):
        return None  # prime-rl marks the checkpoints that it has written to the end
    places = [folder / name if name != "." else folder for name in _HOLDERS]
    if found := next((place for place in places if _has_weights(place)), None):
        return found
    for place in (folder, folder / "actor"):
        _refuse_shards(place)
    for place in places:
        if (place / "config.json").is_file() and any(place.glob("pytorch_model*.bin")):
            check_no_pickles(place)
    return None


def _has_weights(folder: Path) -> bool:
    """Return whether a folder holds an adapter, or a model with all parts of its weights."""
    if (folder / ADAPTER).is_file():
        return (folder / "adapter_model.safetensors").is_file()
    if not (folder / "config.json").is_file():
        return False
    names = {path.name for path in folder.glob("*.safetensors")}
    totals = {int(match[1]) for name in names if (match := re.search(r"-of-0*(\d+)\.", name))}
    return bool(names) and all(len(names) >= total for total in totals)


def _refuse_shards(folder: Path) -> None:
    """Raise InputError if a folder holds weights in the parts that a trainer resumes from."""
    merge = "python -m verl.model_merger merge --backend {} --local_dir {} --target_dir {}"
    target = folder / "huggingface"
    remedies = {
        "model_world_size_*_rank_*.pt": merge.format("fsdp", folder, target),
        "dist_ckpt": merge.format("megatron", folder, target),
        "pytorch_model_fsdp_0": f"accelerate merge-weights {folder}/pytorch_model_fsdp_0 {folder}",
        "zero_to_fp32.py": f"cd {folder} && python zero_to_fp32.py . . --safe_serialization",
        "trainer/*.distcp": "have prime-rl write weights too (its key ckpt.weights)",
    }
    for pattern, remedy in remedies.items():
        if next(folder.glob(pattern), None) is not None:
            raise InputError(
                f"{folder}: its weights are in parts ({pattern}), which are never read; turn them "
                f"into a model folder: {remedy}"
            )


def recorded_step(folder: Path) -> int | None:
    """Return the step in the trainer's own record of a checkpoint, if it has one."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def version_of(model: Path) -> str:
    """Return a digest of the names, sizes and times of a model's files; it reads none of them."""
    files = [model] if model.is_file() else list(model.glob("*"))
    facts = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
        if path.suffix in _LOADED_SUFFIXES
        and not path.name.endswith(("_state.json", "_results.json"))  # a trainer's own
    )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# --- the hub -------------------------------------------------------------------------------------


def is_on_hub(path: str) -> bool:
    """Return whether a path, maybe with {step} in it, is a hub name and no folder or file."""
    start = re.split(r"[{*]", path)[0]
    parent = Path(start).parent if start != path else Path(path)
    return not (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or Path(path).expanduser().exists()
        or ("/" not in path and start != path)
        or (parent != Path() and parent.is_dir())
    )


def hub_revisions(repo: str, pauses: Sequence[float] | None = None) -> dict[str, str]:
    """Return the commit of every branch and tag of a model on the hub, by name."""
    from huggingface_hub import HfApi

    refs = patiently(repo, lambda: HfApi().list_repo_refs(repo), pauses)
    return {ref.name: ref.target_commit for ref in [*refs.tags, *refs.branches]}


def hub_commit(repo: str, commit: str) -> str:
    """Return the full hash of a commit or pull request on the hub; InputError if there is none."""
    from huggingface_hub import HfApi

    name = f"{repo}@{commit}"
    return str(patiently(name, lambda: HfApi().model_info(repo, revision=commit).sha))


def hub_configuration(repo: str, commit: str) -> Path:
    """Return a folder with the configuration of a model or adapter on the hub."""
    return _download(repo, commit, ["config.json", ADAPTER, "*.py"], None)


def cached_commit(repo: str, revision: str) -> str | None:
    """Return the commit that a revision had when it was last fetched to the local cache."""
    folder = _cached(repo, revision)
    return None if folder is None else folder.name


def patiently(repo: str, call: Callable[[], T], pauses: Sequence[float] | None = None) -> T:
    """Return what `call` returns, asking again after a pause for faults that may pass.

    Raises InputError for what will not pass (no such model), RunFailure if it lasts.
    """
    for pause in (*(PAUSES if pauses is None else pauses), None):
        try:
            with hub_errors(repo, "download"):
                return call()
        except RunFailure as error:
            if pause is None:
                raise RunFailure(f"{error}; what is measured is kept: run it again later") from None
            logger.warning("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
    raise AssertionError


def _cached(repo: str, revision: str) -> Path | None:
    from huggingface_hub import snapshot_download

    with suppress(FileNotFoundError, ValueError):  # LocalEntryNotFoundError is both
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(_LOADED), local_files_only=True
            )
        )
    return None


def _download(repo: str, commit: str, patterns: Sequence[str], target: Path | None) -> Path:
    """Fetch files of a commit to `target`, or to the hub's cache; resume where it broke off."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()  # those of this command are enough
    try:
        return Path(
            patiently(
                repo,
                lambda: snapshot_download(
                    repo, revision=commit, allow_patterns=list(patterns), local_dir=target
                ),
            )
        )
    finally:
        if had_bars:
            enable_progress_bars()


def _fetch(source: Source, target: Path | None) -> Path:
    """Return the folder, or GGUF file, of a checkpoint on the hub; fetch what is not here.

    `target` is the folder for it, None for the hub's cache. Raises InputError for a checkpoint
    without usable weights, RunFailure for a disk that is too small.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    repo, commit = source.path, source.version
    cached = _cached(repo, commit)
    if cached is not None and _is_complete(cached, source.gguf_file):
        return _within(cached, source.gguf_file)
    name = f"{repo}@{source.revision or commit}"
    files = patiently(
        name,
        lambda: {
            entry.path: entry.size
            for entry in HfApi().list_repo_tree(repo, revision=commit, recursive=True)
            if isinstance(entry, RepoFile)
        },
    )
    patterns = list(_LOADED) if source.gguf_file is None else [source.gguf_file]
    wanted = "*.safetensors" if source.gguf_file is None else source.gguf_file
    matching = {path: size for path, size in files.items() if Path(path).match(wanted)}
    if not matching:
        kinds = sorted(path for path in files if path.endswith((".bin", ".pt", ".pth", ".gguf")))
        has = f"it has {', '.join(kinds[:3])}" if kinds else "it has no weights"
        raise InputError(
            f"{name}: no {wanted} there ({has}); pickles are never loaded, docs/guides/series.md "
            "says how to convert them"
        )
    top = {path: size for path, size in matching.items() if "/" not in path}
    if source.gguf_file is None and top:
        patterns = [pattern for pattern in patterns if pattern != "*.safetensors"]
        patterns += list(top)  # not the copies in other formats that lie in folders
        matching = top
    folder = target or Path(_cache_folder())
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    there = (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if target else 0
    )
    needed = sum(matching.values()) - there
    free = shutil.disk_usage(existing).free
    if needed + _SPARE > free:
        remedy = "make room" if target else "make room, or set keep_weights: false"
        raise RunFailure(
            f"{name}: its weights take {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} "
            f"GB left; {remedy}, then run the same command again"
        )
    return _within(_download(repo, commit, patterns, target), source.gguf_file)


def _cache_folder() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _is_complete(folder: Path, gguf_file: str | None) -> bool:
    return (folder / gguf_file).is_file() if gguf_file else _has_weights(folder)


def _within(folder: Path, gguf_file: str | None) -> Path:
    return folder / gguf_file if gguf_file else folder


# --- a checkpoint's weights ----------------------------------------------------------------------


@contextmanager
def weights_of(checkpoint: Checkpoint, keep_weights: bool = True) -> Iterator[Path]:
    """Yield the folder (or GGUF file) that a checkpoint is loaded from; fetch it if need be.

    Without `keep_weights`, what was fetched for it is removed at the end. Raises RunFailure for
    weights that have vanished, cannot be fetched, or change in the meantime.
    """
    source = checkpoint.record.source
    if source is None:
        yield checkpoint.folder
        return
    fetched, linked = checkpoint.folder / WEIGHTS, checkpoint.folder / "adapter"
    is_here = False
    try:
        if source.on_hub:
            model = _fetch(source, None if keep_weights else fetched)
        else:
            model = local_model(source)
        before, is_here = version_of(model), True
        yield model if source.base is None else _with_base(model, source.base, linked)
        if not source.on_hub and version_of(local_model(source)) != before:
            raise RunFailure(f"{source.path}: changed while it was measured; run the command again")
    except (InputError, RunFailure, FileNotFoundError) as error:
        if is_here:
            shutil.rmtree(fetched, ignore_errors=True)  # a broken download is resumed
        if not source.on_hub and _is_gone(source):
            raise RunFailure(
                f"{source.path}: vanished since the series was opened; restore it, or unlist it"
            ) from None
        if is_here or not isinstance(error, InputError):
            raise
        raise RunFailure(str(error)) from None
    finally:
        shutil.rmtree(linked, ignore_errors=True)
    shutil.rmtree(fetched, ignore_errors=True)


def source_state(source: Source) -> object:
    """Return what changes whenever the files of a checkpoint on this disk do."""
    with suppress(InputError, OSError):
        return source.version if source.on_hub else version_of(local_model(source))
    return None


def _is_gone(source: Source) -> bool:
    try:
        local_model(source)
    except FileNotFoundError:
        return True
    except InputError:
        return False
    return False


def local_model(source: Source) -> Path:
    """Return the folder or GGUF file of a checkpoint on this disk; FileNotFoundError without one.

    Raises InputError as `model_in`.
    """
    path = Path(source.path)
    if source.gguf_file is not None:
        path = path / source.gguf_file
    if path.is_file():
        return path
    found = None if source.gguf_file is not None else model_in(path)
    if found is None:
        raise FileNotFoundError(path)
    return found


def _with_base(adapter: Path, base: str, folder: Path) -> Path:
    """Return a folder with links to an adapter's files and `base` as the model it is put on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in adapter.iterdir():
        if path.suffix in _LOADED_SUFFIXES and path.name != ADAPTER:
            (folder / path.name).symlink_to(path.resolve())
    settings: dict[str, Any] = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base
    (folder / ADAPTER).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder
