"""What a run logs, through the Trainer's `report_to`, against figures worked out row by row."""

import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from selfcorrect.train.ppo.timing import PhaseClock
from tests.support import ROOT
from tests.train.ppo.test_ppo_trainer import (  # noqa: F401  (home and quiet are fixtures)
    Rollouts,
    home,
    make_tokenizer,
    make_trainer,
    quiet,
)

STEPS, EPOCHS, ROWS = 3, 2, 8
SETTINGS = {
    "per_device_train_batch_size": ROWS, "steps_per_generation": 1, "num_iterations": EPOCHS,
    "max_steps": STEPS * EPOCHS, "logging_steps": EPOCHS, "learning_rate": 2e-2,
    "missing_eos_penalty": 0.4, "score_shift": 0.1, "score_scale": 0.5, "beta": 0.2,
    "kl_target": 0.5, "kl_horizon": 50, "lr_scheduler_type": "constant",
}  # fmt: skip
NAMES = {
    "objective/score", "objective/score_std", "objective/rlhf_reward", "objective/kl",
    "objective/kl_coef", "entropy", "clip_ratio/region_mean", "value/clip_fraction", "value/loss",
    "value/explained_variance", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/ended_by_eos", "num_tokens", "episodes", "ppo_step",
}  # fmt: skip
TIMES = {"time/generate", "time/score", "time/train", "tokens_per_second"}


class Snapshots(TrainerCallback):
    """Weights of policy and head before the first update and after each; seconds in between."""

    def __init__(self):
        self.trainer, self.taken, self.seconds = None, [], 0.0

    def take(self):
        trainer = self.trainer
        self.seconds += time.perf_counter() - self.left if self.taken else 0.0
        weights = {
            k: v for k, v in trainer.language_model.state_dict().items() if "critic" not in k
        }
        self.taken.append(copy.deepcopy((weights, trainer.critic.head.state_dict())))
        self.left = time.perf_counter()

    def on_train_begin(self, args, state, control, **unused):
        self.take()

    def on_step_end(self, args, state, control, **unused):
        self.take()


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):  # noqa: F811
    """A run of three PPO steps: its trainer, rollouts, snapshots and folder."""
    if not _installed("tensorboard"):
        pytest.skip("tensorboard is not installed: nothing is known of report_to; pip install it")
    folder = tmp_path_factory.mktemp("logged")
    rollouts, snapshots = Rollouts(), Snapshots()
    trainer = make_trainer(
        home, folder, reward=rollouts, callbacks=[snapshots], report_to=["tensorboard"], **SETTINGS
    )
    torch.nn.init.normal_(trainer.critic.head.weight, std=0.2)
    snapshots.trainer = trainer
    trainer.train()
    return trainer, rollouts, snapshots, folder


def _installed(name: str) -> bool:
    return find_spec(name) is not None


def events(folder) -> dict[str, dict[int, float]]:
    """Scalars of the event files below a folder: name, optimizer update, value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for path in folder.rglob("events.out.tfevents*"):
        file = EventAccumulator(str(path.parent)).Reload()
        for tag in file.Tags()["scalars"]:
            found[tag] = {event.step: event.value for event in file.Scalars(tag)}
    return found


def evaluate(home, weights, head, prompt, completion):  # noqa: F811
    """Log-probabilities, entropies and values of one row without padding."""
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    model.load_state_dict(weights)
    with torch.no_grad():
        out = model(torch.tensor([prompt + completion]), output_hidden_states=True)
        every = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = every.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        hidden = out.hidden_states[-1][0, len(prompt) - 1 : -1]
        values = hidden @ head["weight"][0] + head["bias"]
    return chosen.tolist(), (-(every.exp() * every).sum(-1)).tolist(), values.tolist()


def by_hand(home, taken, step, rollout, coefficient, args):  # noqa: F811
    """The figures of one PPO step, from weights before and after its first update."""
    tokenizer, (prompts, completions, scores) = make_tokenizer(), rollout
    rendered = [f"Human: {prompt[0]['content']} Assistant:" for prompt in prompts]
    rows = list(zip(tokenizer(rendered)["input_ids"], completions, strict=True))
    first = [evaluate(home, *taken[EPOCHS * step], *row) for row in rows]
    second = [evaluate(home, *taken[EPOCHS * step + 1], *row) for row in rows]
    reference = [evaluate(home, *taken[0], *row)[0] for row in rows]
    kl, total, advantages, targets = [], [], [], []
    for (old, _, values), ref, completion, score in zip(
        first, reference, completions, scores, strict=True
    ):
        kl.append(sum(a - b for a, b in zip(old, ref, strict=True)))
        rewards = [-coefficient * (a - b) for a, b in zip(old, ref, strict=True)]
        rewards[-1] += (score - args.score_shift) / args.score_scale
        rewards[-1] -= 0.0 if completion[-1] == 1 else args.missing_eos_penalty
        total.append(sum(rewards))
        running, following = 0.0, 0.0
        of_row = []
        for reward, value in zip(rewards[::-1], values[::-1], strict=True):
            running = reward + following - value + args.lam * running
            following = value
            of_row.insert(0, running)
        advantages += of_row
        targets += [a + v for a, v in zip(of_row, values, strict=True)]
    old, entropy, old_values = ([x for row in first for x in row[i]] for i in range(3))
    new, new_entropy, values = ([x for row in second for x in row[i]] for i in range(3))
    mean, deviation = statistics.fmean(advantages), statistics.pstdev(advantages)
    whitened = [(a - mean) / deviation for a in advantages]
    ratios = [math.exp(a - b) for a, b in zip(new, old, strict=True)]
    clipped = [
        (r < 0.8 and a < 0) or (r > 1.2 and a > 0) for r, a in zip(ratios, whitened, strict=True)
    ]
    errors, value_clipped = [], []
    for value, was, target in zip(values, old_values, targets, strict=True):
        near = min(max(value, was - 0.2), was + 0.2)
        errors.append(max((value - target) ** 2, (near - target) ** 2) / 2)
        value_clipped.append((near - target) ** 2 > (value - target) ** 2)
    before = [(v - t) ** 2 / 2 for v, t in zip(old_values, targets, strict=True)]
    residuals = [t - v for v, t in zip(old_values, targets, strict=True)]
    lengths = [len(completion) for completion in completions]
    return {
        "objective/score": statistics.fmean(scores),
        "objective/score_std": statistics.pstdev(scores),
        "objective/rlhf_reward": statistics.fmean(total),
        "objective/kl": statistics.fmean(kl),
        "objective/kl_coef": coefficient,
        "entropy": (statistics.fmean(entropy) + statistics.fmean(new_entropy)) / 2,
        "clip_ratio/region_mean": statistics.fmean(clipped) / 2,  # the first ratios are all 1
        "value/clip_fraction": statistics.fmean(value_clipped) / 2,
        "value/loss": (statistics.fmean(before) + statistics.fmean(errors)) / 2,
        "value/explained_variance": 1
        - statistics.pvariance(residuals) / statistics.pvariance(targets),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/ended_by_eos": statistics.fmean(c[-1] == 1 for c in completions),
        "num_tokens": sum(lengths) + sum(len(prompt) for prompt, _ in rows),
        "episodes": ROWS * (step + 1),
        "ppo_step": step + 1,
    }


def test_tensorboard_has_every_figure_as_worked_out_by_hand(run, home):  # noqa: F811
    trainer, rollouts, snapshots, folder = run
    logged = events(folder)
    coefficient, tokens, clips, moved = 0.2, 0, 0.0, 0.0
    for step in range(STEPS):
        figures = by_hand(
            home, snapshots.taken, step, rollouts.seen[step], coefficient, trainer.args
        )
        tokens = figures["num_tokens"] = figures["num_tokens"] + tokens
        assert figures.keys() == NAMES
        found = {name: logged[f"train/{name}"][EPOCHS * (step + 1)] for name in NAMES}
        assert found == pytest.approx(figures, rel=1e-3, abs=2e-4)
        error = min(max(figures["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        coefficient *= 1 + error * ROWS / 50
        clips, moved = clips + found["clip_ratio/region_mean"], moved + found["objective/kl"]
    assert clips > 0 and moved > 0.01, "nothing happened that a wrong figure could miss"


def test_times_and_tokens_a_second_add_up_to_the_run(run):
    trainer, _, snapshots, folder = run
    logged = events(folder)
    assert {f"train/{name}" for name in TIMES} <= logged.keys()
    phases = [logged[f"train/time/{phase}"] for phase in ("generate", "score", "train")]
    assert all(seconds > 0 for phase in phases for seconds in phase.values())
    spent = {update: sum(phase[update] for phase in phases) for update in phases[0]}
    assert 0.7 * snapshots.seconds < sum(spent.values()) < snapshots.seconds
    before = 0.0
    for update, rate in logged["train/tokens_per_second"].items():
        tokens = logged["train/num_tokens"][update]
        assert rate == pytest.approx((tokens - before) / spent[update], rel=1e-3)
        before = tokens
    assert before == trainer.tokens


def test_a_phase_within_a_phase_is_timed_once(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 25.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = PhaseClock()
    with clock.phase("score"), clock.phase("generate"):
        pass
    clock.on_pre_optimizer_step(None, None, None)
    clock.on_optimizer_step(None, None, None)
    assert clock.tokens_per_second(60) == pytest.approx(60 / 15)
    assert clock.tokens_per_second(60) is None
    assert clock.since_last_log() == {"generate": 3.0, "score": 7.0, "train": 5.0}
    assert clock.since_last_log() == {"generate": 0.0, "score": 0.0, "train": 0.0}


def test_a_rate_is_logged_where_a_ppo_step_is_finished(home, tmp_path):  # noqa: F811
    trainer = make_trainer(home, tmp_path, max_steps=8)  # 4 updates a PPO step, all logged
    trainer.train()
    rates = [entry.get("tokens_per_second") for entry in trainer.state.log_history[:8]]
    assert [rate is not None for rate in rates] == [False, False, False, True] * 2


def test_wandb_offline_has_the_figures(home, tmp_path, monkeypatch):  # noqa: F811
    if not _installed("wandb"):
        pytest.skip("wandb is not installed, so no run was seen logging to it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    trainer = make_trainer(home, tmp_path / "out", report_to=["wandb"], **SETTINGS)
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    last = trainer.state.log_history[-2]
    for name in NAMES | TIMES:
        assert summary[f"train/{name}"] == pytest.approx(last[name]), name
    assert list(tmp_path.rglob("*.wandb"))


TRACKIO = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import tests.train.ppo.test_ppo_logging as t
import tests.train.ppo.test_ppo_trainer as own
from pathlib import Path
from trackio.sqlite_storage import SQLiteStorage
home, folder = Path(sys.argv[2]), Path(sys.argv[3])
trainer = own.make_trainer(home, folder / "out", report_to=["trackio"], run_name="seen",
                           project="tiny", **t.SETTINGS)
trainer.train()
history = SQLiteStorage.get_logs("tiny", "seen")
(folder / "seen.json").write_text(json.dumps([trainer.state.log_history[-2], history]))
"""


def test_trackio_has_the_figures(home, tmp_path):  # noqa: F811
    if not _installed("trackio"):
        pytest.skip("trackio is not installed, so no run was seen logging to it")
    script = tmp_path / "seen.py"
    script.write_text(TRACKIO)
    arguments = [str(ROOT), str(home), str(tmp_path)]
    # Read when it is imported, so only a process of its own keeps it out of the user's cache.
    environment = {
        **os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": ":".join(sys.path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    last, history = json.loads((tmp_path / "seen.json").read_text())
    kept = [entry for entry in history if "train/ppo_step" in entry][-1]
    for name in NAMES | TIMES:
        assert kept[f"train/{name}"] == pytest.approx(last[name]), name
