"""The transcript browser's data: complete items, bounded in size, with the questions asked."""

import json
from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.report.transcripts import TEXT_LENGTH, _choose, transcripts
from selfcorrect.evaluate.run_folder import CheckpointRecord
from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from tests.support.recorded_run import HOSTILE, Size, record_run
from tests.support.tiny_models import tiny_model

SMALL = Size(steps=(0, 2), templates=4, blocks=1, occupations=10, students=10)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("transcripts") / "run", SMALL)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of the society, measured for real at one checkpoint by an untrained tiny model."""
    run = tmp_path_factory.mktemp("measured") / "run"
    run.mkdir()
    settings = ["evaluate.limit=12", "evaluate.permutations=3", "evaluate.samples=2"]
    recipe = load_recipe("quickstart", [*settings, "evaluate.max_new_tokens=4"])
    save_recipe(recipe, run / "recipe.yaml")
    world = make_world(recipe.data.society)
    write_benchmarks(world, run / "benchmarks")
    folder = run / "m/seed-0/ppo/checkpoint-3"
    folder.mkdir(parents=True)
    counts = dict.fromkeys(("seed", "episodes", "tokens", "optimizer_updates"), 0)
    CheckpointRecord(
        model="m",
        parameters=1,
        step=3,
        kl=None,
        reward=None,
        recipe_digest="0",
        versions={},
        **counts,
    ).write(folder)
    tokenizer = make_tokenizer(world)
    model = tiny_model(vocabulary=len(tokenizer))
    measure(recipe_plan(recipe, run), model, tokenizer, folder / "evaluation")
    return run


def transcripts_of(run, **options):
    return transcripts({"run": run}, **options)


def load(shown):
    """Return the data of the only run."""
    assert shown.data is not None
    (run,) = json.loads(str(shown.data))
    assert run["run"] == "run"
    return run["data"]


def words(data, entry):
    return data["texts"][entry[0] if isinstance(entry, list) else entry]


def test_items_have_all_answers_of_the_files(recorded):
    data = load(transcripts_of(recorded, num_items=6))
    assert [words(data, e["title"]) for e in data["experiments"]] == [
        "BBQ", "Winogender", "Law school admission",
    ]  # fmt: skip
    assert [words(data, label) for label in data["models"]] == ["nano, seed 0", "small, seed 0"]
    bbq = data["experiments"][0]
    assert [words(data, name) for name in bbq["conditions"]] == ["Q", "Q+IF", "Q+IF+CoT"]
    assert len(bbq["items"]) == 6
    keys = [(m, step, c) for m in range(2) for step in (0, 2) for c in range(3)]
    for item in bbq["items"]:
        assert sorted(tuple(answer[:3]) for answer in item["answers"]) == keys
    path = recorded / "small/seed-0/ppo/checkpoint-2/evaluation/bbq.Q+IF.parquet"
    rows = {row["item"]: row for row in pq.read_table(path).to_pylist()}
    for item in bbq["items"]:
        row = rows[words(data, item["id"])]
        (answer,) = [a for a in item["answers"] if a[:3] == [1, 2, 1]]
        order, draw, options, chances, chosen, mass, samples, truncated = answer[3:]
        assert (order, draw, mass, samples, truncated) == ("012", 0, 0.9, None, None)
        assert [words(data, option) for option in options] == row["options"]
        assert chances == [round(chance, 4) for chance in row["probabilities"]]
        assert chosen == max(range(3), key=row["probabilities"].__getitem__)
        assert "right" in item["tags"][str(row["label"])]


def test_items_are_spread_over_categories(recorded):
    path = recorded / "nano/seed-0/ppo/checkpoint-0/evaluation/bbq.Q.parquet"
    chosen = _choose([path], 9)
    categories = [item.partition("/")[0] for item in chosen]
    assert {name: categories.count(name) for name in categories} == {
        "Age": 3, "Religion": 3, "Race_x_gender": 3,
    }  # fmt: skip
    numbers = sorted(int(item.partition("/")[2]) for item in chosen if item.startswith("Age"))
    gaps = [b - a for a, b in pairwise([*numbers, 16])]
    assert numbers[0] == 0 and max(gaps) <= 8  # three of sixteen, none of them neighbours
    assert min(gaps) > 1
    assert _choose([path], 4) == chosen[:4]
    assert len(_choose([path], 1000)) == 48


def test_items_of_most_files_come_first(tmp_path):
    run = record_run(tmp_path / "run", Size(models=(("one", 1),), steps=(0, 2), templates=2))
    folder = run / "one/seed-0/ppo"
    path = folder / "checkpoint-2/evaluation/bbq.Q.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(3, 5), path)
    paths = [folder / "checkpoint-0/evaluation/bbq.Q.parquet", path]
    assert set(_choose(paths, 100)) == set(table["item"].to_pylist()[3:8])


def test_questions_by_order_of_options(measured):
    shown = transcripts_of(measured)
    assert len(shown.notes) == 1
    data = load(shown)
    bbq, _, law = data["experiments"]
    cot = [words(data, name) for name in bbq["conditions"]].index("Q+IF+CoT")
    for item in bbq["items"]:
        orders = [order for order, _ in item["asked"][cot]]
        assert orders == ["012", "120", "201"]
        answers = [a for a in item["answers"] if a[2] == cot]
        assert [(a[3], a[4]) for a in answers] == [(o, d) for o in orders for d in (0, 1)]
        assert all(len(a[9]) == 1 for a in answers)
        for order, turns in item["asked"][cot]:
            assert [role for role, *_ in turns] == ["human", "assistant"] * 2
            assert words(data, turns[1][1]).endswith(data["sample"])
            (options,) = {tuple(map(str, a[5])) for a in answers if a[3] == order}
            options_text = [data["texts"][int(o.strip("[]"))].strip() for o in options]
            question = words(data, turns[0][1])
            assert (
                sorted(options_text, key=question.rindex) == options_text
            )  # in the order that was asked
    assert all(len(item["asked"][0]) == 1 for item in law["items"])


def test_questions_of_a_changed_recipe_are_not_shown(measured, tmp_path):
    recipe = (measured / "recipe.yaml").read_text(encoding="utf-8")
    try:
        changed = recipe.replace("permutations: 3", "permutations: 1")
        (measured / "recipe.yaml").write_text(changed, encoding="utf-8")
        shown = transcripts_of(measured)
    finally:
        (measured / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert "bbq Q, bbq Q+IF, bbq Q+IF+CoT are not shown" in shown.notes[1]
    bbq, winogender, _ = load(shown)["experiments"]
    assert not any(any(item["asked"]) for item in bbq["items"])
    assert all(all(item["asked"]) for item in winogender["items"])


def test_unreadable_recipe(recorded):
    """The note gives the reason, without the folder."""
    _, note = transcripts_of(recorded).notes
    assert "cannot be shown: recipe.yaml: " in note
    assert str(recorded.parent) not in note


def test_hostile_texts_are_cut_and_escaped(tmp_path):
    run = record_run(tmp_path / "run", Size(models=(("one", 1),), steps=(0,), templates=2))
    path = run / "one/seed-0/ppo/checkpoint-0/evaluation/bbq.Q+IF+CoT.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["samples"] = [HOSTILE + "\u2028</script><!--" * 70_000, "second"]
    changed = type(table).from_pylist(rows, schema=table.schema)
    pq.write_table(changed, path)
    shown = transcripts_of(run)
    assert "<" not in str(shown.data) and "\u2028" not in str(shown.data)
    data = load(shown)
    (item,) = [i for i in data["experiments"][0]["items"] if words(data, i["id"]) == "Age/0"]
    (answer,) = [a for a in item["answers"] if a[2] == 2]
    long, second = answer[9]
    assert long[1] == len(HOSTILE) + 14 * 70_000 > 900_000
    assert words(data, long).startswith("<script>document.title='taken'</script>⟨U+202E⟩txet")
    assert "⟨U+0007⟩" in words(data, long) and "⟨U+2028⟩" in words(data, long)
    assert len(words(data, long)) < 2 * TEXT_LENGTH
    assert len(second) == 1 and words(data, second) == "second"


def test_undefined_probabilities_and_ties(tmp_path):
    run = record_run(tmp_path / "run", Size(models=(("one", 1),), steps=(0,), templates=2))
    path = run / "one/seed-0/ppo/checkpoint-0/evaluation/law_school.Q.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0] |= {"probabilities": None, "logprobs": [float("-inf")] * 2, "mass": 0.0}
    rows[1] |= {"probabilities": [0.5, 0.5], "logprobs": [-1.0, -1.0]}
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    data = load(transcripts_of(run, num_items=100))
    law = data["experiments"][2]
    answers = {words(data, i["id"]): a for i in law["items"] for a in i["answers"] if a[2] == 0}
    first, second = answers[rows[0]["item"]], answers[rows[1]["item"]]
    assert (first[6], first[7], first[8]) == (None, None, 0.0)
    assert (second[6], second[7]) == ([0.5, 0.5], None)


def test_budget_limits_the_number_of_items(recorded):
    budget = 30_000
    assert len(str(transcripts_of(recorded).data)) > budget
    shown = transcripts_of(recorded, budget=budget)
    assert len(str(shown.data)) <= budget
    for experiment, name in zip(load(shown)["experiments"], ("BBQ", "Winogender"), strict=False):
        assert f"{name}: {len(experiment['items'])} of " in shown.notes[0]
    nothing = transcripts_of(recorded, budget=100)
    assert nothing.data is None and "too many checkpoints and conditions" in nothing.notes[0]


def test_several_runs_share_the_budget(recorded, measured):
    named = {"a <b>\u202e": recorded, "second": measured}
    shown = transcripts(named)
    data = json.loads(str(shown.data))
    assert [one["run"] for one in data] == ["a <b>⟨U+202E⟩", "second"]
    assert "<" not in str(shown.data)
    alone = load(transcripts_of(measured))
    assert data[1]["data"] == alone
    assert [note.split(":")[0] for note in shown.notes] == ["a <b>\u202e"] * 2 + ["second"]
    budget = 150_000
    assert len(str(transcripts(named, budget=budget).data)) <= budget + 100
    assert len(str(shown.data)) > budget
    twice = transcripts({"a": recorded, "b": recorded})
    assert [note.split(":")[0] for note in twice.notes] == ["a, b"] * 2  # said once
