"""PPO on TRL's GRPOTrainer: actor, critic, KL penalty in the reward, resumable to the bit.

The public names load on first use: `train.ppo.limits` can then be imported without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfcorrect.train.ppo.config import PPOConfig
    from selfcorrect.train.ppo.rewards import RewardModelScorer
    from selfcorrect.train.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "RewardModelScorer"]
_MODULES = {"PPOConfig": "config", "PPOTrainer": "trainer", "RewardModelScorer": "rewards"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
