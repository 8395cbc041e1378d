"""Passes over completions, on tiny models of every causal architecture: values and gradients.

The model's own forward over one row at a time, in eval mode, says what is right.
"""

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import add_fused_lm_head

from selfcorrect.train.ppo.critic import Critic, trunk_of
from selfcorrect.train.ppo.forward import CompletionPass, patch_forward
from selfcorrect.train.ppo.noise import hold_in_eval, random_states
from selfcorrect.train.ppo.sparse_modules import UNSUPPORTED
from tests.support.architectures import CAUSAL, members, small_model

TEMPERATURE = 0.7
# Its rows must have one length in training. diffllama refuses dropout.
TRAINED = [name for name in CAUSAL if name not in ("reformer", "diffllama")]
# The fused head does not compute the logits of these, or does not find their trunk.
NOT_FUSED = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "llama4",
    "megatron-bert", "mllama", "modernbert-decoder", "recurrent_gemma", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xlstm",
    "xmod",
}  # fmt: skip
SWITCHED = ("opt", "bloom", "falcon", "gemma2", "mixtral", "phimoe", "xglm")


def patched(name: str, **settings):
    model = small_model(name, **settings)
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    critic = Critic(model.get_output_embeddings().in_features)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(2))
    patch_forward(model, critic, TEMPERATURE)
    return model


def rows():
    """Return ids and mask of three left-padded prompts with ragged completions, four columns."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[0] * (9 - p) + [1] * (p + c) + [0] * (4 - c) for p, c in SIZES])
    return torch.randint(3, 40, mask.shape, generator=generator) * mask, mask


SIZES = [(9, 2), (2, 4), (5, 1)]


def score(model, ids, mask, **options):
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-4] = -100
    scored = CompletionPass(model, 4, with_values=True, **options)
    output = scored(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return output.log_probs, output.entropy, torch.cat(scored.values)


def gradients(model, outputs):
    """Return the gradient of a loss of all outputs, by parameter."""
    model.zero_grad()
    sum((output * torch.linspace(1, 2, output.numel()).view_as(output)).sum()
        for output in outputs).backward()  # fmt: skip
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def right(model, ids, mask):
    """Return log-probabilities, entropies and values of the model's own forward, row by row."""
    heads, hidden = [], []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: hidden.append(inputs[0])
    )
    for row, (prompt, count) in zip(ids, SIZES, strict=True):
        tokens = row[9 - prompt : 9 + count][None]
        logits = model(input_ids=tokens).logits[0, prompt - 1 : -1] / TEMPERATURE
        distribution = logits.float().log_softmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1)
        values = model.critic(hidden[-1])[0, prompt - 1 : -1]
        chosen = distribution.gather(1, tokens[0, prompt:, None])[:, 0]
        heads.append([nn.functional.pad(x, (0, 4 - count)) for x in (chosen, entropy, values)])
    hook.remove()
    return [torch.stack(column) for column in zip(*heads, strict=True)]


@pytest.mark.parametrize("name", members(CAUSAL))
def test_passes_have_the_values_and_gradients_of_the_own_forward(name):
    """A fast pass that has the right values has the right gradients too."""
    if name == "reformer":
        pytest.skip("reads rows of one length only")
    model, (ids, mask) = patched(name).train(), rows()
    if name == "minicpm3":  # scales states before its head: the critic may read either
        nn.init.zeros_(model.critic.head.weight)
    expected = right(model, ids, mask)
    expected_gradients = gradients(model, expected)
    for options in ({}, {"plain": True}):
        if not options and name in NOT_FUSED:
            continue
        outputs = score(model, ids, mask, **options)
        for output, right_output in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, right_output, atol=2e-4, rtol=2e-3)
        found = gradients(model, outputs)
        assert found.keys() == expected_gradients.keys()
        for parameter, gradient in expected_gradients.items():
            if name == "minicpm3" and parameter.startswith("critic"):
                continue
            error = (found[parameter] - gradient).norm()
            assert error <= 1e-3 * gradient.norm() + 1e-4, parameter


@pytest.mark.parametrize("name", members(sorted(NOT_FUSED)))
def test_fast_pass_of_other_heads_shows_in_its_values(name):
    """Or it raises what the trainer takes for a refusal; it is never silently close."""
    model, (ids, mask) = patched(name), rows()
    with torch.no_grad():
        expected = right(model, ids, mask)[0]
        try:
            log_probs = score(model, ids, mask)[0]
        except UNSUPPORTED:
            return
    assert (log_probs - expected).abs().mean() > 1e-3


@pytest.mark.parametrize("name", members(TRAINED))
def test_model_held_in_eval_draws_no_random_numbers(name):
    model = patched(name, dropout=0.1)
    for key in ("layerdrop", "router_jitter_noise", "jitter_noise", "input_jitter_noise"):
        for module in model.modules():
            if hasattr(module, key):
                setattr(module, key, 0.1)
    ids, mask = rows()
    with torch.no_grad():
        expected = score(model, ids, mask, plain=True)[0]
        hold_in_eval(model)
        model.train()
        assert model.training and not any(m.training for m in model.modules() if m is not model)
        before = random_states(torch.device("cpu"))
        log_probs = score(model, ids, mask, plain=True)[0]
    assert torch.equal(log_probs, expected)
    assert random_states(torch.device("cpu")) == before


@pytest.mark.parametrize("name", SWITCHED)
def test_checkpointed_layers_are_held_in_eval_when_computed_and_computed_again(name):
    ids, mask = rows()
    found = []
    for checkpointing in (False, True):
        model = patched(name, dropout=0.1)
        hold_in_eval(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        calls = []
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                forward = next(m for m in layer.modules() if isinstance(m, nn.Linear))
                forward.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        outputs = score(model, ids, mask)
        first = len(calls)
        found.append((outputs, gradients(model, outputs), first, len(calls)))
    (outputs, expected, first, total), (again, recomputed, first_again, total_again) = found
    assert total == first and total_again == 2 * first_again > 0  # checkpointing is really on
    for output, other in zip(outputs, again, strict=True):
        torch.testing.assert_close(other, output)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(recomputed[parameter], gradient, atol=1e-5, rtol=1e-4)


def test_trunk_is_found_under_any_name():
    for name in ("llama", "bloom", "llama4", "mllama", "opt", "gpt2"):
        model = small_model(name)
        assert trunk_of(model) is not model
