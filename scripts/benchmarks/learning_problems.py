"""The two problems of learning.py: a toy with a known optimum, and the society."""

# ruff: noqa: TID253  (all of this file is torch and transformers)

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.society import feedback as society_feedback
from selfcorrect.recipes.society.world import make_world
from selfcorrect.scripts.benchmarks.random_models import word_tokenizer
from selfcorrect.train.feedback.feedback import load_feedback
from selfcorrect.train.ppo import RewardModelScorer
from selfcorrect.train.ppo.losses import shaped_score
from selfcorrect.train.ppo.reward_models import load_reward_model
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.base import train_base
from selfcorrect.train.stages.reward import train_reward
from selfcorrect.train.trainers.state import stage_record

TARGETS, OTHERS, NUMBERS = ("a", "b", "c"), ("d", "e", "f"), ("one", "two", "three", "four")
LEARNING_RATE = 3e-4  # in the society; quickstart.yaml takes 1e-4 and more steps
LENGTH = 4  # tokens of an answer in the toy


@dataclass
class Problem:
    """A policy, the prompts it is trained on, and the reward of its completions."""

    policy: Path
    tokenizer: Any
    prompts: list[Any]
    reward: Callable[..., list[float]]
    steps: int
    same: dict[str, Any]  # settings of every method
    ppo_settings: dict[str, Any]
    facts: dict[str, Any]  # for the report
    shape: Callable[..., list[float]] | None = None  # applies PPO's score settings to GRPO's reward
    held_out: list[Any] = field(default_factory=list)
    exact: Callable[[Any], dict[str, float]] | None = None  # a policy's figures without sampling


# ---- 1. the toy ----------------------------------------------------------------------------------


def closeness(
    prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **unused: Any
) -> list[float]:
    """Return 1 - |number of target tokens - the prompt's number| / 4 for each completion."""
    targets = set(range(3 + len(NUMBERS), 3 + len(NUMBERS) + len(TARGETS)))
    counts = [sum(token in targets for token in ids) for ids in completion_ids]
    wanted = [1 + NUMBERS.index(prompt) for prompt in prompts]
    return [1 - abs(count - k) / LENGTH for count, k in zip(counts, wanted, strict=True)]


@torch.no_grad()
def log_probabilities(model: Any, prompts: torch.Tensor, end: int, length: int) -> torch.Tensor:
    """Return log-probabilities of all answers, in the order of `torch.cartesian_prod`.

    `prompts` has shape (prompts, tokens), without padding; the result (prompts, vocabulary **
    length). An answer that has ended is followed by end tokens only, so each answer counts once.
    """
    size = model.config.vocab_size
    grid = torch.cartesian_prod(*[torch.arange(size)] * (length - 1)).reshape(-1, length - 1)
    rows = torch.cat([prompts.repeat_interleave(len(grid), 0), grid.repeat(len(prompts), 1)], 1)
    logits = model(input_ids=rows).logits[:, prompts.size(1) - 1 :].double()
    steps = logits.log_softmax(-1).reshape(len(prompts), len(grid), length, size)
    joint = torch.zeros(len(prompts), 1, dtype=torch.double)
    for t in range(length):
        stride = size ** (length - 1 - t)  # one row for each prefix of t tokens
        next_token = steps[:, ::stride, t].clone()
        ended = (grid[::stride, :t] == end).any(dim=1)
        next_token[:, ended] = -torch.inf
        next_token[:, ended, end] = 0.0
        joint = (joint[:, :, None] + next_token).flatten(1)
    return joint


def best_objective(log_initial: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the maximum of E[reward] - beta KL(policy || initial) over all policies, (prompts,).

    It is beta log E_initial[exp(reward / beta)], at policy ~ initial exp(reward / beta).
    """
    return beta * torch.logsumexp(log_initial + rewards / beta, dim=-1)


def exact_figures(
    log_policy: torch.Tensor, log_initial: torch.Tensor, rewards: torch.Tensor, beta: float
) -> dict[str, float]:
    """Return expected reward, KL and objective of a policy, averaged over the prompts."""
    probability = log_policy.exp()
    ratio = torch.where(probability > 0, log_policy - log_initial, 0.0)
    score = (probability * rewards).sum(-1).mean().item()
    kl = (probability * ratio).sum(-1).mean().item()
    return {"exact_score": score, "exact_kl": kl, "objective": score - beta * kl}


def toy(folder: Path, steps: int, beta: float = 0.1) -> Problem:
    """Return the toy, for a random Llama, with its optimum."""
    words = ["<pad>", "<eos>", "<unk>", *NUMBERS, *TARGETS, *OTHERS]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = word_tokenizer(words, "<unk>", **special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, initializer_range=0.15,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "policy")
    ids = torch.tensor(tokenizer(list(NUMBERS))["input_ids"])
    answers = torch.cartesian_prod(*[torch.arange(len(tokenizer))] * LENGTH).tolist()
    rewards = torch.tensor([closeness([k] * len(answers), answers) for k in NUMBERS]).double()
    initial = log_probabilities(model, ids, 1, LENGTH)
    best = initial + rewards / beta
    optimum = exact_figures(best.log_softmax(-1), initial, rewards, beta)
    assert abs(optimum["objective"] - best_objective(initial, rewards, beta).mean()) < 1e-9

    def exact(policy: Any) -> dict[str, float]:
        return exact_figures(log_probabilities(policy, ids, 1, LENGTH), initial, rewards, beta)

    return Problem(
        folder / "policy", tokenizer, list(NUMBERS) * 32, closeness, steps,
        same={"beta": beta, "learning_rate": 1e-3, "max_completion_length": LENGTH},
        ppo_settings={"critic_learning_rate": 3e-3}, facts={"optimum": optimum, "beta": beta},
        exact=exact,
    )  # fmt: skip


# ---- 2. the society's reward ---------------------------------------------------------------------


def society(folder: Path, steps: int) -> Problem:
    """Return the problem of quickstart.yaml's width 32, pretrained on fewer documents."""
    recipe = load_recipe(
        "quickstart", ["data.society.corpus={documents: 24000, stereotypes_first: 6000}"]
    )
    assert recipe.data.society is not None
    data = load_feedback(recipe.data, 0)
    job = JobFacts(folder, seed=0)
    train_base(job, recipe, recipe.models[1], data.preferences)
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    train_reward(job, recipe.reward, data, tokenizer)
    facts = stage_record(job.reward) or {}
    shift, scale = facts["score_mean"], facts["score_standard_deviation"]
    model = load_reward_model(job.reward)
    scorer = RewardModelScorer(model, tokenizer)
    world = make_world(recipe.data.society)
    num_prompts = recipe.data.society.prompts
    drawn = list(society_feedback.prompts(world, num_prompts + 512))
    texts = [list(prompt.messages) for prompt in drawn]
    settings = recipe.policy.trainer
    clip, penalty = settings["score_clip"], settings["missing_eos_penalty"]

    def normalised(**columns: Any) -> list[float]:
        return [(score - shift) / scale for score in scorer(**columns)]

    def shape(scores: list[float], completion_ids: list[list[int]]) -> list[float]:
        ended = torch.tensor([ids[-1] == tokenizer.eos_token_id for ids in completion_ids])
        return shaped_score(torch.tensor(scores), ended, 0.0, 1.0, clip, penalty).tolist()

    shared = ("beta", "max_completion_length")
    return Problem(
        job.base, tokenizer, texts[:num_prompts], normalised, steps,
        same={"learning_rate": LEARNING_RATE, **{key: settings[key] for key in shared}},
        ppo_settings={
            "critic_learning_rate": settings["critic_learning_rate"],
            "critic_path": str(job.reward),
            "score_clip": clip, "missing_eos_penalty": penalty,
        },
        facts={"beta": settings["beta"], "reward_accuracy": facts["held_out_accuracy"]},
        shape=shape, held_out=texts[num_prompts:],
    )  # fmt: skip
