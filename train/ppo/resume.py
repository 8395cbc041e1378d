"""What PPO adds to a Hugging Face checkpoint, and how it comes back: nothing here is a pickle.

<checkpoint>/critic/critic.safetensors   the critic's own tensors
<checkpoint>/ppo.json                    KL coefficient, place within the rollout, newest figures
<checkpoint>/rollout-<rank>.safetensors  a rollout batch that is only partly used
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.checksums import read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.train.ppo.critic import Critic
from selfcorrect.train.ppo.forward import CRITIC
from selfcorrect.train.trainers.state import check_state

STATE = "ppo.json"
TRAINER_STATE = "trainer_state.json"

_log = logging.getLogger(__name__)

Minibatch = dict[str, Tensor]


def newest_resumable(folder: Path) -> Path | None:
    """The newest whole checkpoint of a trainer's output folder, for `resume_from_checkpoint`.

    transformers writes trainer_state.json last, so a checkpoint whose writing was cut short is
    known by its absence and passed over; so is one that is damaged, which is said.
    """
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            check(path)
            step = read_record(path / TRAINER_STATE, "it is passed over")["global_step"]
        except InputError as error:
            _log.warning("%s", error)
            continue
        except (OSError, KeyError):
            continue
        if isinstance(step, int):
            found.append((step, path))
    return max(found)[1] if found else None


def check(checkpoint: Path) -> None:
    """Raises InputError for a checkpoint that is not as it was written; others' are not known."""
    with suppress(FileNotFoundError):
        check_state(checkpoint, "resume from an older one")


def is_critic_name(name: str) -> bool:
    """Whether a parameter of the whole model belongs to its critic."""
    return f".{CRITIC}." in f".{name}"


def critic_tensors(critic: Critic, gathered: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The critic's own tensors; those it shares with the policy's frozen base are left out.

    `gathered` is the whole model's state where processes hold parts of it.
    """
    if gathered is None:
        state = critic.state_dict()
    else:
        marker = f".{CRITIC}."
        state = {f".{n}".split(marker, 1)[1]: t for n, t in gathered.items() if is_critic_name(n)}
    frozen = {name for name, p in critic.named_parameters() if not p.requires_grad}
    return {name: t for name, t in state.items() if name not in frozen}


def save_critic(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write critic/critic.safetensors into a checkpoint."""
    with atomic_file(folder / CRITIC / "critic.safetensors") as path:
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path)


def load_critic(folder: Path, critic: Critic) -> None:
    """Load critic/critic.safetensors; raises InputError where it is missing or another critic's."""
    path = folder / CRITIC / "critic.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: missing, so this checkpoint cannot be resumed by PPO")
    tensors = _tensors(path)
    if tensors.keys() != critic_tensors(critic, None).keys():
        raise InputError(
            f"{path}: holds another kind of critic; resume with the `critic` setting "
            "that the run was started with"
        )
    try:
        critic.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: is of another model ({reason})") from None


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); resume from an older checkpoint") from None


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ppo.json."""
    write_record(folder / STATE, state)


def load_state(folder: Path, global_step: int, accumulation: int) -> dict[str, Any]:
    """Read ppo.json; raises InputError when the batch settings are not those it was made with."""
    path = folder / STATE
    if not path.is_file():
        raise InputError(f"{path}: missing, so this checkpoint cannot be resumed by PPO")
    state = read_record(path, "resume from an older checkpoint")
    if not {"micro_step", "kl_coef", "last_kl", "last_score"} <= state.keys():
        raise InputError(f"{path}: damaged, keys are missing; resume from an older checkpoint")
    if state["micro_step"] != global_step * accumulation:
        raise InputError(
            f"{path}: written with another gradient_accumulation_steps; resume with "
            "the batch settings that the run was started with"
        )
    return state


def save_rollout(folder: Path, rank: int, minibatches: list[Minibatch]) -> None:
    """Write this process's rollout batch."""
    tensors = {
        f"{i}.{name}": tensor.contiguous().cpu()
        for i, minibatch in enumerate(minibatches)
        for name, tensor in minibatch.items()
    }
    with atomic_file(folder / f"rollout-{rank}.safetensors") as path:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def load_rollout(folder: Path, rank: int, count: int, device: Any) -> list[Minibatch]:
    """Read this process's rollout batch of `count` micro-batches."""
    path = folder / f"rollout-{rank}.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: missing; resume with as many processes as the run had")
    minibatches: list[Minibatch] = [{} for _ in range(count)]
    for key, tensor in _tensors(path).items():
        index, _, name = key.partition(".")
        if not index.isdecimal():
            raise InputError(f"{path}: damaged ({key!r}); resume from an older checkpoint")
        if int(index) >= count:
            raise InputError(
                f"{path}: written with another steps_per_generation; resume with the "
                "batch settings that the run was started with"
            )
        minibatches[int(index)][name] = tensor.to(device)
    return minibatches
