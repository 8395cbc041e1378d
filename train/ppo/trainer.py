"""Proximal policy optimisation of a language model against rewards, on TRL's GRPOTrainer.

Everything GRPO and PPO share is inherited: prompts, generation, chat templates, references,
adapters, distribution, logging. What PPO adds is below, in the order of a PPO step: sample a
rollout batch, turn scores into advantages, minimise the clipped policy and value losses over
minibatches. actor_critic.py holds the plumbing underneath.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from selfcorrect.recipes.foundation.errors import RunFailure
from selfcorrect.train.ppo import losses
from selfcorrect.train.ppo.actor_critic import ActorCriticTrainer
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.timing import PhaseClock

# The columns of a rollout batch that PPO learns from.
LEARNED_FROM = (
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch",
    "old_per_token_logps", "importance_sampling_ratio", "sampling_per_token_logps", "tool_mask",
)  # fmt: skip


class PPOTrainer(ActorCriticTrainer):
    """GRPOTrainer with a critic, generalised advantages and a KL penalty in the reward.

    Takes what GRPOTrainer takes. `args` is a PPOConfig; rewards are functions of TRL's signature,
    or sequence classifiers (objects or folders), which `RewardModelScorer` then scores. A model
    made in memory must have been saved: the reference is read from `model.config.name_or_path`.

    Raises InputError where settings and models do not fit, RunFailure when a reward is not a finite
    number, when the loss or the KL is not finite, or when the KL exceeds `max_kl`.
    """

    _tag_names: ClassVar = ["trl", "ppo"]
    _name = "PPO"
    _paper: ClassVar = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    def __init__(self, model: Any, reward_funcs: Any, args: PPOConfig, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, **kwargs)
        self._scores: Tensor | None = None  # of the newest rollout batch, all processes
        self._clock = PhaseClock()
        self.add_callback(self._clock)

    # ---- where training stands -----------------------------------------------------------------

    @property
    def ppo_step(self) -> int:
        """Finished PPO steps: rollout batches whose last optimizer update is done."""
        return self.state.global_step // self.args.updates_per_rollout

    @property
    def step_label(self) -> str:
        """Which step is under way, for messages."""
        return f"ppo step {self.ppo_step + 1}"

    @property
    def episodes(self) -> int:
        """Completions sampled for training so far, over all processes."""
        begun = math.ceil(self._step / self.args.micro_steps_per_rollout)
        return begun * self.args.generation_batch_size

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of those episodes."""
        return int(self.state.num_input_tokens_seen)

    # ---- 1. sample a rollout batch and turn its scores into advantages ---------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout batch, with values, returns and per-token advantages in it."""
        with self._timed("score"):
            return self._rollout(inputs)

    def _rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        self._take_values()
        batch = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" not in batch:  # TRL can do without; PPO needs the values too
            batch["old_per_token_logps"] = self._old_policy(batch)
        values = self._take_values()
        mask = _sampled(batch)

        rows = slice(self.accelerator.process_index * len(inputs), None)
        raw = (self._scores * self.reward_weights.to(mask.device)).sum(dim=1)[rows][: len(inputs)]
        last = losses.last_token(mask)
        ended = self._ended(batch["completion_ids"], last)
        args = self.args
        score = losses.shaped_score(
            raw,
            ended,
            args.score_shift,
            args.score_scale,
            args.score_clip,
            args.missing_eos_penalty,
        )
        rewards, kl = self._kl_penalty(batch, mask)
        rewards[torch.arange(len(rewards), device=mask.device), last] += score * mask.any(dim=1)
        self._log_rollout(mode, raw, rewards, kl, ended)
        if args.whiten_rewards:
            rewards = losses.whiten(rewards, mask, self._sum, keep_mean=True)
        advantages, targets = losses.advantages_and_returns(
            rewards, values, mask, args.gamma, args.lam
        )
        explained = losses.explained_variance(values, targets, mask, self._sum)
        self._note(mode, {"value/explained_variance": explained})
        if args.whiten_advantages:
            advantages = losses.whiten(advantages, mask, self._sum)

        kept = {name: batch[name] for name in LEARNED_FROM if name in batch}
        return {**kept, "advantages": advantages, "old_values": values, "returns": targets}

    def _kl_penalty(self, batch: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The KL penalty as rewards (rows, tokens), and the KL (rows,) of each completion."""
        policy = batch["old_per_token_logps"].float()
        if self.beta == 0:
            return torch.zeros_like(policy), None
        reference = batch["ref_per_token_logps"].float()
        penalty = losses.kl_per_token(policy, reference, self.args.kl_estimator)
        return -self.kl_coef * penalty * mask, ((policy - reference) * mask).sum(dim=1)

    def _log_rollout(
        self, mode: str, raw: Tensor, rewards: Tensor, kl: Tensor | None, ended: Tensor
    ) -> None:
        count = torch.tensor(float(len(raw)), device=raw.device)
        sums = [count, raw.sum(), raw.square().sum(), rewards.sum(), ended.float().sum()]
        sums.append(kl.sum() if kl is not None else torch.zeros_like(count))
        count, score, square, rlhf, ends, total_kl = self._sum(torch.stack(sums)).tolist()
        self._note(mode, {
            "objective/score": score / count,
            "objective/score_std": max(square / count - (score / count) ** 2, 0.0) ** 0.5,
            "objective/rlhf_reward": rlhf / count,
            "completions/ended_by_eos": ends / count,
        })  # fmt: skip
        mean_kl = total_kl / count
        if kl is not None:
            self._note(mode, {"objective/kl": mean_kl, "objective/kl_coef": self.kl_coef})
        if mode != "train":
            return
        self.last_score = score / count
        self.last_kl = mean_kl if kl is not None else None
        self._stop_if_lost(mean_kl)
        if self.args.kl_target is not None:
            self.kl_coef = losses.adapted_coefficient(
                self.kl_coef, mean_kl, self.args.kl_target, int(count), self.args.kl_horizon
            )

    def _stop_if_lost(self, kl: float) -> None:
        where = self.step_label
        if not math.isfinite(kl):
            raise RunFailure(f"{where}: the KL to the reference is {kl}; lower learning_rate")
        if self.args.max_kl is not None and kl > self.args.max_kl:
            raise RunFailure(
                f"{where}: the KL to the reference is {kl:.1f} nats, above max_kl "
                f"{self.args.max_kl}; raise beta, lower learning_rate or raise max_kl"
            )

    def _old_policy(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of the rollout batch under the policy that sampled it; values too."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width = batch["completion_ids"].size(1)
        with torch.no_grad():
            return self._get_per_token_logps_and_entropies(
                self.model, ids, mask, width, batch_size=self.args.per_device_train_batch_size
            )[0]

    def _ended(self, completion_ids: Tensor, last: Tensor) -> Tensor:
        """Whether each row's last token ends a completion."""
        ends = torch.tensor(self.eos_token_ids, device=completion_ids.device)
        return torch.isin(completion_ids.gather(1, last[:, None]).squeeze(1), ends)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's rewards (rows of all processes, functions), kept for the advantages."""
        self._scores = super()._calculate_rewards(*args, **kwargs)
        return self._scores

    def _generate(self, prompts: list[Any]) -> Any:
        with self._timed("generate"):
            return super()._generate(prompts)

    # ---- 2. learn from minibatches ---------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The next micro-batch; every PPO epoch deals the rollout batch anew."""
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._step % self.args.steps_per_generation:
            return inputs
        window = self.args.gradient_accumulation_steps
        self._buffered_inputs = _dealt_anew(self._buffered_inputs, window)
        return self._buffered_inputs[0]

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Clipped policy loss plus `vf_coef` times the clipped value loss, means over tokens."""
        mode = "train" if self.model.training else "eval"
        beta, self.beta = self.beta, 0.0  # the KL penalty is in the reward, not in the loss
        try:
            policy_loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        values = self._take_values()
        mask = _sampled(inputs)
        errors, clipped = losses.value_errors(
            values, inputs["old_values"], inputs["returns"], self.args.cliprange_value
        )
        value_loss = (errors * mask).sum() / self._tokens_per_update(mode, inputs)
        # Over the tokens of a pass on average: then a PPO step's mean is that over its tokens,
        # however they are dealt out to passes and processes.
        passes = self.args.steps_per_generation if mode == "train" else 1
        count = inputs["num_items_in_batch"].clamp(min=1.0) / passes
        sums = torch.stack([(errors * mask).sum(), (clipped * mask).sum()]).detach()
        error, clips = (self._sum(sums) / count).tolist()
        self._note(mode, {"value/loss": error, "value/clip_fraction": clips})
        if self.critic_warms_up:
            policy_loss = 0.0 * policy_loss
        return policy_loss + self.args.vf_coef * value_loss

    def _tokens_per_update(self, mode: str, inputs: dict[str, Any]) -> Tensor:
        """Tokens of an update and process on average, as TRL's "dapo" loss counts them."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "eval":
            return tokens
        return tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """A forward and backward pass; raises RunFailure before a loss that is not finite acts."""
        with self._clock.phase("train"):
            return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with self._clock.phase("train"):
            return super()._clip_grad_norm(model)

    # ---- logging ---------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics and PPO's.

        Times are wall seconds since the last log; tokens a second are of whole PPO steps, prompts
        and completions of all processes together.
        """
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].pop("frac_reward_zero_std", None)  # groups of one tell nothing
        if mode == "train" and "loss" in logs:
            self._note(mode, {"ppo_step": self.ppo_step, "episodes": self.episodes})
            seconds = self._clock.since_last_log()
            self._note(mode, {f"time/{phase}": spent for phase, spent in seconds.items()})
            if self._step % self.args.micro_steps_per_rollout == 0:
                rate = self._clock.tokens_per_second(self.tokens)
                self._note(mode, {"tokens_per_second": rate} if rate is not None else {})
        super().log(logs, start_time)

    def _note(self, mode: str, figures: dict[str, float | None]) -> None:
        for name, figure in figures.items():
            self._metrics[mode][name].append(math.nan if figure is None else figure)

    def _timed(self, phase: str) -> AbstractContextManager[None]:
        """Times a part of the rollout; in evaluation it is not timed."""
        return self._clock.phase(phase) if self.model.training else nullcontext()

    def _sum(self, sums: Tensor) -> Tensor:
        """Sums over all processes."""
        return self.accelerator.reduce(sums, reduction="sum")


def _sampled(batch: dict[str, Any]) -> Tensor:
    """1.0 on completion tokens that the policy sampled, else 0.0."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).float()


def _dealt_anew(micro_batches: list[dict[str, Tensor]], window: int) -> list[dict[str, Tensor]]:
    """The same rows in micro-batches of the same size, in a fresh random order.

    Within a minibatch, which is `window` micro-batches whose gradients are summed, rows are sorted
    by length: that changes no update, and short rows are not computed at the width of long ones.
    """
    names = [name for name, column in micro_batches[0].items() if column.dim() > 0]
    columns = {name: torch.cat([batch[name] for batch in micro_batches]) for name in names}
    lengths = columns["prompt_mask"].sum(dim=1) + columns["completion_mask"].sum(dim=1)
    size = len(lengths) // len(micro_batches)
    order = torch.randperm(len(lengths)).to(lengths.device)
    hands = [hand[lengths[hand].argsort(stable=True)] for hand in order.split(size * window)]
    dealt = torch.cat(hands).split(size)
    return [
        {**batch, **{name: columns[name][rows] for name in names}}
        for batch, rows in zip(micro_batches, dealt, strict=True)
    ]
