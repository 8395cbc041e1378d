"""Faults that users report of other evaluation tools, each shown not to be here.

Each test names who has the fault; docs/reference/other-tools.md lists them.
"""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import norm

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.experiments.tally import Tally, ratio
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.cell_files import Origin, read_cell
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.token_trie import PackingCache
from selfcorrect.evaluate.scoring.weights import CheckpointLoader, files_digest
from selfcorrect.evaluate.statistics.bootstrap import bootstrap, standard_error
from selfcorrect.evaluate.statistics.comparisons import Cell, compare
from selfcorrect.evaluate.statistics.significance import wald_p
from tests.support import bbq_rows
from tests.support.tiny_models import save_model, tiny_model, tiny_plan, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture
def plan(tmp_path):
    return tiny_plan(tmp_path / "data")


def scores(paths):
    return [np.stack(read_cell(path)[0]["logprobs"]) for path in paths]


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_cache_answers_for_other_weights(tmp_path, plan):
    """lm-evaluation-harness #4063: `--use_cache` is not keyed by the model.

    lighteval #1364: keyed by the model's name, whose weights may change.
    """
    tokenizer, caches, out = tiny_tokenizer(), PackingCache(), tmp_path / "out"
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    alone = scores(measure(plan, second, tokenizer, tmp_path / "alone"))
    of_first = scores(measure(plan, first, tokenizer, out, packings=caches))
    # The same questions, the same caches, the same folder, and the module of the first model.
    first.load_state_dict(second.state_dict())
    of_second = scores(measure(plan, first, tokenizer, out, packings=caches))
    assert equal(of_second, alone) and not equal(of_second, of_first)
    # The same folder of a model, in which a file was replaced.
    model = tmp_path / "model"
    save_model(model, tiny_model(seed=1))
    before = files_digest(model)
    save_model(model, second)
    assert files_digest(model) != before
    loaded, tokenizer = load_model(model, device="cpu")
    paths = measure(plan, loaded, tokenizer, out, origin=Origin(files_digest(model)))
    assert equal(scores(paths), alone)
    assert all(read_cell(path)[1]["origin"]["weights"] != before for path in paths)


def cell(condition, right, clusters=None):
    """Return the cell of a metric "share", the mean of `right` (0 or 1) over items."""
    names = [f"{i:04}" for i in range(len(right))] if clusters is None else clusters
    labels, codes = np.unique(names, return_inverse=True)
    sums = {
        "right": np.bincount(codes, weights=right),
        "count": np.bincount(codes).astype(float),
    }
    tally = Tally(list(labels), np.zeros(len(labels), int), ["c"], np.ones(len(labels)), sums)
    replicates = bootstrap(
        tally,
        lambda sums: {"share": ratio(sums["right"], sums["count"])},
    ).replicates
    return Cell("run", "m", 1, 0, 0, "bbq", condition, replicates)


def test_comparisons_on_the_same_items_are_paired():
    """lm-evaluation-harness #3831, #3868: `model_comparator.py` adds the variances of both."""
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(size=400)
    first = (difficulty < 0.62).astype(float)
    second = np.where(rng.uniform(size=400) < 0.1, difficulty < 0.4, first)
    difference = first - second
    unpaired = math.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 400)
    paired = difference.std(ddof=1) / math.sqrt(400)
    assert 2 * norm.sf(difference.mean() / unpaired) > 0.05  # what the unpaired test says
    (effect,) = compare([cell("Q", first), cell("Q+IF", second)])
    assert effect.estimate.value == pytest.approx(difference.mean())
    assert effect.error == pytest.approx(paired, rel=0.05) and effect.error < unpaired / 2
    assert wald_p(effect.estimate.value, effect.error, 399) < 0.05
    assert effect.estimate.excludes_zero


def test_intervals_count_clusters_not_items():
    """lm-evaluation-harness: standard errors as if the items of one template were independent."""
    rng = np.random.default_rng(1)
    of_template = (rng.uniform(size=40) < 0.5).astype(float)
    right = np.repeat(of_template, 9)  # nine items of a template are answered alike
    naive = right.std(ddof=1) / math.sqrt(len(right))
    by_template = of_template.std(ddof=1) / math.sqrt(40)
    clustered = cell("Q", right, np.repeat(np.arange(40), 9)).replicates.metrics["share"]
    assert standard_error(clustered) == pytest.approx(by_template, rel=0.05)
    assert standard_error(clustered) > 2.8 * naive


def grouped_benchmarks(folder):
    """Write benchmarks whose files hold one category after the other, 2 : 1 : 1."""
    (folder / "multiple_choice").mkdir()
    (folder / "crows_pairs").mkdir()
    sizes = {"first": 80, "second": 40, "third": 40}
    categories = [name for name, size in sizes.items() for _ in range(size)]
    questions = [
        {"id": i, "question": "?", "options": ["x", "y"], "category": name}
        for i, name in enumerate(categories)
    ]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "multiple_choice" / "own.jsonl").write_text(lines)
    pairs = [f"{i},They {i}.,You {i}.,stereo,{name}\n" for i, name in enumerate(categories)]
    head = ",sent_more,sent_less,stereo_antistereo,bias_type\n"
    (folder / "crows_pairs" / "crows_pairs_anonymized.csv").write_text(head + "".join(pairs))
    blocks = [
        row
        for name, size in sizes.items()
        for k in range(size // 4)
        for row in bbq_rows.block(4 * k, category=name, template=k % 5)
    ]
    bbq_rows.write(folder, blocks, "all.jsonl")


@pytest.mark.parametrize("name", ["multiple_choice", "crows_pairs", "bbq"])
def test_a_limited_sample_is_not_the_first_items_of_the_file(tmp_path, name):
    """lm-evaluation-harness #2598: `--limit` takes the first N, all of one category here."""
    grouped_benchmarks(tmp_path)
    section = load_stimuli().section(name)
    load = EXPERIMENTS[name].load
    drawn = load(tmp_path, section, 40, 0).items
    counts = Counter(item.category for item in drawn)
    assert counts == pytest.approx({"first": 20, "second": 10, "third": 10}, abs=2)  # half a block
    assert drawn == load(tmp_path, section, 40, 0).items
    assert any(drawn != load(tmp_path, section, 40, seed).items for seed in range(1, 5))


def test_several_adapters_are_measured_over_one_base(tmp_path, plan):
    """lm-evaluation-harness #3744: one adapter per run, with the base loaded again for each."""
    save_model(tmp_path / "base", tiny_model())
    folders = []
    for seed in (1, 2, 3):
        base, tokenizer = load_model(tmp_path / "base", device="cpu")
        torch.manual_seed(seed)
        settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        folders.append(tmp_path / f"adapter-{seed}")
        get_peft_model(base, settings).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    loader, results = CheckpointLoader("cpu"), []
    for folder in folders:
        model, tokenizer = loader.load(folder)
        results.append(scores(measure(plan, model, tokenizer, tmp_path / f"of-{folder.name}")))
    assert loader.num_swapped == 2  # the base was loaded once
    for folder, result in zip(folders, results, strict=True):
        model, tokenizer = load_model(folder, device="cpu")
        alone = measure(plan, model, tokenizer, tmp_path / f"alone-{folder.name}")
        assert equal(result, scores(alone))
    assert not equal(results[0], results[1]) and not equal(results[1], results[2])
