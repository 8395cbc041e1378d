"""No pickle is loaded: neither weights nor training states."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainingArguments

from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.train.ppo.reward_models import load_reward_model
from selfcorrect.train.stages.policy import load_policy
from selfcorrect.train.trainers.guarded import GuardedTrainer, load_nested, save_nested
from tests.support.payloads import model_folder, train_policy_of, write_pickle
from tests.support.tiny_models import tiny_model

torch.set_num_threads(1)


def test_payload_runs_if_it_is_unpickled(mark: Path, tmp_path: Path) -> None:
    write_pickle(tmp_path / "evil.pt", mark)
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()


def classifier(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)


def pickled_model(folder: Path, mark: Path) -> Path:
    write_pickle(model_folder(folder) / "pytorch_model.bin", mark)
    (folder / "model.safetensors").unlink()
    return folder


def pickled_shard(folder: Path, mark: Path) -> Path:
    """An index of safetensors that names a pickle as shard."""
    write_pickle(model_folder(folder) / "evil.bin", mark)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    shards = dict.fromkeys(tiny_model().state_dict(), "evil.bin")
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def pickled_adapter(folder: Path, mark: Path) -> Path:
    base = model_folder(folder / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    tuned = get_peft_model(tiny_model(), lora)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder / "adapter")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    write_pickle(folder / "adapter" / "adapter_model.bin", mark)
    return folder / "adapter"


def pickled_reward(folder: Path, mark: Path) -> Path:
    model_folder(folder, classifier(model_folder(folder / "base")))
    (folder / "model.safetensors").unlink()
    write_pickle(folder / "pytorch_model.bin", mark)
    return folder


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (pickled_model, load_model),
        (pickled_model, lambda path: load_policy(str(path))),
        (pickled_model, train_policy_of),
        (pickled_shard, load_model),
        (pickled_shard, train_policy_of),
        (pickled_shard, lambda path: load_reward_model(path)),
        (pickled_adapter, load_model),
        (pickled_adapter, lambda path: load_reward_model(path)),
        (pickled_reward, lambda path: load_reward_model(path)),
    ],
)
def test_pickled_weights_are_refused_with_the_remedy(
    tmp_path: Path, mark: Path, make: Callable, read: Callable
) -> None:
    folder = make(tmp_path / "model", mark)
    with pytest.raises(
        InputError, match=r"convert them to safetensors|save the adapter as"
    ) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../other/x.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_pointing_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model")
    model_folder(tmp_path / "other")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny_model().state_dict(), name)}
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is not a file of this folder"):
        load_model(folder)


def tiny_trainer(folder: Path, steps: int) -> GuardedTrainer:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_strategy="no", lr_scheduler_type="cosine",
    )  # fmt: skip
    return GuardedTrainer(model=tiny_model(seed=1), args=arguments, train_dataset=rows)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    trainer = tiny_trainer(folder, 4)
    trainer.train()
    return folder / "checkpoint-2"


def test_state_without_pickles_resumes_bitwise(state: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(state, tmp_path / "checkpoint-2")
    pickles = [path.name for path in copy.iterdir() if is_pickle(path)]
    assert pickles == ["training_args.bin"]
    (copy / "training_args.bin").unlink()
    tiny_trainer(tmp_path, 4).train(resume_from_checkpoint=str(copy))
    weights = "checkpoint-4/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (state.parent / weights).read_bytes()
    optimizers = [
        load_nested(folder / "checkpoint-4/optimizer.safetensors")
        for folder in (tmp_path, state.parent)
    ]
    first, second = (optimizer["state"][0]["exp_avg"] for optimizer in optimizers)
    assert torch.equal(first, second) and first.abs().sum() > 0


def is_pickle(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin",
     "optimizer.bin", "critic/critic.bin", "default/adapter_model.bin"],
)  # fmt: skip
def test_pickle_in_a_state_is_refused_by_name(
    state: Path, tmp_path: Path, mark: Path, name: str
) -> None:
    copy = shutil.copytree(state, tmp_path / "checkpoint-2")
    (copy / name).parent.mkdir(exist_ok=True)
    write_pickle(copy / name, mark)
    with pytest.raises(InputError, match=f"{name}: a pickle, which could run code") as caught:
        tiny_trainer(tmp_path, 4).train(resume_from_checkpoint=str(copy))
    assert "\n" not in str(caught.value) and not mark.exists()


def test_training_arguments_of_a_state_are_not_loaded(
    state: Path, tmp_path: Path, mark: Path
) -> None:
    copy = shutil.copytree(state, tmp_path / "checkpoint-2")
    write_pickle(copy / "training_args.bin", mark)
    tiny_trainer(tmp_path, 3).train(resume_from_checkpoint=str(copy))
    assert not mark.exists()


def test_nested_values_round_trip(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    value = {
        "a": [1, 2.5, None, True, "text"], 7: (tensor, tensor, torch.tensor(3)),
        "nested": {"x": ()}, "inf": float("inf"),
    }  # fmt: skip
    save_nested(tmp_path / "state.safetensors", value)
    again = load_nested(tmp_path / "state.safetensors")
    assert str(again) == str(value)
    with pytest.raises(InputError, match="missing or damaged"):
        load_nested(tmp_path / "none.safetensors")


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", pickle.dumps({"a": 1}), bytes(range(7, 71))])
def test_malformed_state_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "optimizer.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="missing or damaged"):
        load_nested(tmp_path / "optimizer.safetensors")
