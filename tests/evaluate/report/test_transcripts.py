"""The transcript browser's data: complete items, bounded in size, with the questions asked."""

import re
from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.report.chunks import Chunks, unpack
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
    """Return the transcripts with their chunks in place, and the chunks' size."""
    chunks = Chunks()
    shown = transcripts({"run": run}, chunks, **options)
    data = [unpack(text) for text in chunks.texts]
    for part in shown.runs:
        for experiment in part["experiments"]:
            experiment["questions"] = data[experiment["questions"]]
            for job in experiment["jobs"]:
                job["chunk"] = data[job["chunk"]]
    return shown, chunks.size


def load(shown):
    """Return the experiments of the only run."""
    (run,) = shown[0].runs
    assert run["run"] == "run"
    return run["experiments"]


def answers_of(job, place):
    """Return a job's answers to the item at `place` of the questions."""
    return dict(zip(job["chunk"]["places"], job["chunk"]["items"], strict=True))[place]


def words(data, entry):
    return data["texts"][entry[0] if isinstance(entry, list) else entry]


def test_items_have_all_answers_of_the_files(recorded):
    experiments = load(transcripts_of(recorded, num_items=6))
    assert [e["title"] for e in experiments] == ["BBQ", "Winogender", "Law school admission"]
    bbq = experiments[0]
    assert bbq["conditions"] == ["Q", "Q+IF", "Q+IF+CoT"]
    nano, small = bbq["jobs"]
    assert [(job["model"], job["seed"], job["steps"]) for job in (nano, small)] == [
        ("nano", 0, [0, 2]), ("small", 0, [0, 2])
    ]  # fmt: skip
    items = bbq["questions"]["items"]
    assert len(items) == 6
    path = recorded / "small/seed-0/ppo/checkpoint-2/evaluation/bbq.Q+IF.parquet"
    rows = {row["item"]: row for row in pq.read_table(path).to_pylist()}
    for place, item in enumerate(items):
        for job in (nano, small):
            keys = sorted(tuple(answer[:2]) for answer in answers_of(job, place))
            assert keys == [(step, condition) for step in (0, 2) for condition in range(3)]
        row = rows[words(bbq["questions"], item["id"])]
        (answer,) = [a for a in answers_of(small, place) if a[:2] == [2, 1]]
        order, draw, options, chances, chosen, mass, samples, truncated = answer[2:]
        assert (order, draw, mass, samples, truncated) == ("012", 0, 0.9, None, None)
        assert [words(small["chunk"], option) for option in options] == row["options"]
        assert chances == [round(chance, 4) for chance in row["probabilities"]]
        assert chosen == max(range(3), key=row["probabilities"].__getitem__)
        assert "right" in item["tags"][str(row["label"])]
        raises = row["stereotyped"] if row["context"] == "ambiguous" else None
        assert item["raises"] == raises


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
    assert len(shown[0].notes) == 1
    bbq, _, law = load(shown)
    questions, (job,) = bbq["questions"], bbq["jobs"]
    cot = bbq["conditions"].index("Q+IF+CoT")
    for place, item in enumerate(questions["items"]):
        orders = [order for order, _ in item["asked"][cot]]
        assert orders == ["012", "120", "201"]
        answers = [a for a in answers_of(job, place) if a[1] == cot]
        assert [(a[2], a[3]) for a in answers] == [(o, d) for o in orders for d in (0, 1)]
        assert all(len(a[8]) == 1 for a in answers)
        for order, turns in item["asked"][cot]:
            assert [role for role, *_ in turns] == ["human", "assistant"] * 2
            assert words(questions, turns[1][1]).endswith(questions["sample"])
            options = next(a[4] for a in answers if a[2] == order)
            texts = [words(job["chunk"], option).strip() for option in options]
            question = words(questions, turns[0][1])
            assert sorted(texts, key=question.rindex) == texts  # in the order that was asked
    assert all(len(item["asked"][0]) == 1 for item in law["questions"]["items"])


def test_questions_of_a_changed_recipe_are_not_shown(measured, tmp_path):
    recipe = (measured / "recipe.yaml").read_text(encoding="utf-8")
    try:
        changed = recipe.replace("permutations: 3", "permutations: 1")
        (measured / "recipe.yaml").write_text(changed, encoding="utf-8")
        shown = transcripts_of(measured)
    finally:
        (measured / "recipe.yaml").write_text(recipe, encoding="utf-8")
    experiments = load(shown)
    named = ", ".join(f"bbq {condition}" for condition in experiments[0]["conditions"])
    assert f"The questions of {named} are not shown" in shown[0].notes[1]
    bbq, winogender, _ = (experiment["questions"]["items"] for experiment in experiments)
    assert not any(any(item["asked"]) for item in bbq)
    assert all(all(item["asked"]) for item in winogender)


def test_unreadable_recipe(recorded):
    """The note gives the reason, without the folder."""
    _, note = transcripts_of(recorded)[0].notes
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
    bbq = load(transcripts_of(run))[0]
    places = [words(bbq["questions"], item["id"]) for item in bbq["questions"]["items"]]
    (job,) = bbq["jobs"]
    (answer,) = [a for a in answers_of(job, places.index("Age/0")) if a[1] == 2]
    long, second = answer[8]
    assert long[1] == len(HOSTILE) + 14 * 70_000 > 900_000
    text = words(job["chunk"], long)
    assert text.startswith("<script>document.title='taken'</script>⟨U+202E⟩txet")
    assert "⟨U+0007⟩" in text and "⟨U+2028⟩" in text
    assert len(text) < 2 * TEXT_LENGTH
    assert len(second) == 1 and words(job["chunk"], second) == "second"


def test_chunks_are_no_markup():
    """Whatever a chunk holds, in the page it consists of letters, digits and +/=."""
    chunks = Chunks()
    chunks.add(["</script><!--", "\u2028", HOSTILE])
    assert re.fullmatch("[A-Za-z0-9+/=]+", chunks.texts[0])
    assert unpack(chunks.texts[0]) == ["</script><!--", "\u2028", HOSTILE]


def test_undefined_probabilities_and_ties(tmp_path):
    run = record_run(tmp_path / "run", Size(models=(("one", 1),), steps=(0,), templates=2))
    path = run / "one/seed-0/ppo/checkpoint-0/evaluation/law_school.Q.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0] |= {"probabilities": None, "logprobs": [float("-inf")] * 2, "mass": 0.0}
    rows[1] |= {"probabilities": [0.5, 0.5], "logprobs": [-1.0, -1.0]}
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    law = load(transcripts_of(run, num_items=100))[2]
    (job,) = law["jobs"]
    answers = {
        words(law["questions"], item["id"]): a
        for place, item in enumerate(law["questions"]["items"])
        for a in answers_of(job, place)
        if a[1] == 0
    }
    first, second = answers[rows[0]["item"]], answers[rows[1]["item"]]
    assert (first[5], first[6], first[7]) == (None, None, 0.0)
    assert (second[5], second[6]) == ([0.5, 0.5], None)


def test_budget_limits_the_number_of_items(recorded):
    _, size = transcripts_of(recorded)
    budget = size // 2
    shown, smaller = transcripts_of(recorded, budget=budget)
    assert smaller <= budget
    for experiment in load((shown, smaller)):
        number = len(experiment["questions"]["items"])
        assert f"{experiment['title']}: {number} of " in shown.notes[0]
    nothing, size = transcripts_of(recorded, budget=100)
    assert nothing.runs == [] and size == 0
    assert any("too many checkpoints and conditions" in note for note in nothing.notes)


def test_several_runs_share_the_budget(recorded, measured):
    named = {"a <b>\u202e": recorded, "second": measured}
    chunks = Chunks()
    shown = transcripts(named, chunks)
    assert [part["run"] for part in shown.runs] == ["a <b>⟨U+202E⟩", "second"]
    assert [note.split(":")[0] for note in shown.notes] == ["a <b>\u202e"] * 2 + ["second"]
    alone = Chunks()
    transcripts({"second": measured}, alone)
    assert chunks.texts[-len(alone.texts) :] == alone.texts
    half = Chunks()
    transcripts(named, half, budget=chunks.size // 2)
    assert half.size <= chunks.size // 2
    twice = transcripts({"a": recorded, "b": recorded}, Chunks())
    assert [note.split(":")[0] for note in twice.notes] == ["a, b"] * 2  # said once
