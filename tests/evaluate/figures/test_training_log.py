"""The trainer's log of a run, finished or not, and its smoothed course."""

import json

import numpy as np
import pandas as pd
import pytest

from selfcorrect.evaluate.figures import curves
from selfcorrect.evaluate.figures.training_log import smoothed, training_log
from selfcorrect.evaluate.results import load
from tests.support.recorded_run import Size, record_run

SIZE = Size(models=(("nano", 8192),), steps=(0, 10), templates=2, blocks=1, occupations=4,
            students=4, samples=False)  # fmt: skip


def entry(step, reward=0.5, **more):
    return {"ppo_step": float(step), "objective/score": reward, "objective/kl": 0.01 * step, **more}


def write(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_log_of_finished_and_running_stages(tmp_path):
    write(tmp_path / "a/seed-0/ppo/stage.json", log=[entry(1), entry(2)])
    state = {"log_history": [{"loss": 1.0}, entry(1), entry(2), entry(2, 0.7), {"epoch": 1}]}
    write(tmp_path / "a/seed-1/grpo.work/checkpoint-8/trainer_state.json", **state)
    write(tmp_path / "b/seed-0/sft/stage.json", log="damaged")
    (tmp_path / "b/seed-1/ppo").mkdir(parents=True)
    (tmp_path / "b/seed-1/ppo/stage.json").write_text("{")
    table = training_log(tmp_path)
    assert list(table.columns) == ["model", "seed", "step", "reward", "kl"]
    assert table.to_numpy().tolist() == [
        ["a", "0", 1, 0.5, 0.01], ["a", "0", 2, 0.5, 0.02],
        ["a", "1", 1, 0.5, 0.01], ["a", "1", 2, 0.7, 0.02],  # the last entry of a step counts
    ]  # fmt: skip
    assert training_log(tmp_path / "nothing").empty


def test_trl_logs_without_a_score_have_a_reward(tmp_path):
    write(tmp_path / "a/seed-0/ppo/stage.json", log=[{"ppo_step": 1, "reward": 0.25}])
    row = training_log(tmp_path).iloc[0]
    assert row["reward"] == 0.25 and np.isnan(row["kl"])


@pytest.mark.parametrize(("number", "window"), [(1, 3), (10, 3), (40, 6), (200, 30)])
def test_smoothing_is_a_centred_mean(number, window):
    values = pd.Series(np.arange(number, dtype=float) ** 2)
    result = smoothed(values)
    assert len(result) == number and result.notna().all()
    middle = number // 2
    if number > window:
        first = middle - window // 2
        assert result[middle] == pytest.approx(values[first : first + window].mean())


def test_figure_shows_every_logged_step(tmp_path):
    """The raw log is behind the lines; a model without a log keeps its checkpoints' batches."""
    run = record_run(tmp_path / "run", SIZE)
    log = [entry(step, 0.5 + 0.1 * (step % 2)) for step in range(1, 21)]
    write(run / "nano/seed-0/ppo/stage.json", log=log)
    frame, table = load(run, num_resamples=10), training_log(run)
    frame.loc[frame["step"] == 0, ["reward", "kl"]] = 0.0
    raw, line = curves.training_curves(frame, table).axes[0].get_lines()
    assert list(raw.get_ydata()) == [row["objective/score"] for row in log]
    np.testing.assert_allclose(line.get_ydata(), smoothed(table["reward"]))
    (line,) = curves.training_curves(frame, table[:0]).axes[0].get_lines()
    assert len(line.get_ydata()) == 2
