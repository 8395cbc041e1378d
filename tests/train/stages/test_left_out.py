"""Every number of rows in a record is that of the rows used; the others are counted by reason."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Base, Model, Policy, Reward
from selfcorrect.train.feedback.feedback import Feedback, Preference, pair_ids
from selfcorrect.train.feedback.kept_rows import NOT_REACHED
from selfcorrect.train.ppo.reward_models import load_reward_model, score_rows
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.base import train_base
from selfcorrect.train.stages.policy import train_policy
from selfcorrect.train.stages.reward import SAME, train_reward
from tests.support.ppo_models import END, VOCABULARY, make_tokenizer, save_models
from tests.support.small_runs import SMALL

PROMPT = [{"role": "user", "content": "w1"}]
SHORT = [Preference(PROMPT, f"w{i % 9}", "w9") for i in range(27)]
LONG = [Preference(PROMPT, "w2 " * 40, f"w{i % 9}") for i in range(27)]
EQUAL = [Preference(PROMPT, "w3", "w3  ")] * 3  # the same tokens
TRAINER = {"use_cpu": True, "per_device_train_batch_size": 4}
LONGEST = "longer than max_length, 16 tokens"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def record(job: JobFacts, stage: str) -> dict:
    return json.loads((job.folder / stage / "stage.json").read_text())


def fit(models: Path, folder: Path, pairs: list[Preference], **trainer) -> JobFacts:
    job = JobFacts(folder, 0)
    shutil.copytree(models / "base", job.base)
    reward = Reward(trainer={**TRAINER, **trainer}, held_out=0.2)
    train_reward(job, reward, Feedback(pairs, [], {"differ": 2}), make_tokenizer())
    return job


def test_pairs_of_the_reward_model(models: Path, tmp_path: Path) -> None:
    job = fit(models, tmp_path, [*SHORT, *LONG, *EQUAL], max_length=16)
    facts = record(job, "reward")
    assert facts["pairs"] + facts["held_out_pairs"] == len(SHORT) and facts["held_out_pairs"] == 5
    assert facts["left_out"] == {"differ": 2, LONGEST: 27, SAME: 3}


def test_held_out_facts_are_of_the_pairs_kept(models: Path, tmp_path: Path) -> None:
    """PPO's scale is mean and deviation of scores at the last token, those of no other text."""
    kept = [*SHORT[:4], *SHORT[:4]]
    facts = record(fit(models, tmp_path, [*kept, *LONG], max_length=16, max_steps=1), "reward")
    assert facts["held_out_pairs"] == 1
    model = load_reward_model(tmp_path / "reward").eval()
    possible = []
    for pair in pair_ids(make_tokenizer(), SHORT[:4]):
        chosen, rejected = score_rows(model, [pair["chosen_ids"], pair["rejected_ids"]], 1)
        possible.append((chosen + rejected) / 2)
    assert min(abs(facts["score_mean"] - mean) for mean in possible) < 1e-6


def test_pairs_that_training_does_not_reach(models: Path, tmp_path: Path) -> None:
    facts = record(fit(models, tmp_path, SHORT, max_steps=2), "reward")
    assert facts["pairs"] == 8
    assert facts["left_out"] == {"differ": 2, NOT_REACHED: 27 - 5 - 8}


def test_pairs_beyond_the_models_context(models: Path, tmp_path: Path) -> None:
    """GPT-2 has no position for them."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
    config = GPT2Config(**sizes, eos_token_id=END, bos_token_id=END)
    job, tokenizer = JobFacts(tmp_path, 0), make_tokenizer()
    AutoModelForCausalLM.from_config(config).save_pretrained(job.base)
    tokenizer.pad_token = tokenizer.eos_token
    reward = Reward(trainer=TRAINER, held_out=0.2)
    train_reward(job, reward, Feedback([*SHORT, *LONG], []), tokenizer)
    facts = record(job, "reward")
    assert facts["left_out"] == {"longer than the model's context, 16 tokens": 27}
    assert facts["pairs"] == 22
    other = JobFacts(tmp_path / "other", 0)
    shutil.copytree(job.base, other.base)
    with pytest.raises(InputError, match=r"0 preference pairs are too few.*27 are left out"):
        train_reward(other, reward, Feedback(LONG, []), tokenizer)


def test_held_out_pairs_of_a_given_reward_model(models: Path, tmp_path: Path) -> None:
    job = JobFacts(tmp_path, 0)
    shutil.copytree(models / "base", job.base)
    beyond = [Preference(PROMPT, "w2 " * 70, "w4")] * 27
    reward = Reward(path=str(models / "reward"), trainer=TRAINER, held_out=0.5)
    train_reward(job, reward, Feedback([*SHORT, *beyond], []), make_tokenizer())
    facts = record(job, "reward")
    left = facts["left_out"]["longer than the model's context, 64 tokens"]
    assert facts["pairs"] == 0 and facts["held_out_pairs"] + left == 27 and 0 < left < 27


def test_preferred_answers_of_the_base_model(models: Path, tmp_path: Path) -> None:
    """TRL would cut their ends off."""
    base = Base(method="sft", trainer={**TRAINER, "max_length": 16})
    recipe = load_recipe("quickstart", SMALL).model_copy(update={"base": base})
    job, given = JobFacts(tmp_path, 0), Model(name="m", path=str(models / "base"))
    train_base(job, recipe, given, [*SHORT, *LONG])
    assert record(job, "base")["rows"] == 27
    assert record(job, "base")["left_out"] == {LONGEST: 27}


def test_preferred_answers_and_prompts_of_the_policy(models: Path, tmp_path: Path) -> None:
    prompts = [PROMPT, [{"role": "user", "content": "w1 " * 70}]] * 8
    facts = {"model": "m", "parameters": 1, "seed": 0, "recipe_digest": "-", "versions": {}}
    trainer = {**TRAINER, "max_completion_length": 4}
    found = {}
    job = fit(models, tmp_path, SHORT)
    for method, more in (
        ("ppo", {}),
        ("grpo", {"num_generations": 2}),
        ("sft", {"max_length": 16}),
    ):
        policy = Policy(method=method, steps=1, checkpoints=[0, 1], trainer={**trainer, **more})
        feedback = Feedback([*SHORT, *LONG], prompts)
        train_policy(job, policy, feedback, make_tokenizer(), facts, None)
        found[method] = record(job, method)
    reason = "prompt and completion would exceed the context"
    for method in ("ppo", "grpo"):
        assert found[method]["prompts"] == 8 and found[method]["left_out"] == {reason: 8}
    assert "prompts" not in found["sft"]
    assert found["sft"]["left_out"][LONGEST] == 27
    assert found["sft"]["rows"] + found["sft"]["left_out"].get(NOT_REACHED, 0) == 27
