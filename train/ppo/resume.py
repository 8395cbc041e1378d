"""PPO's part of a Hugging Face checkpoint: how it is saved and loaded, without pickles.

<checkpoint>/critic/critic.safetensors   the critic's own tensors
<checkpoint>/ppo.json                    KL coefficient, position in the rollout, newest metrics
<checkpoint>/rollout-<rank>.safetensors  a rollout batch that is partly used
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.checksums import read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.train.ppo.critic import Critic
from selfcorrect.train.ppo.forward import CRITIC
from selfcorrect.train.trainers.state import check_state

STATE = "ppo.json"
OLDER = "resume from an older checkpoint"
SAME_SETTINGS = "resume with the batch settings of the run's start"

MicroBatch = dict[str, Tensor]


def check_intact(checkpoint: Path) -> None:
    """Raise InputError for a damaged checkpoint; one without checksums is not checked."""
    with suppress(FileNotFoundError):
        check_state(checkpoint, OLDER)


def without_critic(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a complete model without those of its critic."""
    return {name: t for name, t in state.items() if not _is_critic(name)}


def _is_critic(name: str) -> bool:
    return f".{CRITIC}." in f".{name}"


def critic_tensors(critic: Critic, gathered: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the critic's tensors without those it shares with the policy's frozen base.

    `gathered` is the state of the complete model if processes hold parts of it.
    """
    if gathered is None:
        state = critic.state_dict()
    else:
        marker = f".{CRITIC}."
        state = {f".{n}".split(marker, 1)[1]: t for n, t in gathered.items() if _is_critic(n)}
    frozen = {name for name, p in critic.named_parameters() if not p.requires_grad}
    return {name: t for name, t in state.items() if name not in frozen}


def save_critic(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write critic/critic.safetensors into a checkpoint."""
    with atomic_file(folder / CRITIC / "critic.safetensors") as path:
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path)


def load_critic(folder: Path, critic: Critic) -> None:
    """Load critic/critic.safetensors; raise InputError if it is missing or of another critic."""
    path = folder / CRITIC / "critic.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: missing, so PPO cannot resume from this checkpoint; {OLDER}")
    tensors = _read_tensors(path)
    if tensors.keys() != critic_tensors(critic, None).keys():
        raise InputError(
            f"{path}: holds another kind of critic; resume with the `critic` setting of the run's "
            "start"
        )
    try:
        critic.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: belongs to another model ({reason}); {OLDER}") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); {OLDER}") from None


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ppo.json into a checkpoint."""
    write_record(folder / STATE, state)


def load_state(folder: Path, global_step: int, accumulation: int) -> dict[str, Any]:
    """Read ppo.json; raise InputError if the batch settings have changed since."""
    path = folder / STATE
    if not path.is_file():
        raise InputError(f"{path}: missing, so PPO cannot resume from this checkpoint; {OLDER}")
    state = read_record(path, OLDER)
    if not {"micro_step", "kl_coef", "last_kl", "last_score"} <= state.keys():
        raise InputError(f"{path}: damaged, keys are missing; {OLDER}")
    if state["micro_step"] != global_step * accumulation:
        raise InputError(
            f"{path}: written with another gradient_accumulation_steps; {SAME_SETTINGS}"
        )
    return state


def save_rollout(folder: Path, rank: int, micro_batches: list[MicroBatch]) -> None:
    """Write this process's rollout batch."""
    tensors = {
        f"{i}.{name}": tensor.contiguous().cpu()
        for i, micro_batch in enumerate(micro_batches)
        for name, tensor in micro_batch.items()
    }
    with atomic_file(folder / f"rollout-{rank}.safetensors") as path:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def load_rollout(folder: Path, rank: int, count: int, device: Any) -> list[MicroBatch]:
    """Read this process's rollout batch of `count` micro-batches."""
    path = folder / f"rollout-{rank}.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: missing; resume with as many processes as the run had")
    micro_batches: list[MicroBatch] = [{} for _ in range(count)]
    for key, tensor in _read_tensors(path).items():
        index, _, name = key.partition(".")
        if not index.isdecimal():
            raise InputError(f"{path}: damaged ({key!r}); {OLDER}")
        if int(index) >= count:
            raise InputError(f"{path}: written with another steps_per_generation; {SAME_SETTINGS}")
        micro_batches[int(index)][name] = tensor.to(device)
    return micro_batches
