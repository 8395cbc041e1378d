"""The ids that reach the models in every stage are those of the evaluation's prompts."""

from collections import defaultdict

import pytest
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from selfcorrect.evaluate.prompts.dialogue import Style
from selfcorrect.recipes.schema import Base, Data, Model, Policy, Recipe, Reward
from selfcorrect.train.feedback.feedback import Feedback, Preference, pair_ids
from selfcorrect.train.ppo import rewards
from selfcorrect.train.ppo.prompts import policy_prompt_ids
from selfcorrect.train.ppo.reward_models import score_rows
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.base import preferred_rows, train_base
from selfcorrect.train.stages.policy import train_policy
from selfcorrect.train.stages.reward import train_reward
from tests.support.tokenizer_forms import WORDS, tokenizer_with

STYLE = Style("auto", {"enable_thinking": False}, "2024-07-26")
KINDS = [
    ("words, beginning and end token", "zephyr"),
    ("words, CLS and SEP", "none"),
    ("pieces, first", "channel"),
]


@pytest.fixture
def seen(monkeypatch):
    """The rows without padding that reach `generate`, trunks, and reward models in PPO."""
    rows = defaultdict(set)

    def record(owner, name):
        original = getattr(owner, name)

        def recorded(self, input_ids=None, *args, attention_mask=None, **kwargs):
            if getattr(attention_mask, "shape", None) == getattr(input_ids, "shape", 0):
                for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
                    kept = [i for i, real in zip(ids, mask, strict=True) if real]
                    rows[name].add(tuple(kept))
            return original(self, input_ids, *args, attention_mask=attention_mask, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    def recorded_rows(model, read, *args, **kwargs):
        rows["read"] |= as_tuples(read)
        return score_rows(model, read, *args, **kwargs)

    record(LlamaForCausalLM, "generate")
    record(LlamaModel, "forward")
    monkeypatch.setattr(rewards, "score_rows", recorded_rows)
    return rows


def as_tuples(rows):
    return {tuple(row) for row in rows}


def recipe_of(folder, **policy):
    cpu = {"use_cpu": True, "bf16": False, "max_steps": 1, "per_device_train_batch_size": 8}
    rollout = {"use_cpu": True, "per_device_train_batch_size": 4, "max_completion_length": 3}
    return Recipe(
        name="ids",
        models=[Model(name="m", path=str(folder))],
        data=Data(preferences={"path": "unused.jsonl"}),
        base=Base(method="sft", trainer=cpu),
        reward=Reward(held_out=0.25, trainer={**cpu, "per_device_train_batch_size": 6}),
        policy=Policy(steps=1, checkpoints=[1], trainer=rollout, **policy),
    )


def texts(rows):
    """Leave out the two tokens on which a stage tries a new model."""
    return {row for row in rows if len(row) > 2}


@pytest.mark.parametrize(("name", "template"), KINDS)
def test_every_stage_reads_the_ids_of_the_evaluation(tmp_path, seen, name, template):
    tokenizer, given = tokenizer_with(name, template), tmp_path / "given"
    tokenizer.save_pretrained(given)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=128, eos_token_id=2, pad_token_id=0,
        )
    ).save_pretrained(given)  # fmt: skip
    questions = [[{"role": "user", "content": f"who was {word}"}] for word in WORDS[:8]]
    pairs = [Preference(q, "she was .", f"he was {q[0]['content'][8:]}") for q in questions]
    feedback, recipe = Feedback(pairs, questions), recipe_of(given)
    job = JobFacts(tmp_path, 0, style=STYLE)
    prompts = as_tuples(policy_prompt_ids(tokenizer, question, STYLE) for question in questions)

    train_base(job, recipe, recipe.models[0], pairs)
    learned = as_tuples(row["input_ids"] for row in preferred_rows(tokenizer, pairs, STYLE))
    assert learned == texts(seen.pop("forward"))
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    train_reward(job, recipe.reward, feedback, tokenizer)
    fitted = as_tuples(ids for row in pair_ids(tokenizer, pairs, STYLE) for ids in row.values())
    assert fitted == texts(seen.pop("forward"))

    record = {"model": "m", "parameters": 1, "seed": 0, "recipe_digest": "-", "versions": {}}
    for method in ("ppo", "grpo"):
        seen.clear()
        more = {"num_generations": 2} if method == "grpo" else {}
        policy = recipe_of(given, method=method).policy
        policy = policy.model_copy(update={"trainer": {**policy.trainer, **more}})
        train_policy(job, policy, feedback, tokenizer, record, None)
        sampled = seen["generate"]
        assert sampled and sampled <= prompts
        # The reward model reads those prompts, and then what was sampled.
        assert seen["read"]
        assert all(any(row[: len(p)] == p for p in sampled) for row in seen["read"])
