"""A GRPOTrainer whose rollouts are samples of exactly the policy that its passes score.

Sampling obeys the trainer's settings alone, scoring is free of noise, and the fast passes are
compared with the model's own forward before they are trusted. PPO and the GRPO baseline share it.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from trl.trainer.utils import pad

from selfcorrect.evaluate.callback import temporary_eval_mode
from selfcorrect.evaluate.scoring.sampling import only_settings
from selfcorrect.recipes.foundation.errors import (
    InputError,
    RunFailure,
    is_from_network,
    raised_in,
    reason_of,
)
from selfcorrect.train.ppo.colocated import colocated_vllm
from selfcorrect.train.ppo.config import PPOConfig
from selfcorrect.train.ppo.critic import Critic, language_model_of
from selfcorrect.train.ppo.forward import CompletionPass, TokenOutputs, patch_forward
from selfcorrect.train.ppo.limits import rows_per_pass
from selfcorrect.train.ppo.noise import eval_below, hold_in_eval, random_states
from selfcorrect.train.ppo.prompts import DialoguePrompts
from selfcorrect.train.ppo.sparse_modules import UNSUPPORTED, rounding_error
from selfcorrect.train.trainers.guarded import GuardedTrainer

NUM_TRIED = 3  # rows of the first rollout batch on which the fast pass is tried

logger = logging.getLogger(__name__)


class OnPolicyTrainer(DialoguePrompts, GuardedTrainer):
    """GRPOTrainer that samples from, and learns about, one and the same distribution.

    Raises RunFailure if the log-probabilities of unchanged weights differ: those of policy and
    reference before the first update, or those of the policy before and at the first update.
    """

    args: PPOConfig
    aux_loss_enabled: bool

    def __init__(self, model: Any, reward_funcs: Any, args: PPOConfig, **kwargs: Any) -> None:
        self._given_settings = _generation_settings(model, args.trust_remote_code)
        with _server_errors(args), colocated_vllm(args, model):
            super().__init__(model, reward_funcs, args, **kwargs)
        self.language_model = language_model_of(self.accelerator.unwrap_model(self.model))
        self._num_weights = self.language_model.num_parameters(exclude_embeddings=True)
        tuner_layers = (m for m in self.language_model.modules() if isinstance(m, BaseTunerLayer))
        self._tuner_layer = next(tuner_layers, None)
        self._pass_options: dict[str, Any] | None = None  # None: not tried yet
        self._is_noisy = False
        self._ratio_is_checked = False

    def _patch_models(self, critic: Critic | None) -> None:
        patch_forward(self.language_model, critic, self.temperature)
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            patch_forward(reference, None, self.temperature)

    # ---- sample ----------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Sample completions by the trainer's settings alone; try the passes on the first ones.

        transformers fills settings that are None from the model's generation_config.json, of which
        only the end tokens may count here: log-probabilities know nothing of a `min_p`, a forced
        token or a beam search.
        """
        own = None if self.use_vllm else self.generation_config
        settings = only_settings(self.language_model, own) if own else nullcontext()
        silent = eval_below(self.language_model)
        with settings, self._in_16_bits(), silent, _server_errors(self.args):
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self._pass_options is None:
            self._settle_passes(prompt_ids, completion_ids)
        return completion_ids, logprobs

    # ---- score -----------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Run TRL's passes over rows as `_forward_completions` does."""
        outputs = self._forward_completions(model, *args, **kwargs)
        self._newest_log_probs = outputs.log_probs.detach()
        return outputs.log_probs, outputs.entropies, outputs.aux_loss

    def _forward_completions(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        batch_size: int | None = None, **options: Any,
    ) -> TokenOutputs:  # fmt: skip
        """Run policy and critic, or the reference, through TRL's loop over micro-batches.

        Padding is removed and positions are true. `input_ids` are prompts and completions, of
        which the last `logits_to_keep` columns are completions.
        """
        is_policy = not (model is self.ref_model or self._adapter_is_reference())
        call = {**(self._pass_options or {}), **(self._policy_options() if is_policy else {})}
        if self._sizes_passes and not options.get("compute_aux_loss"):
            tokens_per_row = attention_mask.sum().item() / len(attention_mask)
            rows = rows_per_pass(
                self._num_weights, tokens_per_row, self.args.gradient_checkpointing
            )
            batch_size = min(batch_size or len(input_ids), rows)
        batch_size = call.pop("batch_size", batch_size)
        completion_pass = CompletionPass(model, logits_to_keep, **call)
        order = attention_mask.sum(dim=1).argsort(stable=True)  # micro-batches of similar length
        inverse = order.argsort()
        log_probs, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            completion_pass, input_ids[order], attention_mask[order], logits_to_keep,
            batch_size=batch_size, **options,
        )  # fmt: skip
        values = torch.cat(completion_pass.values) if completion_pass.values else None
        return TokenOutputs(
            log_probs[inverse],
            entropies[inverse] if entropies is not None else None,
            values[inverse].float() if values is not None else None,
            aux_loss,
        )

    @contextmanager
    def _in_16_bits(self) -> Iterator[None]:
        """Sample as the passes score, if autocast gives an adapter the 16-bit type of its base.

        `generate` passes by the wrapper in whose forward accelerate enables autocast.
        """
        is_autocast = self._tuner_layer is not None and self.accelerator.native_amp
        if not is_autocast or self.language_model.dtype != self._autocast_type:
            yield
            return

        def contiguous(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(states.contiguous() for states in inputs)

        # On a CPU, a head that does not learn would be copied for every prompt's last state.
        hook = self.language_model.get_output_embeddings().register_forward_pre_hook(contiguous)
        try:
            with self.accelerator.autocast():
                yield
        finally:
            hook.remove()

    @property
    def _autocast_type(self) -> torch.dtype | None:
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return types.get(self.accelerator.mixed_precision)

    def _policy_options(self) -> dict[str, Any]:
        """Return options of the policy's forward, which the reference's has not."""
        return {}

    @property
    def _sizes_passes(self) -> bool:
        """Whether rows are split into passes by their length; ranks must make equally many."""
        return self.accelerator.device.type == "cpu" and self.accelerator.num_processes == 1

    def _adapter_is_reference(self) -> bool:
        layer = self._tuner_layer
        return layer is not None and (layer.disable_adapters or "ref" in layer.active_adapters)

    # ---- try the passes --------------------------------------------------------------------------

    @torch.no_grad()
    def _settle_passes(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """Silence the policy, and choose the fastest pass that equals plain rows.

        Both are tried on rows of the first rollout batch, the shortest and the longest among them,
        and on its longest prompt with a completion of the greatest length. Plain rows are one at a
        time, without padding, by the model's own forward.
        """
        sampled = sorted(
            zip(prompt_ids, completion_ids, strict=True), key=lambda row: len(row[0]) + len(row[1])
        )
        tried = torch.linspace(0, len(sampled) - 1, min(NUM_TRIED, len(sampled))).long().tolist()
        chosen = [sampled[i] for i in tried]
        prompt, completion = max(sampled, key=lambda row: len(row[0]))
        chosen.append((prompt, np.resize(completion, self.max_completion_length).tolist()))
        prompts, prompt_mask = self._padded([prompt for prompt, _ in chosen], "left")
        completions, mask = self._padded([completion for _, completion in chosen], "right")
        rows = (
            torch.cat([prompts, completions], dim=1),
            torch.cat([prompt_mask, mask], dim=1),
            completions.size(1),
        )
        one_by_one = {"plain": True, "batch_size": 1}

        def score(options: dict[str, Any], **more: Any) -> Tensor:
            self._pass_options = options
            return self._forward_completions(self.model, *rows, **more).log_probs

        is_training = self.model.training
        self.model.train()
        try:
            self._is_noisy = self._draws(partial(score, one_by_one))
        except UNSUPPORTED as error:
            raise InputError(
                f"{self.stage}: a model of type {self._family} cannot be trained: "
                f"{reason_of(error)}"
            ) from error
        if self._is_noisy and self.args.disable_dropout:
            hold_in_eval(self.language_model)
            self._is_noisy = self._draws(partial(score, one_by_one))
        self.model.train(is_training)

        with temporary_eval_mode(self.model):
            expected = score(one_by_one)

            def difference(options: dict[str, Any], **more: Any) -> str | None:
                return self._difference(partial(score, options, **more), expected, mask)

            ways: list[dict[str, Any]] = [{}, {"plain": True}, one_by_one]
            while len(ways) > 1 and (reason := difference(ways[0])):
                self._warn_of_pass(ways.pop(0), reason)
            if self.aux_loss_enabled:
                able = [way for way in ways if not difference(way, compute_aux_loss=True)]
                self.aux_loss_enabled = bool(able)
                if not able:
                    logger.warning("%s: its experts learn without a balancing loss", self._family)
                elif able[0] is not ways[0]:
                    self._warn_of_pass(ways[0], "no balancing loss of the experts")
                ways = able or ways
        self._pass_options = ways[0]

    def _warn_of_pass(self, options: dict[str, Any], reason: str) -> None:
        logger.warning(
            "%s: %s cannot be used, since it does not compute the same as the model's own forward "
            "(%s): a slower one is used",
            self._family,
            "a pass over several rows" if options else "the fast pass over completions",
            reason,
        )

    @property
    def _family(self) -> str:
        return str(self.language_model.config.model_type)

    def _draws(self, forward: Callable[[], Any]) -> bool:
        """Return whether a forward draws random numbers, in any process."""
        device = self.accelerator.device
        before = random_states(device)
        forward()
        changed = torch.tensor(float(before != random_states(device)), device=device)
        return bool(self._sum(changed).item())

    def _difference(
        self, forward: Callable[[], Tensor], expected: Tensor, mask: Tensor
    ) -> str | None:
        """Return how a pass differs from expected log-probabilities; None if only by rounding."""
        try:
            log_probs = forward()
        except UNSUPPORTED as error:
            return reason_of(error)
        difference = self._mean_difference(log_probs, expected, mask)
        return f"{difference:.2g} nats a token off" if difference > self._tolerance else None

    def _padded(self, rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        """Return ids and mask (rows, longest row), padded on a side, on the trainer's device."""
        device = self.accelerator.device
        tensors = [torch.tensor(ids, device=device) for ids in rows]
        ids = pad(tensors, padding_value=self._tokenizer.pad_token_id, padding_side=side)
        mask = pad([torch.ones_like(t) for t in tensors], padding_value=0, padding_side=side)
        return ids, mask

    # ---- check the first rollout batch -----------------------------------------------------------

    def _check_reference(self, policy: Tensor, reference: Tensor, mask: Tensor) -> None:
        """Raise RunFailure if policy and reference differ before anything has been learned."""
        if self._mode == "eval" or self._step or self.state.global_step:
            return
        if is_peft_model(self.model):
            cause = "the adapter does not start at zero; set init_lora_weights: true"
        else:
            cause = (
                f"the reference is read from {self.language_model.config.name_or_path}, whose "
                "weights are not the policy's; save the policy there first"
            )
        self._check_equal(policy, reference, mask, "policy and reference", cause)

    def _check_ratio(self, new: Tensor, old: Tensor, mask: Tensor) -> None:
        """Raise RunFailure if the first ratios to the policy that sampled are not 1."""
        is_first = self._step % (self.args.num_iterations * self.args.steps_per_generation) == 0
        if self._mode == "eval" or self._ratio_is_checked or not is_first:
            return
        self._ratio_is_checked = True
        cause = (
            "its log-probabilities depend on the other rows of a pass; set "
            "per_device_train_batch_size: 1"
        )
        self._check_equal(new.detach(), old, mask, "two passes over the same completions", cause)

    def _check_equal(
        self, first: Tensor, second: Tensor, mask: Tensor, passes: str, cause: str
    ) -> None:
        difference = self._mean_difference(first, second, mask)
        if not difference > self._tolerance:  # NaN is reported with the KL or the loss
            return
        message = (
            f"{self.step_label}: no weight has changed yet, but log-probabilities of {passes} of "
            f"{self._family} differ by {difference:.2g} nats a token"
        )
        if self._is_noisy and not self.args.disable_dropout:
            logger.warning("%s: its dropout is on", message)
            return
        if self._is_noisy:
            cause = "its forward draws random numbers even in eval mode; train another model"
        raise RunFailure(f"{message}: {cause}")

    def _mean_difference(self, first: Tensor, second: Tensor, mask: Tensor) -> float:
        """Return the mean absolute difference on the mask, over all processes."""
        difference = (first.float() - second.float()).abs() * mask
        total, count = self._sum(torch.stack([difference.sum(), mask.sum().float()])).tolist()
        return float(total / max(count, 1.0))

    @property
    def _tolerance(self) -> float:
        """Mean difference in nats that rounding explains: see `rounding_error`."""
        return rounding_error(self._autocast_type or self.language_model.dtype)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _sum(self, sums: Tensor) -> Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(sums, reduction="sum")

    # ---- save ------------------------------------------------------------------------------------

    @contextmanager
    def given_settings(self) -> Iterator[None]:
        """Give the model the generation settings that it came with, in order to save it.

        Trainers change them, and transformers refuses to save changed settings that it would only
        warn of in a published model.
        """
        with only_settings(self.language_model, self._given_settings):
            yield

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self.given_settings():
            super()._save(output_dir, state_dict)


@contextmanager
def _server_errors(args: Any) -> Iterator[None]:
    """Raise RunFailure, in one line, in place of errors about a connection to vLLM's server."""
    try:
        yield
    except Exception as error:
        has_server = args.use_vllm and args.vllm_mode == "server"
        # TRL's client raises a plain Exception for an answer that is not "OK", and errors of its
        # own for a server without a weight-transfer engine, or a trainer without a GPU.
        is_of_client = type(error) is Exception or raised_in(error) == "trl.generation.vllm_client"
        if not has_server or not (is_from_network(error) or is_of_client):
            raise
        raise RunFailure(f"policy.trainer.use_vllm: vLLM's server: {reason_of(error)}") from error


def _generation_settings(model: Any, trust_remote_code: bool) -> GenerationConfig:
    """Return a copy of the generation settings of a model, or of a folder or hub name of one."""
    if not isinstance(model, str):
        return copy.deepcopy(model.generation_config)
    with suppress(OSError):  # no generation_config.json
        return GenerationConfig.from_pretrained(model)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return GenerationConfig.from_model_config(config)
