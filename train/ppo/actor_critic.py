"""A GRPOTrainer whose policy carries a critic: building it, optimising, saving and resuming it.

The plumbing under trainer.py, which holds the algorithm. Overrides call TRL's method and add to it;
tests/train/ppo/test_trl_contract.py pins the methods that are relied on.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model, set_seed
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import AutoTokenizer, PreTrainedModel, ProcessorMixin
from trl import GRPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import disable_dropout_in_model

from selfcorrect.evaluate.scoring.load_model import refuse_pickles
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.train.ppo import resume
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.critic import (
    build_critic,
    critic_kind,
    language_model_of,
    load_reward_model,
)
from selfcorrect.train.ppo.forward import CompletionPass, attach, hidden_critic
from selfcorrect.train.ppo.limits import rows_per_pass
from selfcorrect.train.ppo.rewards import Reward, RewardModelScorer, guarded
from selfcorrect.train.trainers.callbacks import CompleteStates
from selfcorrect.train.trainers.guarded import GuardedTrainer


class ActorCriticTrainer(GRPOTrainer, GuardedTrainer):
    """GRPOTrainer with a critic in the policy's forward pass; a subclass says what they learn."""

    args: PPOConfig
    beta: float
    stage = "ppo"

    def __init__(self, model: Any, reward_funcs: Any, args: PPOConfig, **kwargs: Any) -> None:
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        path = model if isinstance(model, str) else model.config.name_or_path
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = AutoTokenizer.from_pretrained(
                path, padding_side="left", trust_remote_code=args.trust_remote_code
            )
        rewards = [_as_reward(reward, kwargs["processing_class"], args) for reward in rewards]
        try:
            with refuse_pickles(path):
                super().__init__(model, [guarded(reward) for reward in rewards], args, **kwargs)
        except ValueError as error:
            raise InputError(f"ppo: {str(error).splitlines()[0]}") from error
        self._check_inputs()
        self._place_reward_models(rewards)

        self.language_model = language_model_of(self.accelerator.unwrap_model(self.model))
        self._num_weights = self.language_model.num_parameters(exclude_embeddings=True)
        tuned = (m for m in self.language_model.modules() if isinstance(m, BaseTunerLayer))
        self._tuned_layer = next(tuned, None)
        self.critic_kind = critic_kind(args, self.model)
        set_seed(args.seed)  # every process must build the same critic
        with refuse_pickles(args.critic_path or path):
            self.critic = build_critic(self.critic_kind, self.model, args)
        if args.disable_dropout:
            disable_dropout_in_model(self.critic)
        if not self.is_deepspeed_enabled:
            self.critic.to(self.accelerator.device)
        set_seed(args.seed, device_specific=True)  # and sample completions of its own
        attach(self.language_model, self.critic)
        if self.ref_model is not None:
            attach(self.accelerator.unwrap_model(self.ref_model), None)

        self.add_callback(CompleteStates())

        self._values: Tensor | None = None  # of the newest pass of the policy
        self._has_two_rates = False
        self.kl_coef = args.beta
        self.last_kl: float | None = None
        self.last_score: float | None = None

    # ---- forward ---------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """TRL's log-probabilities, computed on real tokens at true positions; values kept aside."""
        of_policy = not (model is self.ref_model or self._adapter_is_reference())
        call: dict[str, Any] = {"with_values": True} if of_policy else {}
        if of_policy and self.critic_warms_up:
            call["detach_trunk"] = True
        if self._passes_are_split and not kwargs.get("compute_aux_loss"):
            most = kwargs.get("batch_size") or len(input_ids)
            tokens_a_row = attention_mask.sum().item() / len(attention_mask)
            rows = rows_per_pass(self._num_weights, tokens_a_row, self.args.gradient_checkpointing)
            kwargs["batch_size"] = min(most, rows)
        scoring = CompletionPass(model, logits_to_keep, **call)
        order = attention_mask.sum(dim=1).argsort(stable=True)  # batches of like length
        back = order.argsort()
        log_probs, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            scoring, input_ids[order], attention_mask[order], logits_to_keep, *args, **kwargs
        )
        if of_policy:
            self._values = torch.cat(scoring.values)[back]
        return log_probs[back], entropies[back] if entropies is not None else None, aux_loss

    @property
    def _passes_are_split(self) -> bool:
        """Whether a few rows of like length share a forward pass, and others have their own."""
        return self.accelerator.device.type == "cpu" and self.accelerator.num_processes == 1

    def _take_values(self) -> Tensor | None:
        """Values (rows, tokens) of the policy's newest pass, handed out once."""
        values, self._values = self._values, None
        return None if values is None else values.float()

    @property
    def critic_warms_up(self) -> bool:
        """Whether the critic alone learns at present."""
        step = self.state.global_step // self.args.updates_per_rollout
        return step < self.args.critic_warmup_steps

    def _adapter_is_reference(self) -> bool:
        layer = self._tuned_layer
        return layer is not None and (layer.disable_adapters or "ref" in layer.active_adapters)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Completions of tokenised prompts; raises InputError for an empty or too long one."""
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
        # vLLM takes the weights of every parameter it finds; ZeRO-3 needs the critic to stay.
        with hidden_critic(self.language_model) if self.use_vllm else nullcontext():
            return super()._generate(prompts)

    # ---- optimise --------------------------------------------------------------------------------

    @property
    def _wants_two_rates(self) -> bool:
        return self.args.critic_learning_rate not in (None, self.args.learning_rate)

    def create_optimizer(self, model: Any = None) -> Any:
        """transformers' optimizer, in which the critic may have a learning rate of its own."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not self._wants_two_rates or self._has_two_rates:
            return optimizer
        if given:
            raise InputError(
                "ppo: critic_learning_rate cannot be used with an optimizer given from outside; "
                "remove one of the two"
            )
        rate = self.args.critic_learning_rate
        groups = []
        critic = {id(p) for p in self.critic.parameters()}
        for group in optimizer.param_groups:
            of_policy = [p for p in group["params"] if id(p) not in critic]
            of_critic = [p for p in group["params"] if id(p) in critic]
            groups += [{**group, "params": of_policy}, {**group, "params": of_critic, "lr": rate}]
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
        self._has_two_rates = True
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip policy and critic apart, so that neither's gradient shrinks the other's."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._clip_grad_norm(model)
        critic = [p for p in self.critic.parameters() if p.requires_grad]
        known = {id(p) for p in critic}
        policy = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        norm = self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)  # unscales both
        critic_norm = nn.utils.clip_grad_norm_(critic, self.args.max_grad_norm)
        self.check_gradient(norm)
        self.check_gradient(critic_norm)
        self._metrics["train"]["value/grad_norm"].append(float(critic_norm))
        return norm

    # ---- save and resume -------------------------------------------------------------------------

    def save_policy(self, folder: str | Path) -> None:
        """Save the policy alone, with its tokenizer, as `from_pretrained` reads it: no critic.

        A policy that trains an adapter is saved as the adapter. Call it on every process.
        """
        state = None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            whole = self.accelerator.get_state_dict(self.model_wrapped)
            state = {n: t for n, t in (whole or {}).items() if not resume.is_critic_name(n)}
        if not self.args.should_save:
            return
        policy = self.accelerator.unwrap_model(self.model)
        only = {"selected_adapters": ["default"]} if is_peft_model(policy) else {}
        with hidden_critic(self.language_model):
            policy.save_pretrained(str(folder), state_dict=state, **only)
        self.processing_class.save_pretrained(str(folder))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        critic = resume.critic_tensors(self.critic, state_dict)
        if state_dict is not None:
            state_dict = {n: t for n, t in state_dict.items() if not resume.is_critic_name(n)}
        with hidden_critic(self.language_model):
            super()._save(folder, state_dict)
        if self.args.should_save and critic:
            resume.save_critic(Path(folder), critic)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Before transformers deletes older checkpoints: a kill must always leave a whole one.
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
        resume.check(Path(resume_from_checkpoint))
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

    # ---- check and place -------------------------------------------------------------------------

    def _check_inputs(self) -> None:
        if isinstance(self.processing_class, ProcessorMixin):
            raise InputError("ppo: models with images are not supported; give a text model")
        if self._tokenizer.eos_token_id is None:
            raise InputError("ppo: the tokenizer has no end token; set eos_token")
        columns = getattr(self.train_dataset, "column_names", None)
        if columns and "prompt" not in columns and self.environment_factories is None:
            raise InputError(f"ppo: the prompt set has no column prompt, only {', '.join(columns)}")
        unique = self.args.generation_batch_size // self.args.num_generations
        prompts = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else unique
        if prompts < unique:
            raise InputError(
                f"ppo: {prompts} prompts are too few for a rollout batch of {unique}; add "
                "prompts, or lower per_device_train_batch_size or steps_per_generation"
            )

        plugin = self.accelerator.state.deepspeed_plugin
        if self._wants_two_rates and plugin is not None and "optimizer" in plugin.deepspeed_config:
            raise InputError(
                "ppo: critic_learning_rate cannot be used with an optimizer in the DeepSpeed JSON; "
                "remove one of the two"
            )  # transformers would not ask create_optimizer then

    def _place_reward_models(self, rewards: list[Any]) -> None:
        for scorer in (reward for reward in rewards if isinstance(reward, RewardModelScorer)):
            if self.is_deepspeed_enabled:
                scorer.model = prepare_deepspeed(scorer.model, self.accelerator)
            else:
                scorer.model.to(self.accelerator.device)


class EpochSampler(Sampler):
    """TRL's sampler, whose order follows from the epoch alone, so that a resumed run finds it."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed((self.sampler.seed or 0) + epoch)

    def __iter__(self) -> Any:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def _as_reward(reward: Any, tokenizer: Any, args: PPOConfig) -> Reward:
    """A reward function; classifiers and folders of classifiers become a RewardModelScorer."""
    if not isinstance(reward, str | Path | PreTrainedModel):
        return reward
    path = reward.config.name_or_path if isinstance(reward, PreTrainedModel) else str(reward)
    if not isinstance(reward, PreTrainedModel):
        reward = load_reward_model(path, torch.float32)
    own = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    template = args.chat_template_kwargs or {}
    return RewardModelScorer(reward, own, tokenizer, template, name=Path(path).name)
