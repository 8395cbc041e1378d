"""Write a small run folder, as training and evaluation leave it, with made-up answers.

The bias under Q stays constant; under an instruction it falls with the steps, more so in the larger
model. No model is involved: answers are drawn, with the same noise for an item everywhere.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfcorrect.evaluate.run_folder import CheckpointRecord

CONDITIONS = {
    "bbq": ["Q", "Q+IF", "Q+IF+CoT"],
    "winogender": ["Q", "Q+IF", "Q+IF+CoT", "Match stats"],
    "law_school": ["Q", "Q+IF", "Q+IF+CoT"],
}
HOSTILE = "<script>document.title='taken'</script>\u202etxet desrever\u0007 & \"quotes\""


@dataclass(frozen=True)
class Size:
    """Numbers of models, steps, seeds, items and clusters of a recorded run."""

    models: tuple[tuple[str, int], ...] = (("nano", 8_192), ("small", 509_000))
    steps: tuple[int, ...] = (0, 2, 10, 40)
    seeds: tuple[int, ...] = (0,)
    categories: tuple[str, ...] = ("Age", "Religion", "Race_x_gender")
    templates: int = 8
    blocks: int = 2
    occupations: int = 16
    students: int = 30
    samples: bool = True


SMALL = Size(steps=(0, 2, 10), templates=4, blocks=1, occupations=10, students=10)


def record_run(folder: Path, size: Size | None = None) -> Path:
    """Write the run and return its folder."""
    size = size or Size()
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: recorded\nseeds: [0]  # made by a test\n")
    run = {"versions": {"torch": "2.x"}, "seeds": list(size.seeds), "git_commit": "0123abc"}
    (folder / "run.json").write_text(json.dumps(run))
    for rank, (model, parameters) in enumerate(size.models):
        for seed in size.seeds:
            for step in size.steps:
                checkpoint = folder / model / f"seed-{seed}" / "ppo" / f"checkpoint-{step}"
                checkpoint.mkdir(parents=True)
                _record(model, parameters, seed, step, rank).write(checkpoint)
                progress = np.log1p(step) / np.log1p(max(1, *size.steps)) * (0.9 - 0.1 * seed)
                strength = 0.2 + 0.5 * (rank + 1) / len(size.models)
                for experiment, conditions in CONDITIONS.items():
                    for condition in conditions:
                        bias = strength * _remaining_bias(condition, float(progress))
                        record_cell(checkpoint / "evaluation", experiment, condition, bias, size)
    return folder


def _remaining_bias(condition: str, progress: float) -> float:
    """Return the share of bias that a condition leaves after `progress` (0 to 1) of training."""
    by_condition = {"Q": 1 + 0.1 * progress, "Q+IF": 0.95 - 0.8 * progress, "Match stats": 1.3}
    return by_condition.get(condition, 0.7 * (1 - progress))


def record_cell(
    folder: Path, experiment: str, condition: str, bias: float, size: Size | None = None
) -> Path:
    """Write one evaluation file; `bias` is 0 for none and 1 for all."""
    size = size or Size()
    rows = {"bbq": _bbq, "winogender": _winogender, "law_school": _law_school}[experiment](
        bias, size
    )
    asked = [{name: row[name] for name in row if name != "chances"} for row in rows]
    digest = hashlib.sha256(json.dumps([experiment, condition, asked], default=str).encode())
    for index, row in enumerate(rows):
        logprobs = np.log(np.asarray(row.pop("chances")) * 0.9)
        row |= {
            "weight": row.get("weight", 1.0),
            "order": "".join(str(i) for i in range(len(logprobs))),
            "logprobs": logprobs.tolist(),
            "probabilities": (np.exp(logprobs) / 0.9).tolist(),
            "mass": 0.9,
            "draw": 0,
            "samples": None,
            "truncated": None,
        }
        if "CoT" in condition and size.samples:
            text = HOSTILE if index == 0 else f"Both could be true. {'So it goes. ' * index}"
            row["samples"] = [text]
            row["truncated"] = index % 7 == 0
    table = pa.Table.from_pylist(rows)
    metadata = {
        "experiment": experiment,
        "condition": condition,
        "settings_digest": digest.hexdigest(),
        "num_items": len(rows),
        "left_out": {"no stereotyped group matches": 3} if experiment == "bbq" else {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{experiment}.{condition.replace(' ', '_')}.parquet"
    pq.write_table(table.replace_schema_metadata({b"selfcorrect": json.dumps(metadata)}), path)
    return path


def _record(model: str, parameters: int, seed: int, step: int, rank: int) -> CheckpointRecord:
    return CheckpointRecord(
        model=model,
        parameters=parameters,
        seed=seed,
        step=step,
        episodes=64 * step,
        tokens=1000 * step,
        optimizer_updates=4 * step,
        kl=None if step == 0 else 0.4 * np.log1p(step) * (1 + rank),
        reward=None if step == 0 else 0.3 * np.log1p(step) - 0.5 + 0.1 * rank,
        recipe_digest="0" * 64,
        versions={"torch": "2.x"},
    )


def _noise(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _bbq(bias: float, size: Size) -> list[dict]:
    rows = []
    for category in size.categories:
        for template in range(size.templates):
            lean = _noise(f"{category}{template}").normal(0, 0.3)
            for number in range(4 * size.blocks):
                name = f"{category}/{template * 4 * size.blocks + number}"
                noise, ambiguous = _noise(name), number % 2 == 0
                unknown, stereotyped, other = noise.permutation(3).tolist()
                label = unknown if ambiguous else (stereotyped, other)[number // 2 % 2]
                scores = np.zeros(3)
                if ambiguous:
                    scores[unknown] = 1.4 - 1.6 * bias + noise.normal()
                    scores[stereotyped] = 1.8 * bias + lean + noise.normal(0, 0.7)
                else:
                    scores[label] = 2.0 + noise.normal()
                    scores[stereotyped] += 0.4 * bias
                rows.append(
                    {
                        "item": name,
                        "cluster": f"{category}/{template}",
                        "category": category,
                        "options": [" (a)", " (b)", " (c)"],
                        "chances": np.exp(scores) / np.exp(scores).sum(),
                        "polarity": "neg" if number // 2 % 2 == 0 else "nonneg",
                        "context": "ambiguous" if ambiguous else "disambiguated",
                        "label": label,
                        "unknown": unknown,
                        "stereotyped": stereotyped if number else None,
                        "proxy_name": 0,
                    }
                )
    return rows


def _winogender(bias: float, size: Size) -> list[dict]:
    rows = []
    for number in range(size.occupations):
        name, noise = f"occupation-{number}", _noise(f"occupation-{number}")
        share = 100 * (number + 0.5) / size.occupations
        wanted = 0.5 + bias * (share / 100 - 0.5) + noise.normal(0, 0.1 * (1.05 - bias))
        female = 0.8 * float(np.clip(wanted, 0.02, 0.98))
        rows.append(
            {
                "item": f"{name}.txt",
                "cluster": name,
                "category": "occupations",
                "options": [" his", " her", " their"],
                "chances": np.array([0.8 - female, female, 0.2]),
                "occupation": name,
                "percent_female": share,
                "case": "possessive",
                "number_leak": 0,
            }
        )
    return rows


def _law_school(bias: float, size: Size) -> list[dict]:
    rows = []
    for number in range(size.students):
        noise = _noise(f"student-{number}")
        lsat, gpa = round(noise.uniform(20, 48), 1), round(noise.uniform(2, 4), 1)
        logit = (lsat - 34) / 8 + noise.normal(0, 0.2)
        gap = bias * (1 + noise.normal(0, 0.3))
        for side, race, shift in (("first", "Black", -gap / 2), ("second", "white", gap / 2)):
            yes = 1 / (1 + np.exp(-logit - shift))
            rows.append(
                {
                    "item": f"Black-white/{number}/{race}",
                    "cluster": f"Black-white/{number}",
                    "category": "Black-white",
                    "weight": float(1 + number % 5),
                    "options": ["yes", "no"],
                    "chances": np.array([yes, 1 - yes]),
                    "race": race,
                    "side": side,
                    "sex": "1",
                    "lsat": lsat,
                    "gpa": gpa,
                }
            )
    return rows
