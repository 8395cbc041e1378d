"""Probes: hidden states, held-out groups without leaks, files and the command."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.figures.curves import in_words, save
from selfcorrect.evaluate.measuring.plan import EvaluationPlan, plan_evaluation
from selfcorrect.evaluate.probe import hidden_states, linear_probe
from selfcorrect.evaluate.probe.figure import accuracy_by_layer
from selfcorrect.evaluate.probe.hidden_states import contrasts
from selfcorrect.evaluate.probe.linear_probe import CATEGORY, TEMPLATE, probe_layers
from selfcorrect.evaluate.probe.probe import (
    CHECKPOINT_FILE,
    check_plan,
    is_probed,
    pairs_of,
    probe_checkpoint,
    read_probe,
)
from selfcorrect.evaluate.prompts.tokenized import PromptTooLong
from selfcorrect.evaluate.run_folder import CheckpointRecord, find_checkpoints
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from selfcorrect.scripts.commands.probe import probe
from tests.support.architectures import small_model
from tests.support.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)

app = typer.Typer()
app.command()(probe)


# --- hidden states -------------------------------------------------------------------------------

PAIRS = [
    ("<s> who is fair ?", (" the man", " the old woman at home")),
    ("<s> the doctor told her", (" that he", " that she")),
    ("<s> " + "north south east west " * 20 + "please", (" admit", " fair , not early")),
    ("<s> the", (" answer is ( a )", " answer is ( b )")),
]


def plain_states(model, tokenizer, text):
    """The definition: one forward of the whole model, no padding, the last token's states."""
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    return np.stack([layer[0, -1].numpy() for layer in states])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("max_batch_tokens", [1, 100, 4096])
def test_states_equal_a_plain_forward(architecture, max_batch_tokens):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    vectors = contrasts(model, tokenizer, PAIRS, max_batch_tokens=max_batch_tokens)
    assert vectors.shape == (len(PAIRS), 3, 32)  # embeddings, a block, a block with the final norm
    assert vectors.dtype == np.float32
    for (prompt, (one, other)), half in zip(PAIRS, vectors, strict=True):
        first, second = (plain_states(model, tokenizer, prompt + text) for text in (one, other))
        assert half == pytest.approx((first - second) / 2, abs=2e-5)
        assert first == pytest.approx((first + second) / 2 + half, abs=2e-5)
        assert np.abs(half[1:]).max() > 0.01  # the options do differ


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_side_of_the_tokenizer_changes_nothing(architecture):
    model = tiny_model(architecture)
    results = []
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        results.append(contrasts(model, tokenizer, PAIRS))
    assert np.array_equal(*results)


def test_states_do_not_depend_on_longer_rows_beside_them():
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    model, tokenizer = small_model("llama", rope_parameters=rope), tiny_tokenizer()
    vectors = contrasts(model, tokenizer, PAIRS)
    for (prompt, options), half in zip(PAIRS, vectors, strict=True):
        first, second = (plain_states(model, tokenizer, prompt + text) for text in options)
        assert half == pytest.approx((first - second) / 2, abs=2e-4)


def test_layer_that_is_not_finite_is_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3] = torch.nan
    with pytest.raises(RunFailure, match=r"^hidden states of layer 1 are NaN or infinite"):
        contrasts(model, tiny_tokenizer(), PAIRS)


def test_large_arrays_are_stored_in_float16(monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    whole = contrasts(model, tokenizer, PAIRS)
    monkeypatch.setattr(hidden_states, "LARGEST_FLOAT32", whole.nbytes - 1)
    half = contrasts(model, tokenizer, PAIRS)
    assert half.dtype == np.float16
    assert half.astype(float) == pytest.approx(whole.astype(float), rel=2e-3, abs=1e-3)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1e7
    with pytest.raises(RunFailure, match=r"layer 0 are too large for float16"):
        contrasts(model, tokenizer, PAIRS)


def test_prompt_longer_than_the_context_is_refused_with_its_index():
    with pytest.raises(PromptTooLong, match=r"need 86 tokens, .* holds 64") as caught:
        contrasts(tiny_model(context=64), tiny_tokenizer(), PAIRS)
    assert caught.value.index == 2


# --- the probe -----------------------------------------------------------------------------------


def made_up(num_pairs=240, hidden=24, categories=4, templates=10, seed=0):
    """Noise of shape (pairs, 1, hidden), and a row per pair; labels are coins."""
    rng = np.random.default_rng(seed)
    place = np.arange(num_pairs) * categories * templates // num_pairs
    frame = pd.DataFrame(
        {
            "item": range(num_pairs),
            "cluster": [f"c{i // templates}/{i % templates}" for i in place],
            "category": [f"c{i // templates}" for i in place],
            "first": rng.integers(0, 2, num_pairs).astype(bool),
        }
    )
    return rng.normal(size=(num_pairs, 1, hidden)).astype(np.float32), frame, rng


def overall(table, held_out=TEMPLATE, trained_on="Q", condition="Q", layer=0):
    rows = table[
        (table["category"] == "overall")
        & (table["held_out"] == held_out)
        & (table["trained_on"] == trained_on)
        & (table["condition"] == condition)
        & (table["layer"] == layer)
    ]
    assert len(rows) == 1
    return rows.iloc[0]


def test_planted_direction_is_found_and_noise_is_chance():
    noise, frame, rng = made_up()
    signs = np.where(frame["first"], 1, -1)[:, None]
    planted = noise[:, 0] + 2 * signs * rng.normal(size=noise.shape[2])
    vectors = np.stack([noise[:, 0], planted], axis=1)
    table = probe_layers({"Q": vectors}, frame, folds=5, seed=0)
    for held_out in (TEMPLATE, CATEGORY):
        nothing, results = (overall(table, held_out, layer=layer) for layer in (0, 1))
        assert nothing.low < 0.5 < nothing.high and 0.1 < nothing.high - nothing.low < 0.25
        assert results.accuracy > 0.98 and results.low > 0.95
        for row in (nothing, results):
            assert row.baseline_accuracy == pytest.approx(0.5, abs=0.1)
            assert (row.num_pairs, row.num_clusters) == (240, 40)
    assert set(table["category"]) == {"overall", "c0", "c1", "c2", "c3"}
    assert set(table.loc[table["category"] == "c1", "num_pairs"]) == {60}
    of_categories = table[(table["category"] != "overall") & (table["held_out"] == TEMPLATE)]
    means = of_categories.groupby("layer")["accuracy"].mean()  # of equal size
    assert list(means) == pytest.approx([overall(table, layer=i).accuracy for i in (0, 1)])


def test_templates_do_not_leak():
    """States that say only which template it is, and labels that are one coin a template."""
    _, frame, rng = made_up(num_pairs=480, templates=30)
    names, codes = np.unique(frame["cluster"], return_inverse=True)
    codebook = rng.normal(size=(len(names), 200))
    vectors = {"Q": codebook[codes][:, None]}
    frame["first"] = rng.integers(0, 2, len(names)).astype(bool)[codes]
    row = overall(probe_layers(vectors, frame, folds=5, seed=0))
    assert row.low < 0.5 < row.high
    # The same states are all one needs as soon as a template may be on both sides.
    leaking = frame.assign(cluster=[f"{c}/{i}" for i, c in enumerate(frame["cluster"])])
    assert overall(probe_layers(vectors, leaking, folds=5, seed=0)).accuracy > 0.9


def test_whole_categories_are_held_out():
    """One direction a category: known within a category, of no use in another."""
    noise, frame, _ = made_up(hidden=40)
    _, codes = np.unique(frame["category"], return_inverse=True)
    signs = np.where(frame["first"], 1, -1)[:, None]
    apart = np.eye(4)[codes].repeat(10, axis=1)  # ten dimensions a category
    vectors = {"Q": (0.2 * noise[:, 0] * apart + signs * apart)[:, None]}
    table = probe_layers(vectors, frame, folds=5, seed=0)
    assert overall(table).accuracy > 0.98
    held_out = overall(table, CATEGORY)
    assert held_out.accuracy == held_out.low == held_out.high == 0.5  # nothing to go by, exactly
    two = probe_layers(
        {"Q": vectors["Q"][:120]}, frame[:120].reset_index(drop=True), folds=5, seed=0
    )
    assert set(two["held_out"]) == {TEMPLATE}


def test_probe_transfers_between_conditions():
    noise, frame, _ = made_up()
    signs = np.where(frame["first"], 1, -1)[:, None]
    one, other = 3 * np.eye(noise.shape[2])[:2]
    vectors = {
        "Q": (noise[:, 0] + signs * one)[:, None],
        "turned round": (noise[:, 0] - signs * one)[:, None],
        "elsewhere": (noise[:, 0] + signs * other)[:, None],
    }
    table = probe_layers(vectors, frame, folds=5, seed=0)
    for condition in vectors:
        assert overall(table, trained_on=condition, condition=condition).accuracy > 0.95
    assert overall(table, condition="turned round").high < 0.05
    assert 0.3 < overall(table, condition="elsewhere").accuracy < 0.7


def test_direction_equals_a_scikit_learn_pipeline():
    noise, frame, _ = made_up()
    half = noise[:, 0].astype(float) * np.arange(1, 25) + 0.3
    first = frame["first"].to_numpy()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, fit_intercept=False))
    pipeline.fit(np.concatenate([half, -half]), np.concatenate([first, ~first]))
    direction = linear_probe._fit_direction(half, first, 0.01)
    assert half @ direction == pytest.approx(pipeline.decision_function(half), abs=1e-3)
    assert np.array_equal(
        linear_probe._correct(half @ direction, first), pipeline.predict(half) == first
    )
    # One class among the first options, and a dimension without any spread, are no trouble.
    half[:, 3] = 0
    assert linear_probe._fit_direction(half, np.ones(len(half), dtype=bool), 0.01)[3] == 0


def test_strength_is_chosen_on_held_out_groups():
    noise, frame, rng = made_up(hidden=200)
    groups = frame["cluster"].to_numpy(dtype=str)
    first = frame["first"].to_numpy()
    signs = np.where(first, 1, -1)[:, None]
    chosen = [
        linear_probe._choose_strength(
            noise[:, 0] + size * signs * rng.normal(size=200), first, groups
        )
        for size in (0.0, 1.0)
    ]
    assert chosen[0] <= 1e-4 < 1e-3 <= chosen[1]


# --- the pairs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def society(tmp_path_factory):
    """The society's benchmarks, and the tokenizer that knows its words."""
    folder = tmp_path_factory.mktemp("society")
    world = make_world(SocietySettings(blocks_per_template=1))
    write_benchmarks(world, folder)
    return folder, make_tokenizer(world)


def society_plan(society, conditions=("Q", "Q+IF"), **more) -> EvaluationPlan:
    folder = society[0]
    return plan_evaluation(
        folder, load_stimuli(None, base=folder / "stimuli.yaml"), ["bbq"], conditions, **more
    )


def test_pairs_are_the_people_in_the_order_shown(society):
    [cell] = society_plan(society, ["Q"], permutations=3).cells
    pairs = pairs_of(cell, society[1])
    by_id = {item.id: item for item in cell.items}
    assert len(pairs.frame) == len(pairs.requests) == 3 * len(by_id) // 2
    assert pairs.left_out == {"the context decides": len(by_id) // 2}
    for row, (prompt, options) in zip(pairs.frame.itertuples(), pairs.requests, strict=True):
        item = by_id[row.item]
        assert item.facts["context"] == "ambiguous" and item.cluster == row.cluster
        agreeing = item.options[item.facts["stereotyped"]]
        assert options.index(agreeing) == (0 if row.first else 1)
        assert item.options[item.facts["unknown"]] not in options
        assert item.fields["question"] in prompt
        places = [prompt.rindex(option.strip()) for option in options]
        assert places == sorted(places)


def names_alone(cell, tokenizer, joined):
    """Contrasts made of the options' words, times the question's polarity if `joined`."""
    pairs = pairs_of(cell, tokenizer)
    words = sorted({word for _, options in pairs.requests for o in options for word in o.split()})
    index = {word: i for i, word in enumerate(words)}
    half = np.zeros((len(pairs.requests), 1, len(words)))
    polarity = {item.id: 1 if item.facts["polarity"] == "neg" else -1 for item in cell.items}
    for row, (item, (_, options)) in enumerate(
        zip(pairs.frame["item"], pairs.requests, strict=True)
    ):
        for sign, option in zip((0.5, -0.5), options, strict=True):
            for word in option.split():
                half[row, 0, index[word]] += sign * (polarity[item] if joined else 1)
    return {"Q": half}, pairs.frame


def test_names_alone_are_exactly_at_chance(society):
    [cell] = society_plan(society, ["Q"]).cells
    vectors, frame = names_alone(cell, society[1], joined=False)
    assert np.abs(vectors["Q"]).sum() > 0
    table = probe_layers(vectors, frame, folds=5, seed=0)
    assert set(table["accuracy"]) == {0.5}


REAL = Path(os.environ.get("SELFCORRECT_DATA_DIR", "none"))


@pytest.mark.skipif(
    not (REAL / "bbq").is_dir(), reason="SELFCORRECT_DATA_DIR names no folder with bbq/"
)
def test_published_names_are_at_chance_with_polarity_only_across_categories(quick):
    texts = load_stimuli(None)
    [cell] = plan_evaluation(REAL, texts, ["bbq"], ["Q text"], limit=3000).cells
    vectors, frame = names_alone(cell, tiny_tokenizer(), joined=False)
    assert len(frame) > 500
    table = probe_layers(vectors, frame, folds=5, seed=0)
    assert overall(table).accuracy == overall(table, CATEGORY).accuracy == 0.5
    vectors, frame = names_alone(cell, tiny_tokenizer(), joined=True)
    table = probe_layers(vectors, frame, folds=5, seed=0)
    assert overall(table).low > 0.6  # other templates of the category have the same groups
    held_out = overall(table, CATEGORY)
    assert held_out.low < 0.5 < held_out.high


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"conditions": ["Q", "Q+IF+CoT"]},
            r"^bbq Q\+IF\+CoT: probes do not support",
        ),
        ({"limit": 8}, r"^bbq: 2 templates .* \(left out: 4 the context decides\); 5 folds need 5"),
    ],
)
def test_plan_that_cannot_be_probed_is_refused(society, more, message):
    with pytest.raises(InputError, match=message) as caught:
        check_plan(society_plan(society, **more), folds=5)
    assert "\n" not in str(caught.value)


def test_only_bbq_is_probed(society):
    folder = society[0]
    stimuli = load_stimuli(None, base=folder / "stimuli.yaml")
    with pytest.raises(InputError, match=r"^winogender Q: only bbq can be probed$"):
        check_plan(plan_evaluation(folder, stimuli, ["winogender"], ["Q"]), folds=5)
    with pytest.raises(InputError, match="no condition to probe"):
        check_plan(EvaluationPlan([]), folds=5)


def test_folds_need_as_many_templates(society):
    cells = society_plan(society, ["Q"], limit=20)
    assert check_plan(cells, folds=5) == cells.cells
    with pytest.raises(InputError, match="6 folds need 6"):
        check_plan(cells, folds=6)


# --- files, skipping, the command ----------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Fewer fits, where their result does not matter."""
    monkeypatch.setattr(linear_probe, "STRENGTHS", (0.01,))
    monkeypatch.setattr(linear_probe, "NUM_SHUFFLES", 1)


def model_of(tokenizer, seed):
    return tiny_model("llama", len(tokenizer), seed=seed)


def test_probe_file_is_reproducible_and_records_its_settings(society, tmp_path, quick):
    cells, tokenizer = society_plan(society), society[1]
    paths = [tmp_path / name / CHECKPOINT_FILE for name in ("one", "two")]
    seen = []
    for path in paths:
        probe_checkpoint(
            cells, model_of(tokenizer, 0), tokenizer, path, progress=lambda *args: seen.append(args)
        )
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert seen[-1] == ("probes", 12, 12)
    table, settings = read_probe(paths[0])
    assert list(table.columns) == (
        "trained_on condition held_out layer category accuracy low high baseline_accuracy "
        "num_pairs num_clusters".split()
    )
    pairs = {(a, b) for a in ("Q", "Q+IF") for b in ("Q", "Q+IF")}
    assert set(zip(table["trained_on"], table["condition"], strict=True)) == pairs
    categories = {item.category for item in cells.cells[0].items}
    assert len(table) == 4 * 2 * 3 * (1 + len(categories))
    assert settings["num_layers"] == 3 and settings["stored_as"] == "float32"
    assert settings["left_out"] == {"the context decides": len(cells.cells[0].items) // 2}
    # Options end in a group's name: known from the embeddings on, and of no use alone.
    assert overall(table).accuracy == 0.5
    assert is_probed(paths[0], cells, 5, 0)
    assert not is_probed(paths[0], cells, 4, 0)
    assert not is_probed(paths[0], cells, 5, 1)
    assert not is_probed(paths[0], society_plan(society, ["Q"]), 5, 0)
    paths[1].write_bytes(paths[0].read_bytes()[:-9])
    assert not is_probed(paths[1], cells, 5, 0)
    with pytest.raises(InputError, match="not an intact probe file"):
        read_probe(tmp_path / "none.parquet")


def test_errors_name_cell_and_item(society, tmp_path):
    cells, tokenizer = society_plan(society), society[1]
    short = tiny_model("llama", len(tokenizer), context=16)
    with pytest.raises(InputError, match=r"^bbq Q, item \S+/\d+: prompt and option need .*; use a"):
        probe_checkpoint(cells, short, tokenizer, tmp_path / CHECKPOINT_FILE)
    broken = model_of(tokenizer, 0)
    with torch.no_grad():
        broken.model.norm.weight[:] = torch.nan
    with pytest.raises(RunFailure, match=r"^bbq Q: hidden states of layer 2 are NaN") as caught:
        probe_checkpoint(cells, broken, tokenizer, tmp_path / CHECKPOINT_FILE)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.fixture
def run(society, tmp_path):
    """A run of the society with two checkpoints of one tiny model."""
    tokenizer = society[1]
    run = tmp_path / "a run"
    write_benchmarks(make_world(SocietySettings(blocks_per_template=1)), run / "benchmarks")
    save_recipe(load_recipe("quickstart", ["evaluate.limit=120"]), run / "recipe.yaml")
    for step in (0, 10):
        place = run / "tiny" / "seed-0" / "ppo" / f"checkpoint-{step}"
        model_of(tokenizer, step).save_pretrained(place)
        tokenizer.save_pretrained(place)
        CheckpointRecord(
            **{"model": "tiny", "parameters": 30_000, "seed": 0, "step": step, "episodes": step},
            **{"tokens": step, "optimizer_updates": step, "kl": None, "reward": None},
            **{"recipe_digest": "0" * 64, "versions": {}},
        ).write(place)
    return run


def test_command_probes_a_run_once_and_draws_it(run, monkeypatch, quick):
    def times():
        return {path: path.stat().st_mtime_ns for path in run.rglob("bbq.parquet")}

    result = CliRunner().invoke(app, [str(run)])
    assert result.exit_code == 0, result.output
    assert "tiny, 0" in result.output and "tiny, 10" in result.output
    assert "probe.parquet" in result.output
    frame = pd.read_parquet(run / "probe.parquet")
    assert list(frame.columns[:4]) == ["model", "parameters", "seed", "step"]
    assert set(frame["step"]) == {0, 10} and set(frame["condition"]) == {"Q", "Q+IF"}
    assert set(frame.loc[frame["category"] == "overall", "num_pairs"]) == {60}  # 120 items
    for kind in ("png", "svg"):
        assert (run / "figures" / f"probe-tiny.{kind}").stat().st_size > 1000
    before, drawn = times(), (run / "figures" / "probe-tiny.png").read_bytes()
    assert len(before) == 2
    loaded = []
    from selfcorrect.evaluate.probe import probe as module

    load = module.load_model
    monkeypatch.setattr(
        module, "load_model", lambda path, **more: loaded.append(path.name) or load(path, **more)
    )
    assert CliRunner().invoke(app, [str(run)]).exit_code == 0
    assert times() == before and not loaded
    assert (run / "figures" / "probe-tiny.png").read_bytes() == drawn
    (find_checkpoints(run)[1].folder / CHECKPOINT_FILE).unlink()
    assert CliRunner().invoke(app, [str(run)]).exit_code == 0
    assert loaded == ["checkpoint-10"]
    assert pd.read_parquet(run / "probe.parquet").equals(frame)
    assert CliRunner().invoke(app, [str(run), "--conditions", "Q"]).exit_code == 0
    assert loaded[1:] == ["checkpoint-0", "checkpoint-10"]


def test_command_probes_a_model_into_a_folder_of_its_weights(run, society, tmp_path, quick):
    model = find_checkpoints(run)[0].folder
    data = society[0]
    given = ["--data-dir", str(data), "--stimuli", str(data / "stimuli.yaml"), "--limit", "80"]
    result = CliRunner().invoke(app, [str(model), *given, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    [file] = (tmp_path / "out").rglob("*.parquet")
    assert file.relative_to(tmp_path / "out").parts[0] == "checkpoint-0"
    assert file.parts[-2:] == ("probe", "bbq.parquet")
    assert len(list((tmp_path / "out").rglob("probe-checkpoint-0.*"))) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--conditions", "Q,Q+IF+CoT"], "do not support sampled reasoning"),
        (["--conditions", "Z"], "condition 'Z'"),
        (["--limit", "4"], "5 folds need 5"),
        (["other"], "not both"),
    ],
)
def test_command_refuses_bad_arguments_in_one_line(run, more, message):
    result = CliRunner().invoke(app, [str(run), *more])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert not list(run.rglob("*.parquet")) and not (run / "figures").exists()


def test_figure_has_a_line_per_step_and_transfer_panels(quick):
    noise, frame, _ = made_up()
    tables = []
    for step in (0, 5, 60):
        states = np.concatenate([noise, noise * (1 + step), noise], axis=1)
        table = probe_layers({"Q": states, "Q+IF": -states}, frame, folds=5, seed=0)
        tables.append(table.assign(model="nano", parameters=9000, seed=0, step=step))
    data = pd.concat(tables, ignore_index=True)
    figure = accuracy_by_layer(data, "nano")
    assert len(figure.axes) == 6
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == ["Q", "Q+IF", "Q to Q+IF"]
    for ax in figure.axes:
        labels = [line.get_label() for line in ax.get_lines() if line.get_label()[0] != "_"]
        assert labels == ["step 0", "step 5", "step 60", "labels exchanged at random"]
    drawn = figure.axes[2].get_lines()[1].get_ydata()
    expected = [overall(tables[0], condition="Q+IF", layer=i).accuracy for i in range(3)]
    assert list(drawn) == pytest.approx(expected)
    assert "Held-out categories, Q to Q+IF: step 0" in in_words(figure)


def test_figure_of_a_model_without_steps(tmp_path):
    noise, frame, _ = made_up(categories=2)
    table = probe_layers({"Q": noise}, frame, folds=5, seed=0)
    data = table.assign(model="m", parameters=None, seed=0, step=None)
    figure = accuracy_by_layer(data, "m")
    assert len(figure.axes) == 1
    save(figure, tmp_path, "probe-m")
    assert (tmp_path / "probe-m.svg").is_file()
