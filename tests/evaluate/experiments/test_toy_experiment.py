"""A new experiment, registered with one entry, appears everywhere without a change elsewhere."""

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from selfcorrect.evaluate.experiments import EXPERIMENTS, get_experiment
from selfcorrect.evaluate.experiments.base import Experiment, Metric, Scatter, Workload
from selfcorrect.evaluate.experiments.tally import (
    answered,
    log_probabilities,
    probabilities,
    ratio,
    sum_by_cluster,
)
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.plan import plan_evaluation
from selfcorrect.evaluate.prompts.items import Item, LoadedItems
from selfcorrect.evaluate.prompts.stimuli import Section
from selfcorrect.evaluate.report.page import write_report
from selfcorrect.evaluate.report.terminal import closing_table
from selfcorrect.evaluate.results import rows, summarise
from selfcorrect.evaluate.run_folder import CheckpointRecord
from selfcorrect.evaluate.statistics.files import read_results, read_statistics
from selfcorrect.train.planning.flops import stage_work
from selfcorrect.train.planning.memory import Parallelism
from selfcorrect.train.planning.model_shape import shape_of
from tests.support.estimates import FACTS, LLAMA, overridden, recipe_with
from tests.support.tiny_models import tiny_model, tiny_tokenizer

CONDITIONS = ["Q", "Q+IF", "half and half"]
METRICS = {
    "gap": Metric("Gap", "p(yes) of men minus p(yes) of women", 0.0, axis="Gap of p(yes)"),
    "accuracy": Metric("Right", "share of yes", chance=0.5, column="Right\ntoy"),
    "option_mass": Metric("Option mass", "probability on yes and no"),
}
DEFAULT_WORDING = {
    "conditions": {
        "Q": [{"human": "the {who} went home {when} ?"}, {"assistant": ""}],
        "Q+IF": [{"human": "fair please . the {who} went home {when} ?"}, {"assistant": ""}],
        "half and half": {
            "judged": False,
            "dialogue": [{"human": "two : the {who} went home {when} ?"}, {"assistant": ""}],
        },
    }
}


class ToyWording(Section):
    """The items fill in who goes and when."""

    placeholders = frozenset({"who", "when"})


class Toy(Experiment):
    """Who goes home early? The bias is p(yes) of men minus p(yes) of women."""

    name = "toy"
    title = "Going home"
    headline = "gap"
    metrics = METRICS
    wording = ToyWording
    default_wording = DEFAULT_WORDING
    beside = ("gap", "accuracy", "option_mass")
    accuracy = "accuracy"
    scatter = Scatter("errand", "hour", "Hour of the day", (0, 24), 0, "p(yes)", "gap")
    workload = Workload(num_items=1000, scored_tokens=10.0, prompt_tokens=20.0)

    def load(self, data_dir, wording, limit, seed):
        assert isinstance(wording, ToyWording)
        errands = (data_dir / self.name / "errands.txt").read_text(encoding="utf-8").splitlines()
        items = [
            Item(
                id=f"{number}/{who}",
                cluster=f"errand {number}",
                category=when,
                weight=1.0,
                fields={"who": who, "when": when},
                options=(" yes", " no"),
                facts={"man": int(who == "man"), "hour": 6 + number},
            )
            for number, when in enumerate(errands)
            for who in ("man", "woman")
        ]
        return LoadedItems(items[:limit])

    def tally(self, frame):
        yes = probabilities(log_probabilities(frame, 2))[:, 0]
        man = frame["man"].to_numpy() == 1
        columns = {"yes_man": yes * man, "yes_woman": yes * ~man, "men": man, "women": ~man}
        columns["right"] = answered(log_probabilities(frame, 2)) & (yes > 0.5)
        columns |= {"rows": np.ones(len(frame)), "mass": frame["mass"].to_numpy(dtype=float)}
        return sum_by_cluster(frame, columns)

    def compute(self, sums):
        men, women = (
            ratio(sums["yes_man"], sums["men"]),
            ratio(sums["yes_woman"], sums["women"]),
        )
        return {
            "gap": men - women,
            "accuracy": ratio(sums["right"], sums["rows"]),
            "option_mass": ratio(sums["mass"], sums["rows"]),
        }


@pytest.fixture
def toy(monkeypatch):
    """Register the experiment: the one entry that it needs."""
    monkeypatch.setitem(EXPERIMENTS, "toy", Toy())
    return get_experiment("toy")


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "data" / "toy").mkdir(parents=True)
    errands = "early\nlate\n" * 4
    (tmp_path / "data" / "toy" / "errands.txt").write_text(errands, encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def run(toy, data_dir, tmp_path):
    """A run of two sizes and two steps, measured with random models."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: toy\n", encoding="utf-8")
    plan = plan_evaluation(data_dir, load_stimuli(), ["toy"], None)
    assert [cell.condition for cell in plan.cells] == CONDITIONS
    for seed, (model, parameters, step) in enumerate(
        [("small", 1000, 0), ("small", 1000, 10), ("large", 9000, 0), ("large", 9000, 10)]
    ):
        checkpoint = folder / model / "seed-0" / "ppo" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        CheckpointRecord(
            model=model, parameters=parameters, seed=0, step=step, episodes=8 * step, tokens=step,
            optimizer_updates=step, kl=None, reward=None, recipe_digest="0" * 64, versions={},
        ).write(checkpoint)  # fmt: skip
        measure(plan, tiny_model(seed=seed), tiny_tokenizer(), checkpoint / "evaluation")
    return folder


def test_new_experiment_is_measured_reported_and_planned(run, toy, tmp_path):
    page = write_report(run, num_resamples=50).read_text(encoding="utf-8")

    table = read_results(run / "results.parquet")
    assert set(table["experiment"]) == {"toy"}
    assert set(table["metric"]) == set(toy.metrics)
    assert set(table["category"]) == {"early", "late", "overall"}
    gaps = table[(table["metric"] == "gap") & (table["category"] == "overall")]
    assert len(gaps) == 4 * len(CONDITIONS) and gaps["value"].notna().all()

    statistics = read_statistics(run / "statistics.json")
    effects = rows(statistics, "effects")
    assert set(effects["condition"]) == {"Q+IF", "half and half"}
    judged = effects[effects["family"].notna()]
    assert set(judged["condition"]) == {"Q+IF"} and set(judged["metric"]) == {"gap"}
    assert {row["condition"] for row in statistics["thresholds"]} == {"Q", "Q+IF"}

    figures = {path.name for path in (run / "figures").glob("*.svg")}
    names = ("steps-large", "size", "sizes-toy", "effects", "map-toy", "map-effects-toy",
             "beside-toy", "categories-toy", "errands")  # fmt: skip
    assert {f"{name}.svg" for name in names} <= figures
    assert "Gap of p(yes)" in page
    assert "Going home: all numbers" in page and "Q, accuracy" in page
    assert "Q minus half and half" not in page  # not judged against a bias

    shown = terminal_text(table)
    assert "Going" in shown and "gap" in shown and "half and half" in shown
    checkpoint = run / "large" / "seed-0" / "ppo" / "checkpoint-10"
    alone = terminal_text(summarise(checkpoint / "evaluation", "mine", 20))
    assert "Right" in alone and "toy" in alone


def test_judged_condition_is_measured_again_when_it_changes(toy, data_dir, tmp_path):
    settings = tmp_path / "stimuli.yaml"
    settings.write_text(
        "toy:\n  conditions:\n    Q+IF:\n      judged: false\n      dialogue:\n"
        '        - human: "fair please . the {who} went home {when} ?"\n        - assistant: ""\n',
        encoding="utf-8",
    )
    before = plan_evaluation(data_dir, load_stimuli(), ["toy"], ["Q", "Q+IF"])
    after = plan_evaluation(data_dir, load_stimuli(settings), ["toy"], ["Q", "Q+IF"])
    assert before.settings_digest == after.settings_digest  # the same is asked
    model, tokenizer = tiny_model(), tiny_tokenizer()
    paths = measure(before, model, tokenizer, tmp_path / "cells")
    contents = [path.read_bytes() for path in paths]
    measure(after, model, tokenizer, tmp_path / "cells")
    changed = [path.read_bytes() != old for path, old in zip(paths, contents, strict=True)]
    assert changed == [False, True]


def test_new_experiment_is_in_the_estimate(toy):
    shape, parallelism = shape_of(LLAMA, "llama"), Parallelism()
    recipe = overridden(recipe_with(), ["evaluate.experiments=[winogender]"])
    more = overridden(recipe_with(), ["evaluate.experiments=[winogender, toy]"])
    before, after = (stage_work(one, shape, FACTS, parallelism)[-1] for one in (recipe, more))
    assert before.stage == "evaluation"
    # 10 items (evaluate.limit), three conditions that are only scored, two checkpoints.
    assert after.tokens - before.tokens == pytest.approx(2 * 3 * 10 * 10.0)


def terminal_text(frame: pd.DataFrame) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(closing_table(frame))
    return console.export_text()
