"""Metrics that a run logs through `report_to`, against numbers computed row by row."""

import copy
import json
import math
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer import grpo_trainer

from selfcorrect.train.ppo import timing
from selfcorrect.train.ppo.timing import PhaseTimer
from selfcorrect.train.ppo.trainer import _table_entry
from tests.support import ROOT
from tests.support.ppo_models import (
    END,
    RecordingReward,
    make_tokenizer,
    make_trainer,
    target_share,
)

STEPS, EPOCHS, ROWS = 3, 2, 8
SETTINGS = {
    "per_device_train_batch_size": ROWS, "steps_per_generation": 1, "num_iterations": EPOCHS,
    "max_steps": STEPS * EPOCHS, "logging_steps": EPOCHS, "learning_rate": 2e-2,
    "missing_eos_penalty": 0.4, "score_shift": 0.1, "score_scale": 0.5, "beta": 0.2,
    "kl_target": 0.5, "kl_horizon": 50, "lr_scheduler_type": "constant",
}  # fmt: skip
METRICS = {
    "objective/score", "objective/score_std", "objective/rlhf_reward", "objective/kl",
    "objective/kl_coef", "entropy", "clip_ratio/region_mean", "clip_ratio/low_mean",
    "clip_ratio/high_mean", "clip_ratio/low_min", "clip_ratio/high_max", "value/clip_fraction",
    "value/loss", "value/explained_variance", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/ended_by_eos", "num_tokens", "episodes", "ppo_step",
}  # fmt: skip
TIMES = {"time/generate", "time/score", "time/train", "tokens_per_second"}


def skip_without(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed, so logging to it is not tested")


class Snapshots(TrainerCallback):
    """Weights of policy and head before the first update and after each."""

    def __init__(self) -> None:
        self.trainer, self.weights = None, []

    def on_train_begin(self, args, state, control, **_):
        policy = self.trainer.language_model.state_dict()
        policy = {name: tensor for name, tensor in policy.items() if "critic" not in name}
        self.weights.append(copy.deepcopy((policy, self.trainer.critic.head.state_dict())))

    on_step_end = on_train_begin


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A run of three PPO steps: its trainer, rollouts, snapshots and folder."""
    skip_without("tensorboard")
    folder = tmp_path_factory.mktemp("logged")
    reward, snapshots = RecordingReward(), Snapshots()
    trainer = snapshots.trainer = make_trainer(
        models, folder, reward=reward, callbacks=[snapshots], report_to=["tensorboard"], **SETTINGS
    )
    torch.nn.init.normal_(trainer.critic.head.weight, std=0.2)
    trainer.train()
    return trainer, reward, snapshots, folder


def read_events(folder) -> dict[str, dict[int, float]]:
    """Return the scalars of the event files below a folder: name, optimizer update, value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, dict[int, float]] = {}
    for path in folder.rglob("events.out.tfevents*"):
        file = EventAccumulator(str(path.parent)).Reload()
        for tag in file.Tags()["scalars"]:
            scalars[tag] = {event.step: event.value for event in file.Scalars(tag)}
    return scalars


def evaluate(models, weights, head, prompt, completion):
    """Return log-probabilities, entropies and values of one row without padding."""
    model = AutoModelForCausalLM.from_pretrained(models / "base")
    model.load_state_dict(weights)
    with torch.no_grad():
        output = model(torch.tensor([prompt + completion]), output_hidden_states=True)
        distribution = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_probs = distribution.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        hidden = output.hidden_states[-1][0, len(prompt) - 1 : -1]
        values = hidden @ head["weight"][0] + head["bias"]
    entropies = -(distribution.exp() * distribution).sum(-1)
    return log_probs.tolist(), entropies.tolist(), values.tolist()


def expected_metrics(models, snapshots, step, rollout, coefficient, args):
    """Return the metrics of one PPO step, from weights before and after its first update."""
    tokenizer, (prompts, completions, scores) = make_tokenizer(), rollout
    rendered = [f"Human: {prompt[0]['content']} Assistant:" for prompt in prompts]
    rows = list(zip(tokenizer(rendered)["input_ids"], completions, strict=True))
    first = [evaluate(models, *snapshots[EPOCHS * step], *row) for row in rows]
    second = [evaluate(models, *snapshots[EPOCHS * step + 1], *row) for row in rows]
    reference = [evaluate(models, *snapshots[0], *row)[0] for row in rows]
    kl, total, advantages, targets = [], [], [], []
    for (old, _, values), ref, completion, score in zip(
        first, reference, completions, scores, strict=True
    ):
        kl.append(sum(a - b for a, b in zip(old, ref, strict=True)))
        rewards = [-coefficient * (a - b) for a, b in zip(old, ref, strict=True)]
        rewards[-1] += (score - args.score_shift) / args.score_scale
        rewards[-1] -= 0.0 if completion[-1] == END else args.missing_eos_penalty
        total.append(sum(rewards))
        running, next_value = 0.0, 0.0
        row_advantages = []
        for reward, value in zip(rewards[::-1], values[::-1], strict=True):
            running = reward + next_value - value + args.lam * running
            next_value = value
            row_advantages.insert(0, running)
        advantages += row_advantages
        targets += [a + v for a, v in zip(row_advantages, values, strict=True)]
    old, entropy, old_values = ([x for row in first for x in row[i]] for i in range(3))
    new, new_entropy, values = ([x for row in second for x in row[i]] for i in range(3))
    mean, deviation = statistics.fmean(advantages), statistics.pstdev(advantages)
    whitened = [(a - mean) / deviation for a in advantages]
    ratios = [math.exp(a - b) for a, b in zip(new, old, strict=True)]
    low = [r < 0.8 and a < 0 for r, a in zip(ratios, whitened, strict=True)]
    high = [r > 1.2 and a > 0 for r, a in zip(ratios, whitened, strict=True)]
    errors, value_clipped = [], []
    for value, old_value, target in zip(values, old_values, targets, strict=True):
        near = min(max(value, old_value - 0.2), old_value + 0.2)
        errors.append(max((value - target) ** 2, (near - target) ** 2) / 2)
        value_clipped.append((near - target) ** 2 > (value - target) ** 2)
    first_errors = [(v - t) ** 2 / 2 for v, t in zip(old_values, targets, strict=True)]
    residuals = [t - v for v, t in zip(old_values, targets, strict=True)]
    lengths = [len(completion) for completion in completions]

    def row_means(clipped):
        ends = [sum(lengths[: i + 1]) for i in range(ROWS)]
        return [
            statistics.fmean(clipped[end - n : end]) for end, n in zip(ends, lengths, strict=True)
        ]

    return {
        "objective/score": statistics.fmean(scores),
        "objective/score_std": statistics.pstdev(scores),
        "objective/rlhf_reward": statistics.fmean(total),
        "objective/kl": statistics.fmean(kl),
        "objective/kl_coef": coefficient,
        "entropy": (statistics.fmean(entropy) + statistics.fmean(new_entropy)) / 2,
        # The first update's ratios are all 1, so nothing is clipped in it.
        "clip_ratio/low_mean": statistics.fmean(low) / 2,
        "clip_ratio/high_mean": statistics.fmean(high) / 2,
        "clip_ratio/region_mean": statistics.fmean(a or b for a, b in zip(low, high, strict=True))
        / 2,
        "clip_ratio/low_min": min(row_means(low)) / 2,
        "clip_ratio/high_max": max(row_means(high)) / 2,
        "value/clip_fraction": statistics.fmean(value_clipped) / 2,
        "value/loss": (statistics.fmean(first_errors) + statistics.fmean(errors)) / 2,
        "value/explained_variance": 1
        - statistics.pvariance(residuals) / statistics.pvariance(targets),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/ended_by_eos": statistics.fmean(c[-1] == END for c in completions),
        "num_tokens": sum(lengths) + sum(len(prompt) for prompt, _ in rows),
        "episodes": ROWS * (step + 1),
        "ppo_step": step + 1,
    }


def test_tensorboard_has_every_metric_as_computed_by_row(run, models):
    trainer, reward, snapshots, folder = run
    events = read_events(folder)
    coefficient, tokens, clipped, moved = 0.2, 0, 0.0, 0.0
    for step in range(STEPS):
        expected = expected_metrics(
            models, snapshots.weights, step, reward.calls[step], coefficient, trainer.args
        )
        tokens = expected["num_tokens"] = expected["num_tokens"] + tokens
        assert expected.keys() == METRICS
        logged = {name: events[f"train/{name}"][EPOCHS * (step + 1)] for name in METRICS}
        assert logged == pytest.approx(expected, rel=1e-3, abs=2e-4)
        error = min(max(expected["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        coefficient *= 1 + error * ROWS / 50
        clipped, moved = clipped + logged["clip_ratio/high_max"], moved + logged["objective/kl"]
    assert clipped > 0 and moved > 0.01, "nothing happened that a wrong metric could miss"
    assert tokens == trainer.tokens


# ---- times -------------------------------------------------------------------------------------


class Clock:
    """Stands still until told to advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def delay(self, seconds, function):
        """Return the function, which then takes `seconds` on this clock."""

        def delayed(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return delayed


def test_times_of_each_phase_and_tokens_per_second(models, tmp_path, monkeypatch):
    """A step generates (7 s), scores (5 s), and makes 4 updates (loss 2 s, optimizer 3 s)."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    reward = clock.delay(5, target_share)
    trainer = make_trainer(models, tmp_path, reward=reward, max_steps=8)
    trainer._generate_single_turn = clock.delay(7, trainer._generate_single_turn)
    trainer._compute_loss = clock.delay(2, trainer._compute_loss)
    trainer.create_optimizer()
    trainer.optimizer.step = clock.delay(3, trainer.optimizer.step)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "ppo_step" in entry]
    for phase, seconds in {
        "generate": [7, 0, 0, 0],
        "score": [5, 0, 0, 0],
        "train": [5] * 4,
    }.items():
        assert [entry[f"time/{phase}"] for entry in log] == seconds * 2, phase
    tokens = [entry.get("num_tokens") for entry in log]
    rates = [entry.get("tokens_per_second") for entry in log]
    assert [rate is not None for rate in rates] == [False, False, False, True] * 2
    assert rates[3] == tokens[0] / 32 and rates[7] == (tokens[4] - tokens[0]) / 32


def test_phase_inside_a_phase_is_counted_once(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 25.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    timer = PhaseTimer()
    with timer.phase("score"), timer.phase("generate"):
        pass
    timer.on_pre_optimizer_step(None, None, None)
    timer.on_optimizer_step(None, None, None)
    assert timer.tokens_per_second(60) == pytest.approx(60 / 15)
    assert timer.tokens_per_second(60) is None
    assert timer.since_last_log() == {"generate": 3.0, "score": 7.0, "train": 5.0}
    assert timer.since_last_log() == {"generate": 0.0, "score": 0.0, "train": 0.0}


# ---- tables of completions ----------------------------------------------------------------------


def test_completions_are_tables_with_score_and_kl(models, tmp_path, capsys, monkeypatch):
    """In TRL's parquet files at every logged update, in wandb and trackio, as text in TensorBoard.

    The two services are stand-ins that keep what TRL sends them.
    """
    skip_without("tensorboard")
    import pandas as pd
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reward = RecordingReward()
    settings = {**SETTINGS, "max_steps": 2 * EPOCHS, "log_completions": True}
    trainer = make_trainer(models, tmp_path, reward=reward, report_to=["tensorboard"], **settings)
    sent = {"wandb": [], "trackio": []}
    for name, calls in sent.items():
        service = SimpleNamespace(run="a run", Table=lambda dataframe: dataframe, log=calls.append)
        monkeypatch.setattr(grpo_trainer, name, service, raising=False)
    trainer.args.report_to = ["tensorboard", *sent]
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert len(logged) == 2
    (events,) = tmp_path.rglob("events.out.tfevents*")
    file = EventAccumulator(str(events.parent)).Reload()
    texts = {
        e.step: e.tensor_proto.string_val[0].decode()
        for e in file.Tensors("completions/text_summary")
    }
    for number, entry in enumerate(logged):
        update = (number + 1) * EPOCHS
        (path,) = tmp_path.rglob(f"completions_{update:05d}.parquet")
        table = pd.read_parquet(path)
        scores = reward.calls[number][2]
        assert list(table["score"]) == pytest.approx(scores)
        assert table["kl"].mean() == pytest.approx(entry["objective/kl"], abs=1e-5)
        assert len(table) == ROWS and {"prompt", "completion"} <= set(table)
        for calls in sent.values():
            # TRL sends the last table again with the summary of the training.
            assert len(calls) == len(logged) + 1 and list(calls[number]) == ["completions"]
            shown = calls[number]["completions"]
            assert list(shown["score"]) == list(table["score"]) and set(shown) == set(table)
            assert list(shown["kl"]) == list(table["kl"])
        header, _, *rows = texts[update].splitlines()
        assert [c.strip() for c in header.strip("|").split("|")][:2] == ["prompt", "completion"]
        assert len(rows) == ROWS
        for row, score, kl in zip(rows, table["score"], table["kl"], strict=True):
            assert row.endswith(f"| {score:.4g} | {kl:.4g} |")


def test_table_entries_are_no_markup():
    assert _table_entry("a|b <i>\n\x1b") == "a&#124;b &lt;i&gt;<br>⟨U+001B⟩"
    assert _table_entry([{"role": "user", "content": "<b>"}]) == "user: &lt;b&gt;"


# ---- other services ----------------------------------------------------------------------------


def test_wandb_offline_has_the_metrics(models, tmp_path, monkeypatch):
    skip_without("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    trainer = make_trainer(models, tmp_path / "out", report_to=["wandb"], **SETTINGS)
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    last = trainer.state.log_history[-2]
    for name in METRICS | TIMES:
        assert summary[f"train/{name}"] == pytest.approx(last[name]), name
    assert list(tmp_path.rglob("*.wandb"))


TRACKIO = f"""
import json, sys
from pathlib import Path
from trackio.sqlite_storage import SQLiteStorage
from tests.support.ppo_models import make_trainer
models, folder = Path(sys.argv[1]), Path(sys.argv[2])
trainer = make_trainer(models, folder / "out", report_to=["trackio"], run_name="logged",
                       project="tiny", **{SETTINGS})
trainer.train()
history = SQLiteStorage.get_logs("tiny", "logged")
(folder / "logged.json").write_text(json.dumps([trainer.state.log_history[-2], history]))
"""


@pytest.mark.timeout(1000)
def test_trackio_has_the_metrics(models, tmp_path):
    """In a process of its own: trackio reads its folder's name once, on import."""
    skip_without("trackio")
    environment = {
        **os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(models), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    last, history = json.loads((tmp_path / "logged.json").read_text())
    logged = [entry for entry in history if "train/ppo_step" in entry][-1]
    for name in METRICS | TIMES:
        assert logged[f"train/{name}"] == pytest.approx(last[name]), name
