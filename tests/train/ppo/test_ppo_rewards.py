"""Reward models: loading them, the tokens they read, and the token at which they score."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from selfcorrect.recipes.schema import Policy, Reward
from selfcorrect.train.feedback.feedback import Feedback, Preference
from selfcorrect.train.ppo import RewardModelScorer
from selfcorrect.train.ppo.reward_models import load_reward_model
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.policy import train_policy
from selfcorrect.train.stages.reward import train_reward
from tests.support.ppo_models import (
    END,
    TEMPLATE,
    WORDS,
    make_tokenizer,
    make_trainer,
    target_share,
)

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]
COMPLETIONS = [[6, 7, END], [8, END], [9, 10, 11, 12, END], [6]]  # the last one did not end


def scores_and_token_scores(models, padding, tokenizer_padding, **settings):
    """Return the scorer's scores, and the score of each row at each of its tokens."""
    model = load_reward_model(models / "reward")
    model.config.pad_token_id = padding
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer_padding
    scorer = RewardModelScorer(model, tokenizer, **settings)
    scores = scorer(prompts=PROMPTS, completions=None, completion_ids=COMPLETIONS)
    rows = scorer.token_ids(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        states = [model.base_model(torch.tensor([row])).last_hidden_state for row in rows]
        return scores, [model.score(state)[0, :, 0].tolist() for state in states]


@pytest.mark.parametrize("tokenizer_padding", [None, "<eos>", "<pad>"])
@pytest.mark.parametrize("padding", [None, 0])
def test_score_is_read_at_the_end_token(models, padding, tokenizer_padding):
    scores, token_scores = scores_and_token_scores(models, padding, tokenizer_padding)
    assert scores == pytest.approx([row[-1] for row in token_scores], abs=1e-5)
    before_end = [row[-2] for row in token_scores]
    assert all(abs(a - b) > 1e-4 for a, b in zip(scores, before_end, strict=True))


def test_model_trained_with_its_end_token_as_padding_scores_before_the_end(models):
    """transformers read the token before the end in its training, and so does the scorer."""
    scores, token_scores = scores_and_token_scores(models, END, "<eos>")
    expected = [row[-2] for row in token_scores[:3]] + [token_scores[3][-1]]
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_scores_do_not_depend_on_the_batch_size(models, monkeypatch, batch_size):
    one_by_one, _ = scores_and_token_scores(models, None, None, batch_size=1)
    monkeypatch.setattr("selfcorrect.train.ppo.limits.MIN_FLOPS_PER_PASS", 0)
    monkeypatch.setattr("selfcorrect.train.ppo.limits.MIN_ROWS_PER_PASS", batch_size)
    scores, _ = scores_and_token_scores(models, None, None)
    assert scores == pytest.approx(one_by_one, abs=1e-5)


def test_reward_model_reads_the_rendered_prompt_and_the_end_token(models):
    model = load_reward_model(models / "reward")
    scorer = RewardModelScorer(model, make_tokenizer(), batch_size=2)
    prompts = [[{"role": "user", "content": text}] for text in ("w1 w2", "w3", "w4 w5 w6")]
    ids = [[6, 7, END], [8], [9, 10, 11, END]]
    texts = [
        "Human: w1 w2 Assistant: w1 w2 <eos>",
        "Human: w3 Assistant: w3",
        "Human: w4 w5 w6 Assistant: w4 w5 w6 <eos>",
    ]
    tokenizer = make_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert scorer.token_ids(prompts, ids) == rows
    with torch.no_grad():
        expected = [model(torch.tensor([row])).logits.item() for row in rows]
    scores = scorer(prompts=prompts, completions=None, completion_ids=ids)
    assert scores == pytest.approx(expected, abs=1e-5)
    plain = ["Human: w1 w2 Assistant:", "Human: w3 Assistant:", "Human: w4 w5 w6 Assistant:"]
    assert scorer.token_ids(plain, ids) == rows
    reversed_tokenizer = make_tokenizer(WORDS[::-1])
    retokenizing = RewardModelScorer(model, reversed_tokenizer, policy_tokenizer=tokenizer)
    expected_rows = [reversed_tokenizer(text)["input_ids"] for text in texts]
    assert retokenizing.token_ids(prompts, ids) == expected_rows


def test_reward_model_reads_the_template_suffix_after_the_end_token(models):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }} w9 ")
    scorer = RewardModelScorer(load_reward_model(models / "reward"), tokenizer)
    dialogue = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    trained_on = tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=False)
    assert scorer.token_ids([dialogue[:1]], [[7, END]]) == [trained_on]
    assert scorer.token_ids([dialogue[:1]], [[7]]) == [trained_on[:-2]]


def test_reward_model_folder_and_function_are_weighted(models, tmp_path):
    trainer = make_trainer(models, tmp_path, reward=[str(models / "reward"), target_share],
                           reward_weights=[1.0, 0.5], max_steps=1)  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    expected = log["rewards/reward/mean"] + 0.5 * log["rewards/target_share/mean"]
    assert log["objective/score"] == pytest.approx(expected, abs=1e-6)


# ---- the reward stage --------------------------------------------------------------------------


def pairs():
    prompt = [{"role": "user", "content": "w1"}]
    return [Preference(prompt, f"w{i % 9}", "w9") for i in range(24)]


def test_reward_model_is_trained_to_score_the_end(models, tmp_path):
    """Also if a tokenizer has nothing else to pad with (GPT-2): the end makes a difference."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    reward = Reward(trainer={"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 4})
    shutil.copytree(models / "base", tmp_path / "base")
    train_reward(JobFacts(tmp_path, 0), reward, Feedback(pairs(), []), tokenizer)
    folder = tmp_path / "reward"
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] != END
    scorer = RewardModelScorer(load_reward_model(folder), tokenizer)
    ended, unended = scorer(
        prompts=["w1", "w1"], completions=None, completion_ids=[[6, 7, END], [6, 7]]
    )
    assert abs(ended - unended) > 1e-4


def test_given_reward_model_is_copied_and_reads_its_own_tokens(models, tmp_path, monkeypatch):
    """Its vocabulary is not the policy's: no critic can start from it, and it reads the text."""
    given, job = tmp_path / "given", JobFacts(tmp_path, 0)
    model = AutoModelForSequenceClassification.from_pretrained(models / "reward")
    model.config.pad_token_id = None
    model.save_pretrained(given)
    given_tokenizer, tokenizer = make_tokenizer(WORDS[::-1]), make_tokenizer()
    given_tokenizer.save_pretrained(given)
    reward = Reward(path=str(given), trainer={"use_cpu": True})
    shutil.copytree(models / "base", job.base)
    train_reward(job, reward, Feedback(pairs(), []), tokenizer)
    copied = load_reward_model(job.reward)
    for name, tensor in model.state_dict().items():
        assert torch.equal(copied.state_dict()[name], tensor)
    record = json.loads((job.reward / "stage.json").read_text())
    assert record["given"] == str(given) and record["pairs"] == 0
    assert record["score_standard_deviation"] > 0

    scored, token_ids = [], RewardModelScorer.token_ids

    def recording(self, prompts, completion_ids):
        rows = token_ids(self, prompts, completion_ids)
        scored.extend(zip(completion_ids, rows, strict=True))
        return rows

    monkeypatch.setattr(RewardModelScorer, "token_ids", recording)
    settings = {"use_cpu": True, "per_device_train_batch_size": 2, "max_completion_length": 4}
    policy = Policy(steps=1, checkpoints=[0, 1], trainer=settings)
    prompts = Feedback([], [[{"role": "user", "content": f"w{i}"}] for i in range(8)])
    facts = {"model": "m", "parameters": 1, "seed": 0, "recipe_digest": "-", "versions": {}}
    train_policy(job, policy, prompts, tokenizer, facts, None)
    assert scored
    for completion, row in scored:
        words = tokenizer.decode(completion, skip_special_tokens=True).split()
        words_read = given_tokenizer.decode(row, skip_special_tokens=True).split()
        assert words_read[len(words_read) - len(words) :] == words
    assert (tmp_path / "ppo" / "checkpoint-1" / "checkpoint.json").is_file()
