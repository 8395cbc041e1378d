"""PPO on TRL's GRPOTrainer: actor, critic, KL penalty in the reward, resumable to the bit."""

from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.rewards import RewardModelScorer
from selfcorrect.train.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "RewardModelScorer"]
