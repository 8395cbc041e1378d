"""Model shapes against transformers, published parameter counts, and counts by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Model
from selfcorrect.train.planning.known_models import KNOWN_MODELS
from selfcorrect.train.planning.model_shape import (
    DEFAULTS,
    MODEL_TYPES,
    Adapter,
    model_shape,
    shape_of,
)
from tests.support.estimates import LLAMA


def on_meta(fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(fields)
    model_type = given.pop("model_type")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given))


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models_parameter_counts(name: str) -> None:
    shape = shape_of(KNOWN_MODELS[name], name)
    model = on_meta(KNOWN_MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert sum(p.numel() for p in model.base_model.parameters()) == shape.backbone


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_defaults_are_transformers_defaults(kind: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    for key, value in DEFAULTS[kind].items():
        assert getattr(config, key) == value, key
    shape = shape_of({"model_type": kind}, kind)
    assert sum(p.numel() for p in on_meta({"model_type": kind}).parameters()) == shape.parameters


def test_published_parameter_counts() -> None:
    """Parameters without embeddings as published (Pythia exactly, Qwen2.5 in billions)."""
    pythia = {"70m": 18_915_328, "160m": 85_056_000, "410m": 302_311_424, "1b": 805_736_448,
              "1.4b": 1_208_602_624, "2.8b": 2_517_652_480, "6.9b": 6_444_163_072,
              "12b": 11_327_027_200}  # fmt: skip
    qwen = {"0.5B": 0.36, "1.5B": 1.31, "3B": 2.77, "7B": 6.53, "32B": 31.0, "72B": 70.0}
    for size, parameters in pythia.items():
        shape = shape_of(KNOWN_MODELS[f"EleutherAI/pythia-{size}"], size)
        assert shape.parameters - 2 * shape.embedding == parameters
    for size, billions in qwen.items():
        shape = shape_of(KNOWN_MODELS[f"Qwen/Qwen2.5-{size}"], size)
        body = shape.parameters - shape.embedding * (1 if shape.tied else 2)
        assert body / 1e9 == pytest.approx(billions, rel=0.01)


def test_parameters_by_hand() -> None:
    shape = shape_of(LLAMA, "llama")
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 24 + 2 * 8
    assert shape.layer == layer
    assert shape.backbone == 10 * 8 + 2 * layer + 8
    assert shape.parameters == shape.backbone + 10 * 8
    assert shape.trainable(Adapter(4, frozenset({"q_proj", "down_proj"}))) == 2 * 4 * (
        (8 + 8) + (24 + 8)
    )


def test_shape_from_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = Model(name="m", path=str(tmp_path))
    assert model_shape(model, "models.0") == shape_of(LLAMA, "llama")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", r"models\.0\.path: no model folder \./nowhere"),
        ("{}", r"models\.0\.path: .*: has no config\.json"),
        ("{}/odd", "memory of a 'mamba' model.*supported: llama"),
        ("{}/bad", "hidden_size is 'wide'; .*positive integer"),
        ("{}/cut", "cannot be read"),
        ("some-owner/some-model", "neither on the hub nor in the cache"),
    ],
)
def test_unknown_model_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in (
        ("odd", json.dumps({"model_type": "mamba"})),
        ("bad", json.dumps({**LLAMA, "hidden_size": "wide"})),
        ("cut", "{"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        model_shape(Model(name="m", path=path.format(tmp_path)), "models.0")
    assert "\n" not in str(caught.value)
