"""The shipped series are read and planned: without the hub, and with the steps that it has."""

import math
from pathlib import Path

import pytest

from selfcorrect.recipes.load import load_measured, shipped_series
from selfcorrect.recipes.series import Series
from selfcorrect.train.planning.known_models import known_fields
from selfcorrect.train.planning.memory import Parallelism
from selfcorrect.train.planning.model_shape import shape_of
from selfcorrect.train.planning.series import estimate_series
from tests.support.hub import hub_as_default

GPU = Parallelism(1, 0, True, "bfloat16")
# Those of recipes/study are of files that users fetch.
PUBLISHED = [path for path in shipped_series() if path.parent.name == "published"]


def shipped(name: str) -> Series:
    series = load_measured(name)
    assert isinstance(series, Series)
    return series


def test_the_published_ladders_are_shipped() -> None:
    names = {path.stem: [m.name for m in shipped(path.stem).models] for path in PUBLISHED}
    assert names == {
        "olmo2-rlvr": ["olmo-2-1b", "olmo-2-7b", "olmo-2-13b", "olmo-2-32b"],
        "pythia-pretraining": [
            f"pythia-{size}"
            for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
        ],
        "polypythias": [f"pythia-{size}" for size in ("14m", "31m", "70m", "160m", "410m")],
    }
    pythia, seeds = shipped("pythia-pretraining"), shipped("polypythias")
    assert len(pythia.listed()) == 8 * 12 and len(seeds.listed()) == 5 * 10 * 12
    assert seeds.seeds == list(range(10))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_series_are_planned_without_the_hub(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    series = shipped(path.stem)
    estimates, counts, notes = estimate_series(series, GPU)
    assert [estimate.name for estimate in estimates] == [model.name for model in series.models]
    assert len(notes) == sum(not given.is_listed for given in series.checkpoints)
    for estimate in estimates:
        size = estimate.shape.parameters
        footprint = estimate.footprints[0]
        bytes_each = 2 if series.evaluate.dtype == "bfloat16" else 4
        assert footprint.parts["weights"] == bytes_each * size
        assert estimate.disk.kept == 0 and estimate.disk.working == 2 * size
        assert math.isfinite(estimate.work[0].flops) and estimate.work[0].tokens > 0
    listed = {model.name: 12 * len(series.seeds) for model in series.models}
    assert counts == (dict.fromkeys(counts, 0) if series.is_discovered else listed)


def test_a_plan_has_the_steps_that_the_hub_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = shipped("olmo2-rlvr")
    with hub_as_default(monkeypatch, tmp_path) as hub:
        branches = dict.fromkeys(("main", "step_60", "step_120", "step_360"), tmp_path)
        for given in series.checkpoints:
            hub.models[given.path] = branches
        one = estimate_series(series, GPU, "olmo-2-7b")
        four, counts, notes = estimate_series(series, GPU)
    assert (notes, set(counts.values())) == ([], {4})
    assert four[1] == one[0][0] and four[1].work[0].tokens == 4 * _tokens_of_one(series)


def _tokens_of_one(series: Series) -> float:
    return estimate_series(series, GPU, "olmo-2-7b")[0][0].work[0].tokens


def test_variants_have_the_shape_of_their_model() -> None:
    for variant, name in {
        "EleutherAI/pythia-410m-seed7": "EleutherAI/pythia-410m",
        "allenai/OLMo-2-0325-32B-Instruct": "allenai/OLMo-2-0325-32B",
        "allenai/OLMo-2-1124-13B-Instruct-RLVR2": "allenai/OLMo-2-1124-13B",
        "allenai/OLMo-2-0425-1B-DPO": "allenai/OLMo-2-0425-1B",
    }.items():
        assert known_fields(variant) == known_fields(name) is not None
    assert known_fields("EleutherAI/pythia-410m-v0") is None
    # Sizes in the names of PolyPythias' two smallest models.
    for name, millions in (("14m", 14.07), ("31m", 30.49)):
        fields = known_fields(f"EleutherAI/pythia-{name}-seed1")
        assert fields is not None
        assert round(shape_of(fields, name).parameters / 1e6, 2) == millions
