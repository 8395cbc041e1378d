"""The trainer's log of a run: reward and KL of every logged step, and their smoothed course."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from selfcorrect.evaluate.run_folder import POLICY_METHODS

SMOOTHING_SPAN = 0.15  # share of the logged steps


def training_log(run: Path) -> pd.DataFrame:
    """Return the trainer's log of a run: model, seed, step, reward and kl of every logged step.

    The log is in stage.json once a policy is trained, and in the newest training state before.
    A damaged file is left out: it is no reason to show nothing.
    """
    rows = []
    for method in POLICY_METHODS:
        for seed_folder in sorted(run.glob("*/seed-*")):
            for entry in _entries(seed_folder / method):
                step, score = entry.get("ppo_step"), entry.get("objective/score")
                if isinstance(step, int | float):
                    reward = entry.get("reward") if score is None else score
                    rows.append(
                        {
                            "model": seed_folder.parent.name,
                            "seed": seed_folder.name.removeprefix("seed-"),
                            "step": int(step),
                            "reward": reward,
                            "kl": entry.get("objective/kl"),
                        }
                    )
    names = ["model", "seed", "step", "reward", "kl"]
    table = pd.DataFrame(rows, columns=names).astype({"reward": float, "kl": float})
    return table.drop_duplicates(["model", "seed", "step"], keep="last", ignore_index=True)


def _entries(folder: Path) -> list[Mapping[str, Any]]:
    states = folder.with_name(f"{folder.name}.work").glob("checkpoint-*/trainer_state.json")
    newest = sorted(states, key=lambda path: path.stat().st_mtime_ns)[-1:]
    sources = [(folder / "stage.json", "log"), *((state, "log_history") for state in newest)]
    for path, key in sources:
        try:
            entries = json.loads(path.read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(entries, list):
            return [entry for entry in entries if isinstance(entry, dict)]
    return []


def smoothed(values: pd.Series) -> pd.Series:
    """Return the centred mean over SMOOTHING_SPAN of the points, at least 3; fewer at the ends."""
    window = max(3, round(SMOOTHING_SPAN * len(values)))
    return values.rolling(window, center=True, min_periods=1).mean()
