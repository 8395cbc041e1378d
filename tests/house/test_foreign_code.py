"""Code that comes with a model or a data set runs only if the user trusts it."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Model
from selfcorrect.train.feedback.files import read_rows
from selfcorrect.train.planning.model_shape import _through_transformers, model_shape
from selfcorrect.train.ppo.reward_models import load_reward_model
from selfcorrect.train.stages.policy import load_policy
from tests.support.payloads import model_folder, train_policy_of


def model_with_code(folder: Path, mark: Path, of: str) -> Path:
    """Write a model folder whose configuration or tokenizer names a class in its own file."""
    model_folder(folder)
    if of == "generation":
        (folder / "custom_generate").mkdir()
        code = f"open({str(mark)!r}, 'w')\ndef generate(**_): pass\n"
        (folder / "custom_generate" / "generate.py").write_text(code)
        return folder
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    path = folder / ("config.json" if of == "model" else "tokenizer_config.json")
    content = json.loads(path.read_text())
    if of == "model":
        content["model_type"] = "evil"
        names = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
        content["auto_map"] = dict.fromkeys(names, "evil.Evil")
    else:
        content["tokenizer_class"] = "Evil"
        content["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("of", ["model", "tokenizer", "generation"])
def test_code_of_a_model_runs_only_if_trusted_and_is_logged(
    tmp_path: Path, mark: Path, of: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_with_code(tmp_path / "model", mark, of)
    if of == "generation":  # transformers has its own `generate` instead
        load_model(folder)
    else:
        with pytest.raises(InputError, match="trust_remote_code: true"):
            load_model(folder)
    assert not mark.exists()
    assert "trust_remote_code is on" not in caplog.text
    with suppress(Exception):  # the class is useless, but its file runs
        load_model(folder, trust_remote_code=True)
    assert mark.exists()
    assert f"{folder}: trust_remote_code is on" in caplog.text


def trusted(folder: Path) -> Model:
    return Model(name="m", path=str(folder), trust_remote_code=True)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: load_reward_model(folder),
        lambda folder: load_policy(str(folder), trust_remote_code=False),
        lambda folder: model_shape(trusted(folder), "models.0"),
        lambda folder: _through_transformers(trusted(folder), "models.0"),
        train_policy_of,
    ],
    ids=["reward", "policy", "plan", "plan from the hub", "trainer"],
)
def test_other_loaders_never_run_code_of_a_model(
    tmp_path: Path, mark: Path, read: Callable
) -> None:
    folder = model_with_code(tmp_path / "model", mark, "model")
    with pytest.raises((InputError, ValueError)):
        read(folder)
    assert not mark.exists()


def test_data_set_with_a_loading_script_is_refused(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(InputError, match=r"data\.preferences: .*script"):
        read_rows(str(folder), "data.preferences")
    assert not mark.exists()
