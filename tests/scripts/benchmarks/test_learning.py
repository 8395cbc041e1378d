"""The learning benchmark: its exact optimum, its enumeration, and a short run."""

import json
import math

import pytest
import torch

from selfcorrect.scripts.benchmarks import learning, learning_problems
from selfcorrect.scripts.benchmarks.learning_report import BEGIN, END, publish


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")  # no telemetry
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield learning_problems.toy(tmp_path_factory.mktemp("toy"), steps=2)


def test_optimum_of_two_answers_by_hand():
    """Two answers as likely as each other, rewards 0 and 1, beta 1/2: log((1 + e^2) / 2) / 2."""
    initial = torch.tensor([[0.5, 0.5]]).log()
    rewards = torch.tensor([[0.0, 1.0]])
    best = learning_problems.best_objective(initial, rewards, 0.5)
    assert best.item() == pytest.approx(0.5 * math.log((1 + math.e**2) / 2), abs=1e-6)

    chance = math.e**2 / (1 + math.e**2)  # of the second answer, in the best policy
    policy = torch.tensor([[1 - chance, chance]]).log()
    figures = learning_problems.exact_figures(policy, initial, rewards, 0.5)
    assert figures["exact_score"] == pytest.approx(chance, abs=1e-6)
    assert figures["objective"] == pytest.approx(best.item(), abs=1e-6)
    for other in (0.3, 0.7, 0.99):
        policy = torch.tensor([[1 - other, other]]).log()
        figures = learning_problems.exact_figures(policy, initial, rewards, 0.5)
        assert figures["objective"] < best.item()


def test_reward_compares_target_tokens_with_the_prompt(problem):
    ids = problem.tokenizer(["a d b <eos>", "a b c a", "<eos>"])["input_ids"]
    assert ids[2] == [1]
    assert learning_problems.closeness(["two", "two", "four"], ids) == [1.0, 0.5, 0.0]


def test_enumerated_probabilities_match_the_model(problem):
    model = learning.AutoModelForCausalLM.from_pretrained(problem.policy)
    prompts = torch.tensor(problem.tokenizer(["one", "three"])["input_ids"])
    joint = learning_problems.log_probabilities(model, prompts, end=1, length=3)
    size = len(problem.tokenizer)
    assert joint.shape == (2, size**3)
    torch.testing.assert_close(joint.exp().sum(1), torch.ones(2).double())

    def alone(prompt, answer):
        ids = torch.tensor([[*prompts[prompt].tolist(), *answer]])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, torch.tensor(answer)[:, None]).sum().item()

    def at(answer):
        return answer[0] * size**2 + answer[1] * size + answer[2]

    assert joint[1, at([7, 4, 9])].item() == pytest.approx(alone(1, [7, 4, 9]), abs=1e-5)
    assert joint[0, at([7, 1, 1])].item() == pytest.approx(alone(0, [7, 1]), abs=1e-5)
    assert joint[0, at([7, 1, 9])].item() == -math.inf  # nothing follows the end
    assert joint[0, at([1, 1, 1])].item() == pytest.approx(alone(0, [1]), abs=1e-5)


def test_toy_end_to_end(problem, tmp_path, monkeypatch):
    """Two steps of PPO and GRPO: all figures are there; the page keeps the words around them."""
    monkeypatch.setattr(learning, "EXACT_EVERY", 1)
    methods = ("PPO, separate critic", "GRPO, unscaled")
    runs = [learning.train(problem, method, 0, tmp_path / "work") for method in methods]
    best = problem.facts["optimum"]["objective"]
    for run in runs:
        assert len(run["steps"]) == 2
        assert run["before"]["exact_kl"] == 0
        assert run["steps"][1]["objective"] == run["after"]["objective"] < best
        assert run["steps"][0]["kl"] == pytest.approx(0, abs=1e-5)  # sampled before any update
        has_critic = run["method"].startswith("PPO")
        assert (run["steps"][1]["explained_variance"] is not None) == has_critic
    results = {
        "date": "2026-01-01", "machine": "a test", "cpu_seconds": 1.0,
        "problems": {"toy": {"facts": problem.facts, "settings": problem.same, "runs": runs}},
    }  # fmt: skip
    results = json.loads(json.dumps(results))
    learning.draw(results, tmp_path)
    (tmp_path / "ppo-learning.md").write_text(f"Before.\n{BEGIN}\nold\n{END}\nBehind.\n")
    publish(results, tmp_path, tmp_path)
    page = (tmp_path / "ppo-learning.md").read_text()
    assert page.startswith("Before.\n") and page.endswith("\nBehind.\n") and "old" not in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {11}
    assert page.count("| **mean** |") == len(methods)
    assert (tmp_path / "ppo-learning.png").stat().st_size < 300_000
