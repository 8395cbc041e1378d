"""Reward models see the end of a text, whatever their tokenizers pad with."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from selfcorrect.train.ppo import RewardModelScorer
from tests.train.ppo.test_ppo_trainer import (  # noqa: F401  (home and quiet are fixtures)
    WORDS,
    home,
    make_tokenizer,
    quiet,
)

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]
ENDED = [[6, 7, 1], [8, 1], [9, 10, 11, 12, 1], [6]]  # 1 is the end token; the last did not end


def scored(home, pad, tokenizer_pad, **settings):  # noqa: F811
    """The scorer's answer, and each row's score by its own state at every token."""
    model = AutoModelForSequenceClassification.from_pretrained(home / "reward")
    model.config.pad_token_id = pad
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer_pad
    scorer = RewardModelScorer(model, tokenizer, **settings)
    answer = scorer(prompts=PROMPTS, completions=None, completion_ids=ENDED)
    rows = scorer.token_ids(PROMPTS, ENDED)
    with torch.no_grad():
        states = [model.base_model(torch.tensor([row])).last_hidden_state for row in rows]
        return answer, [model.score(state)[0, :, 0].tolist() for state in states]


@pytest.mark.parametrize("tokenizer_pad", [None, "<eos>", "<pad>"])
@pytest.mark.parametrize("pad", [None, 0])
def test_the_end_token_is_the_one_scored(home, pad, tokenizer_pad):  # noqa: F811
    answer, by_token = scored(home, pad, tokenizer_pad)
    assert answer == pytest.approx([row[-1] for row in by_token], abs=1e-5)
    before = [row[-2] for row in by_token]
    assert all(abs(a - b) > 1e-4 for a, b in zip(answer, before, strict=True))


def test_a_model_trained_with_its_end_token_as_padding_is_scored_as_it_was_trained(home):  # noqa: F811
    """transformers read the token before the end in its training, and so does the scorer."""
    answer, by_token = scored(home, 1, "<eos>")
    trained = [row[-2] for row in by_token[:3]] + [by_token[3][-1]]
    assert answer == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_scores_do_not_depend_on_how_rows_are_batched(home, monkeypatch, batch_size):  # noqa: F811
    alone, _ = scored(home, None, None, batch_size=1)
    monkeypatch.setattr("selfcorrect.train.ppo.limits.MIN_FLOPS_PER_PASS", 0)
    monkeypatch.setattr("selfcorrect.train.ppo.limits.MIN_ROWS_PER_PASS", batch_size)
    assert scored(home, None, None)[0] == pytest.approx(alone, abs=1e-5)


def test_a_reward_model_is_trained_to_score_the_end(home, tmp_path):  # noqa: F811
    """Also where a tokenizer has nothing else to pad with (GPT-2): the end makes a difference."""
    from selfcorrect.recipes.schema import Reward
    from selfcorrect.train.feedback.feedback import Feedback, Preference
    from selfcorrect.train.stages import JobFacts
    from selfcorrect.train.stages.reward import train_reward

    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    pairs = [Preference([{"role": "user", "content": "w1"}], f"w{i % 9}", "w9") for i in range(24)]
    reward = Reward(trainer={"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 4})
    folder = tmp_path / "reward"
    shutil.copytree(home / "base", tmp_path / "base")
    train_reward(JobFacts(tmp_path, 0), reward, Feedback(pairs, []), tokenizer)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] != 1
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    scorer = RewardModelScorer(model, tokenizer)
    ended, open_ = scorer(
        prompts=["w1", "w1"], completions=None, completion_ids=[[6, 7, 1], [6, 7]]
    )
    assert abs(ended - open_) > 1e-4


def test_a_given_reward_model_is_taken_as_it_is_and_reads_its_own_tokens(home, tmp_path):  # noqa: F811
    """Its vocabulary is not the policy's: no critic can start from it, and it reads the text."""
    from selfcorrect.recipes.schema import Policy, Reward
    from selfcorrect.train.feedback.feedback import Feedback, Preference
    from selfcorrect.train.stages import JobFacts
    from selfcorrect.train.stages.policy import train_policy
    from selfcorrect.train.stages.reward import train_reward

    given, folder = tmp_path / "given", tmp_path / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(home / "reward")
    model.config.pad_token_id = None
    model.save_pretrained(given)
    make_tokenizer(WORDS[::-1]).save_pretrained(given)
    pairs = [Preference([{"role": "user", "content": "w1"}], f"w{i % 9}", "w9") for i in range(24)]
    tokenizer = make_tokenizer()
    reward = Reward(path=str(given), trainer={"use_cpu": True})
    shutil.copytree(home / "base", tmp_path / "base")
    train_reward(JobFacts(tmp_path, 0), reward, Feedback(pairs, []), tokenizer)
    taken = AutoModelForSequenceClassification.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(taken.state_dict()[name], tensor)
    record = json.loads((folder / "stage.json").read_text())
    assert record["given"] == str(given) and record["pairs"] == 0
    assert record["score_standard_deviation"] > 0

    scored = []
    scorer = RewardModelScorer.token_ids

    def watched(self, prompts, completion_ids):
        rows = scorer(self, prompts, completion_ids)
        scored.extend(zip(completion_ids, rows, strict=True))
        return rows

    settings = {"use_cpu": True, "per_device_train_batch_size": 2, "max_completion_length": 4}
    policy = Policy(steps=1, checkpoints=[0, 1], trainer=settings)
    asked = Feedback([], [[{"role": "user", "content": f"w{i}"}] for i in range(8)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModelScorer, "token_ids", watched)
        record = {
            "model": "m", "parameters": 1, "seed": 0, "recipe_digest": "-", "versions": {},
        }  # fmt: skip
        train_policy(JobFacts(tmp_path, 0), policy, asked, tokenizer, record, None)
    theirs = make_tokenizer(WORDS[::-1])
    for ids, row in scored:
        said = tokenizer.decode(ids, skip_special_tokens=True).split()
        heard = theirs.decode(row, skip_special_tokens=True).split()
        assert heard[len(heard) - len(said) :] == said
    assert scored and (tmp_path / "ppo" / "checkpoint-1" / "checkpoint.json").is_file()
