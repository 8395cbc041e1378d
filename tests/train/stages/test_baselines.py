"""Tests of the baselines GRPO, SFT and DPO: PPO's steps, and resuming to the same bytes."""

import inspect
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from selfcorrect.evaluate.prompts.dialogue import AUTO
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.recipes.foundation import signals
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.load import check_recipe, load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.check import check_training
from selfcorrect.train.feedback.feedback import Preference
from selfcorrect.train.run import prepare_run, train_run
from selfcorrect.train.stages import answers
from selfcorrect.train.stages.base import preferred_rows
from selfcorrect.train.stages.dpo import LOSSES, PairTrainer, pair_rows, usable_pairs
from tests.support.tiny_models import WORDS, tiny_model, tiny_tokenizer

SMALL: dict[str, Any] = {
    "name": "small",
    "seeds": [3],
    "models": [
        {
            "name": "tiny",
            "scratch": {
                "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                "max_position_embeddings": 128,
            },
        }
    ],
    "data": {
        "society": {
            "seed": 3, "pairs": 60, "prompts": 60,
            "corpus": {"documents": 120, "stereotypes_first": 20},
        }
    },
    # The base model learns to end some of its texts: a group of unfinished answers teaches nothing.
    "base": {
        "method": "pretrain", "batch_tokens": 256,
        "trainer": {"warmup_steps": 0, "learning_rate": 1e-2},
    },
    "reward": {"trainer": {"num_train_epochs": 1, "per_device_train_batch_size": 16}},
    "policy": {
        "steps": 4,
        "checkpoints": [0, 2, 4],
        "resume_every": 1,
        "trainer": {
            "learning_rate": 1e-3, "critic_learning_rate": 2e-3, "per_device_train_batch_size": 8,
            "steps_per_generation": 2, "num_iterations": 2, "max_completion_length": 6,
            "missing_eos_penalty": 2.0, "score_clip": 4.0,
        },
    },
    "evaluate": {"attach": "off"},
    "launch": {"threads": 1},
}  # fmt: skip
METHODS = {
    "grpo": {"num_generations": 4},
    "sft": {"weight_decay": 0.01},
    "dpo": {"beta": 0.1, "loss_type": "sigmoid"},
}


def recipe_with(method: str, **keys: object) -> Recipe:
    trainer = {**SMALL["policy"]["trainer"], **(keys or METHODS[method])}
    policy = {**SMALL["policy"], "method": method, "trainer": trainer}
    return check_recipe({**SMALL, "policy": policy}, "small")


def train(
    recipe: Recipe, run: Path, stages: Path | None = None, stop_at: int | None = None
) -> None:
    """Train, from the base and reward model of the run `stages` if it is given."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.endswith(f": {recipe.policy.method}") and done == stop_at:
            raise KeyboardInterrupt

    prepare_run(recipe, run, stages_from=stages)
    train_run(recipe, run, interrupt)


def weights(run: Path) -> dict[int, bytes]:
    return {
        c.record.step: (c.folder / "model.safetensors").read_bytes() for c in find_checkpoints(run)
    }


@pytest.fixture(scope="module", autouse=True)
def few_answers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "NUM_ANSWERS", 32)
        yield


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ends with its base and reward model, from which the policies of others start."""
    run = tmp_path_factory.mktemp("stages") / "small"
    with pytest.raises(KeyboardInterrupt):
        train(recipe_with("sft"), run, stop_at=0)
    return run


@pytest.fixture(scope="module", params=METHODS)
def done(request: pytest.FixtureRequest, stages: Path, tmp_path_factory: pytest.TempPathFactory):
    recipe, run = recipe_with(request.param), tmp_path_factory.mktemp("done") / "small"
    train(recipe, run, stages)
    return recipe, run


@pytest.mark.slow
def test_checkpoints_at_the_steps_of_ppo_with_as_many_updates(done) -> None:
    recipe, run = done
    method = recipe.policy.method
    records = [checkpoint.record for checkpoint in find_checkpoints(run)]
    assert [record.step for record in records] == [0, 2, 4]
    # 2 minibatches twice a step, 8 rows each; SFT and DPO read new rows in every update.
    assert [record.optimizer_updates for record in records] == [0, 8, 16]
    per_step = {"grpo": 16, "sft": 32, "dpo": 32}[method]
    assert [record.episodes for record in records] == [0, 2 * per_step, 4 * per_step]
    assert records[2].tokens > records[1].tokens > 0
    kept = weights(run)
    assert len(set(kept.values())) == 3
    # What the raters think of the policy's answers is known for every method and every step.
    worth = [record.answers for record in records]
    assert all(known is not None and known.num == 32 for known in worth)
    assert worth[0].kl == 0 and all(known.utility >= -3 for known in worth)
    log = json.loads((run / "tiny/seed-3" / method / "stage.json").read_text())["log"]
    assert [entry["ppo_step"] for entry in log] == [1, 2, 3, 4]
    if method == "grpo":
        assert records[2].kl is not None and records[2].kl != 0
        assert records[2].reward == log[-1]["objective/score"]
        assert "reward_std" in log[-1]
    else:
        assert records[2].kl is None and records[2].reward is None
    if method == "dpo":
        assert log[0]["rewards/margins"] < log[-1]["rewards/margins"]  # means over a step
        assert log[-1]["rewards/accuracies"] > 0.5


@pytest.mark.slow
def test_interrupted_run_resumes_bitwise(done, stages: Path, tmp_path: Path) -> None:
    recipe, run = done
    again = tmp_path / "small"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, again, stages, stop_at=3)
    assert set(weights(again)) == {0, 2}
    train(recipe, again)
    assert weights(again) == weights(run)
    first, second = find_checkpoints(run)[-1].record, find_checkpoints(again)[-1].record
    assert (first.episodes, first.tokens, first.kl) == (second.episodes, second.tokens, second.kl)


@pytest.mark.slow
def test_sigterm_ends_with_the_step_and_resumes_bitwise(
    done, stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = done
    again, reports = tmp_path / "small", []

    def terminate(stage: str, done: int, total: int) -> None:
        reports.append(stage.partition(": ")[2])
        if reports.count(recipe.policy.method) == 7:  # in the second step; one precedes the first
            monkeypatch.setattr(signals, "_requested", True)

    prepare_run(recipe, again, stages_from=stages)
    with pytest.raises(signals.Terminated):
        train_run(recipe, again, terminate)
    states = [
        path.name
        for path in (again / f"tiny/seed-3/{recipe.policy.method}.work").glob("checkpoint-*")
    ]
    assert max(states, key=lambda name: int(name.partition("-")[2])) == "checkpoint-8"
    monkeypatch.setattr(signals, "_requested", False)
    train(recipe, again)
    assert weights(again) == weights(run)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_lora_adapters_are_trained(method: str, stages: Path, tmp_path: Path) -> None:
    recipe, run = recipe_with(method), tmp_path / "small"
    lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    recipe = recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"lora": lora})})
    train(recipe, run, stages)
    adapters = [c.folder / "adapter_model.safetensors" for c in find_checkpoints(run)]
    assert len({path.read_bytes() for path in adapters}) == 3
    assert not any((path.parent / "model.safetensors").exists() for path in adapters)
    assert find_checkpoints(run)[0].record.adapter_of is not None


@pytest.mark.slow
def test_sft_makes_preferred_answers_likelier(stages: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selfcorrect.train.feedback.feedback import load_feedback
    from selfcorrect.train.stages.base import preferred_rows

    recipe, run = recipe_with("sft", learning_rate=1e-2), tmp_path / "small"
    train(recipe, run, stages)
    pairs = load_feedback(recipe.data, 3).preferences[:20]
    likelihoods = []
    for checkpoint in find_checkpoints(run):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
        total = 0.0
        for row in preferred_rows(tokenizer, pairs):
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1)
            answer = torch.tensor(row["completion_mask"][1:]).bool()
            total += float(logs.gather(1, ids[0, 1:, None])[answer].sum())
        likelihoods.append(total)
    assert likelihoods[0] < likelihoods[1] < likelihoods[2]


PREFERENCES = [
    ("What is it?", "A lake.", "No idea, no."),
    ("Who?", "She.", "He was."),
    ("Who was late?", "Nobody.", "He."),
    ("Why?", "Both sides.", "Both sides."),
]


@pytest.fixture
def given(tmp_path: Path) -> tuple[Any, Any, list[Preference]]:
    """A tiny random model, its tokenizer, and pairs of which the last has equal sides."""
    words = sorted({word for row in PREFERENCES for text in row for word in text.split()})
    tokenizer = tiny_tokenizer([*WORDS, *words])
    model = tiny_model(vocabulary=len(tokenizer))
    pairs = [
        Preference([{"role": "user", "content": prompt}], chosen, rejected)
        for prompt, chosen, rejected in PREFERENCES
    ]
    return model, tokenizer, pairs


def test_pairs_of_dpo_are_the_ids_of_sft_and_equal_or_long_ones_are_counted(given) -> None:
    model, tokenizer, pairs = given
    rows = pair_rows(tokenizer, pairs, AUTO)
    for row, sft in zip(rows, preferred_rows(tokenizer, pairs), strict=True):
        assert row["prompt_ids"] + row["chosen_ids"] == sft["input_ids"]
        assert len(row["chosen_ids"]) == sum(sft["completion_mask"])
    longest = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in rows
    ]
    kept, left_out = usable_pairs(rows, max(longest) - 1, model)
    assert len(kept) == 3 - longest[:3].count(max(longest))
    assert left_out["both sides are the same tokens"] == 1
    assert left_out[f"longer than max_length, {max(longest) - 1} tokens"] == len(rows) - 1 - len(
        kept
    )
    with pytest.raises(InputError, match="policy: no pair can be trained on: both sides are"):
        usable_pairs(rows[3:], None, model)


def pair_trainer(given: Any, tmp_path: Path, **settings: Any) -> PairTrainer:
    model, tokenizer, pairs = given
    arguments = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, learning_rate=3e-3, max_steps=8,
        logging_steps=1, report_to="none", disable_tqdm=True, bf16=False, use_cpu=True,
        remove_unused_columns=False, gradient_checkpointing=False, save_strategy="no", **settings,
    )  # fmt: skip
    rows = Dataset.from_list(pair_rows(tokenizer, pairs[:3], AUTO))
    return PairTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)


def log_ratio(model: Any, row: dict[str, list[int]]) -> float:
    """Return log p(chosen) - log p(rejected), by the model's own forward, a text at a time."""
    values = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        values.append(float(logs[-len(row[side]) :].sum()))
    return values[0] - values[1]


def test_dpo_loss_by_hand_and_its_margin_rises(given, tmp_path: Path) -> None:
    """The first loss is log 2; then the margin is beta times the change of the log-ratio."""
    model, tokenizer, pairs = given
    rows = pair_rows(tokenizer, pairs[:3], AUTO)
    before = [log_ratio(model, row) for row in rows]
    trainer = pair_trainer(given, tmp_path, beta=0.5)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    margins = [entry["rewards/margins"] for entry in log]
    assert margins[-1] > margins[len(margins) // 2] > 0
    with torch.no_grad():
        batch = trainer.data_collator(rows)
        trainer.model.train()
        loss = float(trainer._compute_loss(trainer.model, batch, False))
    change = [log_ratio(trainer.model, row) - old for row, old in zip(rows, before, strict=True)]
    assert all(value > 0 for value in change)
    expected = -torch.nn.functional.logsigmoid(0.5 * torch.tensor(change)).mean()
    assert loss == pytest.approx(float(expected), abs=1e-4)


def test_losses_of_dpo_are_trls() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    names = re.findall(r'loss_type == "(\w+)"', source)
    assert sorted(names) == sorted(LOSSES)


def test_dpo_stops_where_the_reference_or_the_head_is_another(
    given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = pair_trainer(given, tmp_path)
    with torch.no_grad():
        trainer.ref_model.lm_head.weight.mul_(1.5)
    with pytest.raises(RunFailure, match="log-probabilities of policy and reference differ by"):
        trainer.train()
    trainer = pair_trainer(given, tmp_path)
    forward = trainer.model.forward

    def wrong(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        output = forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        if fused_lm_head:
            output.log_probs = output.log_probs * 1.1
        return output

    monkeypatch.setattr(trainer.model, "forward", wrong)
    with pytest.raises(RunFailure, match="TRL's fused head and the model's own differ by"):
        trainer.train()


def test_dpo_of_a_model_with_dropout_begins_at_no_margin(given, tmp_path: Path) -> None:
    """OPT's dropout is in its config and applied in functions, out of reach of TRL's switch."""
    from transformers import OPTConfig, OPTForCausalLM

    _, tokenizer, pairs = given
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, ffn_dim=32, num_hidden_layers=2, dropout=0.4,
        num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16,
        attention_dropout=0.4,
    )  # fmt: skip
    trainer = pair_trainer((OPTForCausalLM(config), tokenizer, pairs), tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        ("dpo", {"bet": 0.2}, "policy.trainer.bet: unknown key; did you mean beta?"),
        ("dpo", {"loss_type": "dapo"}, "policy.trainer.loss_type: 'dapo' is no loss of DPO"),
        ("dpo", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs: this is set by the"),
        ("dpo", {"max_steps": 3}, "policy.trainer.max_steps: this is set by the run"),
        (
            "grpo",
            {"chat_template_kwargs": {"a": 1}},
            "chat_template_kwargs at the top of the recipe",
        ),
        ("sft", {"eos_token": "<eos>"}, "policy.trainer.eos_token: the run tokenises with"),
        ("grpo", {"num_generation": 4}, "policy.trainer.num_generation: unknown key; did you mean"),
        ("grpo", {"num_generations": 7}, "divisible"),
        ("sft", {"packin": True}, "policy.trainer.packin: unknown key"),
        ("sft", {"max_length": "long"}, "policy.trainer.max_length"),
        ("sft", {"max_steps": 3}, "policy.trainer.max_steps: this is set by the run"),
    ],
)
def test_wrong_keys_are_one_line(method, keys, message) -> None:
    with pytest.raises(InputError) as caught:
        check_training(recipe_with(method, **keys))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_offline_methods_ignore_ppo_keys_and_take_their_own(method: str) -> None:
    from selfcorrect.train.stages.baselines import offline_arguments
    from selfcorrect.train.stages.policy import policy_arguments

    keys = {"sft": {"loss_type": "dft"}, "dpo": {"loss_type": "ipo", "beta": 0.3}}[method]
    recipe = recipe_with(method, weight_decay=0.01, max_length=64, **keys)
    arguments = policy_arguments(recipe.policy, Path("nowhere"), 0)
    tuning = offline_arguments(recipe.policy, arguments)
    if method == "dpo":
        assert (tuning.loss_type, tuning.beta, tuning.gradient_checkpointing) == (
            ["ipo"],
            0.3,
            False,
        )
    else:
        assert tuning.loss_type == "dft"
    assert (tuning.learning_rate, tuning.per_device_train_batch_size) == (1e-3, 8)
    assert (tuning.max_steps, tuning.weight_decay, tuning.max_length) == (16, 0.01, 64)
    assert (tuning.adam_epsilon, tuning.lr_scheduler_type) == (arguments.adam_epsilon, "constant")
    assert not hasattr(tuning, "score_clip")


def test_grpo_reads_ppos_settings() -> None:
    from selfcorrect.train.stages.policy import policy_arguments

    arguments = policy_arguments(recipe_with("grpo").policy, Path("nowhere"), 0)
    assert (arguments.num_generations, arguments.scale_rewards) == (4, "group")
    assert (arguments.learning_rate, arguments.num_iterations, arguments.max_steps) == (1e-3, 2, 16)


@pytest.mark.parametrize("method", METHODS)
def test_baselines_train_in_one_process(method: str) -> None:
    with pytest.raises(InputError, match=rf"policy\.method: {method} .*launch\.processes"):
        load_recipe("quickstart", [f"policy.method={method}", "launch.processes=2"])
