"""A GRPOTrainer whose policy carries a critic: building it, optimising, saving and resuming it.

The plumbing under trainer.py, which holds the algorithm. Overrides call TRL's method and add to it;
tests/train/ppo/test_trl_contract.py pins the methods that they rely on.
"""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model, set_seed
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import AutoTokenizer, PreTrainedModel, ProcessorMixin
from trl.models import prepare_deepspeed
from trl.trainer.utils import disable_dropout_in_model

from selfcorrect.evaluate.prompts.dialogue import Style, read_style
from selfcorrect.evaluate.scoring.load_model import refuse_pickles
from selfcorrect.recipes.foundation.errors import InputError, reason_of
from selfcorrect.train.ppo import resume
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.critic import build_critic, critic_kind
from selfcorrect.train.ppo.forward import TokenOutputs, hidden_critic
from selfcorrect.train.ppo.on_policy import OnPolicyTrainer
from selfcorrect.train.ppo.reward_models import load_reward_model
from selfcorrect.train.ppo.rewards import RatersRule, Reward, RewardModelScorer, guarded
from selfcorrect.train.ppo.separate_clipping import SeparateClipping
from selfcorrect.train.trainers.callbacks import CompleteStates
from selfcorrect.train.trainers.epoch_sampler import EpochSampler

logger = logging.getLogger(__name__)


class ActorCriticTrainer(OnPolicyTrainer):
    """OnPolicyTrainer with a critic in the policy's forward pass; PPOTrainer adds the algorithm."""

    beta: float
    entropy_coef: float
    _entropy_window_stats: Tensor | None
    stage = "ppo"

    def __init__(self, model: Any, reward_funcs: Any, args: PPOConfig, **kwargs: Any) -> None:
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        path = model if isinstance(model, str) else model.config.name_or_path
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = AutoTokenizer.from_pretrained(
                path, padding_side="left", trust_remote_code=args.trust_remote_code
            )
        arguments, today = args.chat_template_kwargs or {}, date.today().isoformat()
        self.style = kwargs.pop("style", None) or read_style("auto", arguments, today)
        tokenizer = kwargs["processing_class"]
        rewards = [_as_reward(reward, tokenizer, args, self.style) for reward in rewards]
        try:
            with refuse_pickles(path):
                super().__init__(model, [guarded(reward) for reward in rewards], args, **kwargs)
        except ValueError as error:
            raise InputError(f"ppo: {reason_of(error)}") from error
        self._check_inputs()
        self._place_reward_models(rewards)

        self.critic_kind = critic_kind(args, self.model)
        set_seed(args.seed)  # every process must build the same critic
        with refuse_pickles(args.critic_path or path):
            self.critic = build_critic(self.critic_kind, self.model, args)
        if args.disable_dropout:
            disable_dropout_in_model(self.critic)  # the rest of its noise goes with the policy's
        if not self.is_deepspeed_enabled:
            self.critic.to(self.accelerator.device)
        set_seed(args.seed, device_specific=True)  # each process must sample other completions
        self._patch_models(self.critic)
        self.add_callback(CompleteStates())
        if self.is_deepspeed_enabled:
            self._separate_clipping = SeparateClipping(self.critic)
            self.add_callback(self._separate_clipping)

        self._has_critic_groups = False
        self.kl_coef = args.beta
        self.last_kl: float | None = None
        self.last_score: float | None = None

    def _record(self, metrics: Mapping[str, float | None]) -> None:
        """Add values to TRL's metrics, which are averaged at the next log."""
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(torch.nan if value is None else value)

    # ---- forward ---------------------------------------------------------------------------------

    def _policy_options(self) -> dict[str, Any]:
        return {"with_values": True, "detach_trunk": self.critic_warms_up}

    @property
    def critic_warms_up(self) -> bool:
        """Whether the critic alone learns at present."""
        step = self.state.global_step // self.args.updates_per_rollout
        return step < self.args.critic_warmup_steps

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Sample completions of tokenised prompts; raise InputError for one that does not fit."""
        config = self.language_model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        longest = max(len(ids) for ids in prompt_ids)
        if context is not None and longest + self.max_completion_length > context:
            raise InputError(
                f"ppo: a prompt of {longest} tokens and max_completion_length "
                f"{self.max_completion_length} exceed the model's context of {context}; "
                "shorten the prompts or lower max_completion_length"
            )
        if not all(prompt_ids):
            raise InputError("ppo: a prompt has no tokens; leave empty prompts out")
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        # vLLM would copy the critic's weights too; under ZeRO-3 the critic must stay.
        with hidden_critic(self.language_model) if self.use_vllm else nullcontext():
            return super()._generate(prompts)

    # ---- TRL's optional terms of the policy loss -------------------------------------------------

    def _policy_weights(
        self, inputs: dict[str, Any], outputs: TokenOutputs, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mask of the tokens that the policy learns from, and their weights.

        Both are `mask` unless one of TRL's settings is on: `top_entropy_quantile`,
        `off_policy_mask_threshold`, or importance ratios for completions sampled by vLLM.
        """
        if self.top_entropy_quantile < 1.0:
            quantile = 1 - self.top_entropy_quantile
            active = mask * self.get_high_entropy_mask(outputs.entropies, mask, quantile)
        else:
            active = mask
        weights = active
        if self.off_policy_mask_threshold is not None:
            old_log_probs = inputs["old_per_token_logps"]
            weights = weights * self.get_off_policy_mask(
                advantages=inputs["advantages"],
                per_token_logps=outputs.log_probs,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_log_probs),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            weights = weights * inputs["importance_sampling_ratio"]
        return active, weights

    def _add_optional_terms(self, loss: Tensor, outputs: TokenOutputs, active: Tensor) -> Tensor:
        """Subtract TRL's entropy bonus and add the experts' balancing loss, if these are on."""
        if self._entropy_bonus_enabled:
            mean_loss = self.accelerator.gather(loss.detach()).nanmean().item()
            self._record({"policy_loss": mean_loss})
            loss = loss - self._entropy_bonus(outputs.entropies, active)
        if self.aux_loss_enabled:
            aux_loss = outputs.aux_loss
            loss = loss + self.router_aux_loss_coef * aux_loss / self._accumulation
            mean_loss = self.accelerator.gather_for_metrics(aux_loss).mean().item()
            self._record({"aux_loss": mean_loss})
        return loss

    def _entropy_bonus(self, entropies: Tensor, active: Tensor) -> Tensor:
        """Return `entropy_coef` times the mean entropy; adapt the coefficient if TRL is asked to.

        The adapted coefficient acts only while the last update's entropy is below its target.
        """
        is_training = self._mode == "train"
        sums = torch.stack([(entropies * active).sum(), active.sum()])
        mean = sums[0] / sums[1].clamp(min=1.0) / self._accumulation
        coefficient = self.entropy_coef
        if self.use_adaptive_entropy:
            if self._last_world_entropy > self.args.entropy_target:
                coefficient = 0.0
            if is_training:
                self._adapt_entropy_coefficient(sums.detach())
        if is_training and self.accelerator.sync_gradients:
            self._record({"entropy_coef": self.entropy_coef})
        return coefficient * mean

    def _adapt_entropy_coefficient(self, sums: Tensor) -> None:
        """Move TRL's coefficient by a step at the end of an update; `sums` are a micro-batch's."""
        window = self._entropy_window_stats
        self._entropy_window_stats = sums if window is None else window + sums
        if not self.accelerator.sync_gradients:
            return
        total, count = self._sum(self._entropy_window_stats)
        self._entropy_window_stats = None
        self._last_world_entropy = (total / count.clamp(min=1.0)).item()
        args = self.args
        if self._last_world_entropy <= args.entropy_target:
            raised = self.entropy_coef + args.entropy_coef_delta
            self.entropy_coef = min(raised, args.entropy_coef_max)
        else:
            lowered = self.entropy_coef - args.entropy_coef_delta
            self.entropy_coef = max(lowered, args.entropy_coef_min)

    @property
    def _accumulation(self) -> float:
        """Micro-batches whose gradients add up to an update; 1 in evaluation."""
        return self.current_gradient_accumulation_steps if self._mode == "train" else 1.0

    # ---- optimise --------------------------------------------------------------------------------

    @property
    def _wants_two_rates(self) -> bool:
        return self.args.critic_learning_rate not in (None, self.args.learning_rate)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create transformers' optimizer, with groups of the critic's parameters where needed.

        They have the critic's learning rate, or are clipped by DeepSpeed.
        """
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        needs_groups = self._wants_two_rates or self.is_deepspeed_enabled
        if not needs_groups or self._has_critic_groups:
            return optimizer
        if is_given and self._wants_two_rates:
            raise InputError(
                "ppo: critic_learning_rate cannot be used with an optimizer passed to the trainer; "
                "remove one of the two"
            )
        of_critic = {"lr": self.args.critic_learning_rate} if self._wants_two_rates else {}
        # accelerate's DummyOptim, which is there only beside DeepSpeed
        if type(optimizer).__name__ == "DummyOptim":  # DeepSpeed makes the one of its JSON
            optimizer.params = self._split_group({"params": optimizer.params})
        else:
            groups = [self._split_group(group, **of_critic) for group in optimizer.param_groups]
            optimizer.param_groups[:] = chain.from_iterable(groups)
        self._has_critic_groups = True
        return optimizer

    def _split_group(self, group: dict[str, Any], **of_critic: Any) -> list[dict[str, Any]]:
        """Return the group's parameters of the policy, and those of the critic with settings."""
        critic = {id(p) for p in self.critic.parameters()}
        policy_part = [p for p in group["params"] if id(p) not in critic]
        critic_part = [p for p in group["params"] if id(p) in critic]
        parts = [{**group, "params": policy_part}, {**group, "params": critic_part, **of_critic}]
        return [part for part in parts if part["params"]]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip policy and critic separately, so that neither gradient shrinks the other."""
        if self.is_fsdp_enabled:  # jointly: `_check_inputs` warns of it
            return super()._clip_grad_norm(model)
        if self.is_deepspeed_enabled:  # it has clipped already
            norm, critic_norm = self._separate_clipping.norms()
            self._record({"value/grad_norm": critic_norm})
            return norm
        critic = [p for p in self.critic.parameters() if p.requires_grad]
        critic_ids = {id(p) for p in critic}
        policy = [p for p in model.parameters() if p.requires_grad and id(p) not in critic_ids]
        norm = self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)  # unscales both
        critic_norm = nn.utils.clip_grad_norm_(critic, self.args.max_grad_norm)
        self.check_gradient(norm)
        self.check_gradient(critic_norm)
        self._record({"value/grad_norm": float(critic_norm)})
        return norm

    # ---- save and resume -------------------------------------------------------------------------

    def save_policy(self, folder: str | Path) -> None:
        """Save the policy and its tokenizer for `from_pretrained`, without the critic.

        A policy that trains an adapter is saved as the adapter. Call this on every process.
        """
        state = None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            gathered = self.accelerator.get_state_dict(self.model_wrapped)
            state = resume.without_critic(gathered or {})
        if not self.args.should_save:
            return
        policy = self.accelerator.unwrap_model(self.model)
        only = {"selected_adapters": ["default"]} if is_peft_model(policy) else {}
        with hidden_critic(self.language_model), self.given_settings():
            policy.save_pretrained(str(folder), state_dict=state, **only)
        self.processing_class.save_pretrained(str(folder))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        critic = resume.critic_tensors(self.critic, state_dict)
        if state_dict is not None:
            state_dict = resume.without_critic(state_dict)
        with hidden_critic(self.language_model):
            super()._save(folder, state_dict)
        if self.args.should_save and critic:
            resume.save_critic(Path(folder), critic)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Before transformers deletes older checkpoints: a kill must always leave an intact one.
        super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir)
        if self._step % self.args.micro_steps_per_rollout:
            rank = self.accelerator.process_index
            resume.save_rollout(folder, rank, self._buffered_inputs)
        if self.args.should_save:
            resume.save_state(folder, {
                "micro_step": self._step, "kl_coef": self.kl_coef,
                "last_kl": self.last_kl, "last_score": self.last_score,
            })  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        resume.check_intact(Path(resume_from_checkpoint))
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        with hidden_critic(self.language_model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        resume.load_critic(Path(resume_from_checkpoint), self.critic)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        accumulation = self.args.gradient_accumulation_steps
        state = resume.load_state(Path(checkpoint), self.state.global_step, accumulation)
        self._step, self.kl_coef = state["micro_step"], state["kl_coef"]
        self.last_kl, self.last_score = state["last_kl"], state["last_score"]
        if self._step % self.args.micro_steps_per_rollout:
            rank, steps = self.accelerator.process_index, self.args.steps_per_generation
            device = self.accelerator.device
            self._buffered_inputs = resume.load_rollout(Path(checkpoint), rank, steps, device)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return EpochSampler(super()._get_train_sampler(dataset))

    # ---- check and place inputs ------------------------------------------------------------------

    def _check_inputs(self) -> None:
        if isinstance(self.processing_class, ProcessorMixin):
            raise InputError("ppo: models with images are not supported; give a text model")
        if self._tokenizer.eos_token_id is None:
            raise InputError("ppo: the tokenizer has no end token; set eos_token")
        columns = getattr(self.train_dataset, "column_names", None)
        if columns and "prompt" not in columns and self.environment_factories is None:
            raise InputError(
                f"ppo: the prompt set has no column prompt, only {', '.join(columns)}; rename one"
            )
        needed = self.args.generation_batch_size // self.args.num_generations
        prompts = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else needed
        if prompts < needed:
            raise InputError(
                f"ppo: {prompts} prompts are too few for a rollout batch of {needed}; add "
                "prompts, or lower per_device_train_batch_size or steps_per_generation"
            )
        if self.is_fsdp_enabled and self.args.max_grad_norm:
            logger.warning(
                "ppo: FSDP clips the gradients of policy and critic jointly, unlike one process, "
                "DDP and DeepSpeed; set max_grad_norm: 0 to compare runs"
            )
        plugin = self.accelerator.state.deepspeed_plugin
        if self._wants_two_rates and plugin is not None and "optimizer" in plugin.deepspeed_config:
            raise InputError(  # transformers would not call create_optimizer
                "ppo: critic_learning_rate cannot be used with an optimizer in the DeepSpeed JSON; "
                "remove one of the two"
            )

    def _place_reward_models(self, rewards: list[Any]) -> None:
        for reward in rewards:
            if isinstance(reward, RewardModelScorer | RatersRule):
                reward.end_ids.update(self.eos_token_ids)
            if not isinstance(reward, RewardModelScorer):
                continue
            if self.is_deepspeed_enabled:
                reward.model = prepare_deepspeed(reward.model, self.accelerator)
            else:
                reward.model.to(self.accelerator.device)


def _as_reward(reward: Any, tokenizer: Any, args: PPOConfig, style: Style) -> Reward:
    """Return a reward function; wrap a classifier, or a folder of one, in a RewardModelScorer."""
    if not isinstance(reward, str | Path | PreTrainedModel):
        return reward
    path = reward.config.name_or_path if isinstance(reward, PreTrainedModel) else str(reward)
    model = reward if isinstance(reward, PreTrainedModel) else load_reward_model(path)
    reward_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    return RewardModelScorer(model, reward_tokenizer, tokenizer, style, name=Path(path).name)
