"""Proximal policy optimisation of a language model against rewards, on TRL's GRPOTrainer.

TRL samples, distributes, logs and saves. PPO's part is below, in the order of a step: sample a
rollout batch, turn scores into advantages, minimise the clipped losses over minibatches.
on_policy.py samples and scores, actor_critic.py holds the plumbing, losses.py the arithmetic.

```mermaid
sequenceDiagram
    participant T as TRL and transformers
    participant P as PPOTrainer
    participant L as losses.py
    loop each micro-batch
        T->>P: training_step, _prepare_inputs
        P->>T: GRPOTrainer._prepare_inputs
        opt start of a PPO step
            T->>P: _generate_and_score_completions
            P->>T: GRPOTrainer._generate_and_score_completions
            Note over T: sample completions
            T->>P: _get_per_token_logps_and_entropies (policy, then reference)
            T->>P: _calculate_rewards
            T-->>P: rollout batch
            P->>L: shaped_score, kl_per_token, advantages_and_returns, whiten
            P-->>T: rollout batch with old values, returns and advantages
        end
        Note over P: reshuffle the rows at the start of each epoch
        P-->>T: micro-batch
        T->>P: _compute_loss
        Note over P: _forward_completions gives log-probabilities and values
        P->>L: clipped_policy_loss, clipped_value_loss
        P-->>T: policy loss + vf_coef * value loss
        Note over T: backward
        opt last micro-batch of a minibatch
            T->>P: _clip_grad_norm (policy and critic apart)
            Note over T: optimizer update
        end
    end
```
"""

import html
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.integrations import TensorBoardCallback
from trl.trainer.utils import nanmax, nanmin

from selfcorrect.recipes.foundation.errors import RunFailure
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.train.ppo import losses
from selfcorrect.train.ppo.actor_critic import ActorCriticTrainer
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.forward import TokenOutputs
from selfcorrect.train.ppo.timing import PhaseTimer

# Columns of a rollout batch that `_compute_loss` reads, besides advantages and returns.
KEPT_COLUMNS = (
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch",
    "old_per_token_logps", "importance_sampling_ratio", "sampling_per_token_logps", "tool_mask",
    "old_values",
)  # fmt: skip


class PPOTrainer(ActorCriticTrainer):
    """GRPOTrainer with a critic, generalised advantages and a KL penalty in the reward.

    It takes what GRPOTrainer takes. `args` is a PPOConfig. Rewards are functions of TRL's
    signature, or sequence classifiers (objects or folders), which `RewardModelScorer` then scores.
    A model made in memory must be saved first: the reference is read from
    `model.config.name_or_path`.

    Raises InputError if settings and models do not fit, RunFailure if a reward, the loss or the KL
    is not finite, or if the KL exceeds `max_kl`.
    """

    _tag_names: ClassVar = ["trl", "ppo"]
    _name = "PPO"
    _paper: ClassVar = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    def __init__(self, model: Any, reward_funcs: Any, args: PPOConfig, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, **kwargs)
        # `values` (rows, tokens) of this process and `scores` (rows, reward functions) of all. TRL
        # calls the two methods that compute them while it makes a rollout batch, which has no room
        # for them: `_sample_rollout` clears this, has TRL fill it, and moves it into the batch.
        self._handover: dict[str, Tensor] = {}
        self._timer = PhaseTimer()
        self.add_callback(self._timer)

    # ---- progress --------------------------------------------------------------------------------

    @property
    def ppo_step(self) -> int:
        """Finished PPO steps: rollout batches whose last optimizer update is done."""
        return self.state.global_step // self.args.updates_per_rollout

    @property
    def step_label(self) -> str:
        """Current PPO step, for messages."""
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
        """Return TRL's rollout batch with old values, returns and per-token advantages."""
        with self._timed("score"):
            batch = self._sample_rollout(inputs)
            mask = _sampled_mask(batch)
            if self.beta:
                policy, reference = batch["old_per_token_logps"], batch["ref_per_token_logps"]
                self._check_reference(policy, reference, mask)
            ended = self._ended(batch["completion_ids"], mask)
            kl_rewards, kl = self._kl_rewards(batch, mask)
            rewards = self._add_scores(kl_rewards, batch["scores"], ended, mask)
            mean_kl, episodes = self._log_rollout(batch["scores"], rewards, kl, ended)
            self._add_to_completions(batch["scores"], kl)
            if self._mode == "train":
                self._control_kl(mean_kl, episodes)
            trusted = _trusted_mask(batch, mask)
            advantages, returns = self._advantages(rewards, batch["old_values"], mask, trusted)
            kept = {name: batch[name] for name in KEPT_COLUMNS if name in batch}
            return {**kept, "advantages": advantages, "returns": returns}

    def _sample_rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's rollout batch with `old_values` (rows, tokens) and raw `scores` (rows,)."""
        self._handover.clear()
        batch = super()._generate_and_score_completions(inputs)
        if "values" not in self._handover:  # TRL skips the policy's pass if every ratio will be 1
            with torch.no_grad():
                size = self.args.per_device_train_batch_size
                outputs = self._forward_batch(self.model, batch, batch_size=size)
            batch["old_per_token_logps"], batch["old_values"] = outputs.log_probs, outputs.values
        else:
            batch["old_values"] = self._handover.pop("values")
        scores = self._handover.pop("scores")
        scores = (scores * self.reward_weights.to(scores.device)).sum(dim=1)
        start = self.accelerator.process_index * len(inputs)
        batch["scores"] = scores[start : start + len(inputs)]
        return batch

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Run TRL's passes over a rollout batch, and hand the policy's values to that batch."""
        outputs = self._forward_completions(model, *args, **kwargs)
        if outputs.values is not None:
            self._handover["values"] = outputs.values
        return outputs.log_probs, outputs.entropies, outputs.aux_loss

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return TRL's rewards (rows of all processes, functions), and hand them to the batch."""
        self._handover["scores"] = super()._calculate_rewards(*args, **kwargs)
        return self._handover["scores"]

    def _generate(self, prompts: list[Any]) -> Any:
        with self._timed("generate"):
            return super()._generate(prompts)

    def _ended(self, completion_ids: Tensor, mask: Tensor) -> Tensor:
        """Return whether each row's last sampled token is an end token."""
        end_ids = torch.tensor(self.eos_token_ids, device=completion_ids.device)
        last_ids = completion_ids.gather(1, losses.last_sampled(mask)[:, None]).squeeze(1)
        return torch.isin(last_ids, end_ids)

    def _kl_rewards(self, batch: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the KL penalty as rewards (rows, tokens), and each completion's KL (rows,)."""
        policy = batch["old_per_token_logps"].float()
        if self.beta == 0:
            return torch.zeros_like(policy), None
        reference = batch["ref_per_token_logps"].float()
        kl = losses.kl_per_token(policy, reference, self.args.kl_estimator)
        return -self.kl_coef * kl * mask, ((policy - reference) * mask).sum(dim=1)

    def _add_scores(self, rewards: Tensor, scores: Tensor, ended: Tensor, mask: Tensor) -> Tensor:
        """Add each row's shaped score to the reward of its last sampled token."""
        args = self.args
        shaped = losses.shaped_score(
            scores, ended, args.score_shift, args.score_scale, args.score_clip,
            args.missing_eos_penalty,
        )  # fmt: skip
        rows = torch.arange(len(rewards), device=rewards.device)
        rewards[rows, losses.last_sampled(mask)] += shaped * mask.any(dim=1)
        return rewards

    def _control_kl(self, kl: float, episodes: int) -> None:
        """Raise RunFailure if the KL is not finite or above `max_kl`; adapt its coefficient."""
        if not math.isfinite(kl):
            raise RunFailure(
                f"{self.step_label}: the KL to the reference is {kl}; lower learning_rate"
            )
        if self.args.max_kl is not None and kl > self.args.max_kl:
            raise RunFailure(
                f"{self.step_label}: the KL to the reference is {kl:.1f} nats, above max_kl "
                f"{self.args.max_kl}; raise beta, lower learning_rate or raise max_kl"
            )
        if self.args.kl_target is not None:
            self.kl_coef = losses.adapted_coefficient(
                self.kl_coef, kl, self.args.kl_target, episodes, self.args.kl_horizon
            )

    def _advantages(
        self, rewards: Tensor, values: Tensor, mask: Tensor, trusted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and returns (rows, tokens), whitened as the settings say.

        Advantages are whitened over the tokens that are learned from, `trusted`.
        """
        args = self.args
        if args.whiten_rewards:
            rewards = losses.whiten(rewards, mask, self._sum, keep_mean=True)
        advantages, returns = losses.advantages_and_returns(
            rewards, values, mask, args.gamma, args.lam
        )
        explained = losses.explained_variance(values, returns, mask, self._sum)
        self._record({"value/explained_variance": explained})
        if args.whiten_advantages:
            advantages = losses.whiten(advantages, trusted, self._sum)
        return advantages, returns

    # ---- 2. learn from minibatches ---------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Return the next micro-batch; reshuffle the rollout batch at the start of each epoch."""
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._step % self.args.steps_per_generation:
            return inputs
        accumulation = self.args.gradient_accumulation_steps
        self._buffered_inputs = _reshuffled(self._buffered_inputs, accumulation)
        return self._buffered_inputs[0]

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the clipped policy loss plus `vf_coef` times the clipped value loss.

        Each is a mean over the tokens of an update, of which `inputs` are one micro-batch.
        """
        mask = _sampled_mask(inputs)
        outputs = self._forward_batch(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        self._check_ratio(outputs.log_probs, inputs["old_per_token_logps"], mask)
        policy_errors, clipped_low, clipped_high = losses.clipped_policy_loss(
            outputs.log_probs, inputs["old_per_token_logps"], inputs["advantages"], mask,
            self.epsilon_low, self.epsilon_high, self.args.delta,
        )  # fmt: skip
        trusted = _trusted_mask(inputs, mask)
        value_errors, clipped_values = losses.clipped_value_loss(
            outputs.values, inputs["old_values"], inputs["returns"], trusted,
            self.args.cliprange_value,
        )  # fmt: skip
        active, weights = self._policy_weights(inputs, outputs, mask)
        tokens = self._tokens_per_update(inputs)
        policy_loss = (policy_errors * weights).sum() / tokens
        value_loss = value_errors.sum() / tokens

        policy_loss = self._add_optional_terms(policy_loss, outputs, active)
        if self.critic_warms_up:
            policy_loss = 0.0 * policy_loss
        self._log_policy(outputs.entropies, clipped_low, clipped_high, mask)
        self._log_values(value_errors, clipped_values, inputs)
        return policy_loss + self.args.vf_coef * value_loss

    def _forward_batch(self, model: Any, batch: dict[str, Any], **options: Any) -> TokenOutputs:
        """Run policy and critic over the rows of a rollout batch or micro-batch."""
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        num_columns = batch["completion_ids"].size(1)
        return self._forward_completions(model, input_ids, attention_mask, num_columns, **options)

    def _tokens_per_update(self, inputs: dict[str, Any]) -> Tensor:
        """Return the average number of tokens per update and process, as TRL's "dapo" loss."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self._mode == "eval":
            return tokens
        return tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run a forward and backward pass; raise RunFailure if the loss is not finite."""
        with self._timer.phase("train"):
            return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with self._timer.phase("train"):
            return super()._clip_grad_norm(model)

    # ---- logging ---------------------------------------------------------------------------------

    def _log_rollout(
        self, scores: Tensor, rewards: Tensor, kl: Tensor | None, ended: Tensor
    ) -> tuple[float, int]:
        """Record metrics of a rollout batch; return its mean KL and size over all processes."""
        count = torch.tensor(float(len(scores)), device=scores.device)
        sums = [count, scores.sum(), scores.square().sum(), rewards.sum(), ended.float().sum()]
        sums.append(kl.sum() if kl is not None else torch.zeros_like(count))
        count, score, square, reward, ends, total_kl = self._sum(torch.stack(sums)).tolist()
        mean_score, mean_kl = score / count, total_kl / count
        self._record({
            "objective/score": mean_score,
            "objective/score_std": max(square / count - mean_score**2, 0.0) ** 0.5,
            "objective/rlhf_reward": reward / count,
            "completions/ended_by_eos": ends / count,
        })  # fmt: skip
        if kl is not None:
            self._record({"objective/kl": mean_kl, "objective/kl_coef": self.kl_coef})
        if self._mode == "train":
            self.last_score = mean_score
            self.last_kl = mean_kl if kl is not None else None
        return mean_kl, int(count)

    def _add_to_completions(self, scores: Tensor, kl: Tensor | None) -> None:
        """Add each completion's score and KL to TRL's table of completions (`log_completions`)."""
        columns = {"score": scores, **({} if kl is None else {"kl": kl})}
        for name, values in columns.items():
            self._logs["extra"][name].extend(self.accelerator.gather(values).tolist())

    def _completions_to_tensorboard(self) -> None:
        """Write the table of completions as text, which TRL does for other services."""
        writers = [
            callback.tb_writer
            for callback in self.callback_handler.callbacks
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None
        ]
        if not (writers and self.log_completions and self._logs["prompt"]):
            return
        columns = {
            "prompt": self._logs["prompt"],
            "completion": self._logs["completion"],
            **self._logs["rewards"],
            **self._logs["extra"],
        }
        lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=False)]
        text = "\n".join(f"| {' | '.join(map(_table_entry, line))} |" for line in lines)
        for writer in writers:
            writer.add_text("completions", text, self.state.global_step)

    def _log_policy(
        self, entropies: Tensor, clipped_low: Tensor, clipped_high: Tensor, mask: Tensor
    ) -> None:
        """Record entropy and clip fractions of a micro-batch under TRL's names."""
        clipped = clipped_low + clipped_high
        sums = [entropies * mask, clipped_low, clipped_high, clipped, mask]
        *sums, count = self._sum(torch.stack([each.sum() for each in sums]).detach())
        entropy, low, high, region = (torch.stack(sums) / count.clamp(min=1.0)).tolist()
        of_rows = torch.stack([clipped_low, clipped_high]).sum(-1) / mask.sum(-1)
        low_of_rows, high_of_rows = self.accelerator.gather(of_rows.T).T
        self._record({
            "entropy": entropy,
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": region,
            "clip_ratio/low_min": nanmin(low_of_rows).item(),
            "clip_ratio/high_max": nanmax(high_of_rows).item(),
        })  # fmt: skip

    def _log_values(
        self, value_errors: Tensor, clipped_values: Tensor, inputs: dict[str, Any]
    ) -> None:
        """Record value loss and clip fraction of a micro-batch.

        The divisor is the average number of tokens per micro-batch, so that the mean over a PPO
        step is the mean over its tokens, however they are split into micro-batches and processes.
        """
        passes = self.args.steps_per_generation if self._mode == "train" else 1
        count = inputs["num_items_in_batch"].clamp(min=1.0) / passes
        sums = torch.stack([value_errors.sum(), clipped_values.sum()]).detach()
        loss, clip_fraction = (self._sum(sums) / count).tolist()
        self._record({"value/loss": loss, "value/clip_fraction": clip_fraction})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics and PPO's.

        Times are wall seconds since the last log. Tokens per second are those of complete PPO
        steps: prompts and completions of all processes together.
        """
        self._metrics[self._mode].pop("frac_reward_zero_std", None)  # groups have one row
        if self._mode == "train" and "loss" in logs:
            self._record({"ppo_step": self.ppo_step, "episodes": self.episodes})
            seconds = self._timer.since_last_log()
            self._record({f"time/{phase}": spent for phase, spent in seconds.items()})
            if self._step % self.args.micro_steps_per_rollout == 0:
                rate = self._timer.tokens_per_second(self.tokens)
                self._record({"tokens_per_second": rate} if rate is not None else {})
        super().log(logs, start_time)
        if self._mode == "train" and "loss" in logs:
            self._completions_to_tensorboard()

    def _timed(self, phase: str) -> AbstractContextManager[None]:
        """Time a part of the rollout, in training only."""
        return self._timer.phase(phase) if self.model.training else nullcontext()


def _table_entry(value: Any) -> str:
    """Return a value for a Markdown table, in which no text of a model is markup."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else _text_of_messages(value)
    return html.escape(escape_controls(text)).replace("|", "&#124;").replace("\n", "<br>")


def _text_of_messages(messages: Any) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _sampled_mask(batch: dict[str, Any]) -> Tensor:
    """Return 1.0 on completion tokens that the policy sampled, else 0.0."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).float()


def _trusted_mask(batch: dict[str, Any], mask: Tensor) -> Tensor:
    """Return `mask` without the tokens that TRL's importance sampling drops (ratio 0).

    vLLM drew them from another distribution than the policy's: what came of them says nothing of
    the policy's returns, so the critic does not learn from them either.
    """
    if "importance_sampling_ratio" not in batch:
        return mask
    return mask * (batch["importance_sampling_ratio"] > 0)


def _reshuffled(
    micro_batches: list[dict[str, Tensor]], accumulation: int
) -> list[dict[str, Tensor]]:
    """Return the same rows in micro-batches of the same size, in a new random order.

    A minibatch is `accumulation` micro-batches whose gradients are summed. Its rows are sorted by
    length: that changes no update, and short rows are not padded to the length of long ones.
    """
    names = [name for name, column in micro_batches[0].items() if column.dim() > 0]
    columns = {name: torch.cat([batch[name] for batch in micro_batches]) for name in names}
    lengths = columns["prompt_mask"].sum(dim=1) + columns["completion_mask"].sum(dim=1)
    size = len(lengths) // len(micro_batches)
    minibatches = torch.randperm(len(lengths)).to(lengths.device).split(size * accumulation)
    order = torch.cat([rows[lengths[rows].argsort(stable=True)] for rows in minibatches])
    return [
        {**batch, **{name: columns[name][rows] for name in names}}
        for batch, rows in zip(micro_batches, order.split(size), strict=True)
    ]
