"""What cannot be launched is one line before any model is read; what can is written as files."""

import importlib.util
import json
import logging
import os
import re
import stat
import sys
from pathlib import Path

import pytest
import torch
import yaml

from selfcorrect.evaluate.scoring import vllm
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe, training_digest
from selfcorrect.recipes.schema import Launch, Recipe
from selfcorrect.train.check import check_training
from selfcorrect.train.distributed.settings import (
    check_launch,
    deepspeed_settings,
    process_environment,
    write_settings,
)
from selfcorrect.train.planning.estimate import parallelism_of
from selfcorrect.train.planning.memory import Parallelism

deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP",
                 "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("quickstart", ["launch.jobs=1", *overrides])


def saved(folder: Path, content: object) -> str:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "overrides", "message"),
    [
        (2, ["launch.processes=4"], "launch.processes: 4 processes need as many GPUs, and .* 2"),
        (4, ["launch.processes=2", "launch.jobs=3"], "launch.jobs: 3 jobs of 2 .* need 6 GPUs"),
    ],
)
def test_more_processes_than_gpus_are_refused(monkeypatch, gpus, overrides, message) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(InputError, match=message):
        check_launch(recipe(*overrides))


def test_as_many_processes_as_gpus_are_accepted(monkeypatch) -> None:
    with_gpus(monkeypatch, 4)
    check_launch(recipe("launch.processes=2", "launch.jobs=2"))


def test_more_processes_than_cores_are_a_warning(monkeypatch, caplog) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with caplog.at_level(logging.WARNING):
        check_launch(recipe("launch.processes=2"))
        assert not caplog.messages
        check_launch(recipe("launch.processes=3"))
    (message,) = caplog.messages
    assert "3 processes share 2 cores" in message


@pytest.mark.parametrize(
    ("name", "value", "overrides", "message"),
    [
        ("WORLD_SIZE", "2", [], "WORLD_SIZE is 2: .*launch.processes"),
        ("WORLD_SIZE", "2", ["launch.processes=2"], "starts its own processes"),
        ("ACCELERATE_USE_DEEPSPEED", "true", [], "the recipe does not ask for DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", [], "ACCELERATE_USE_FSDP is set"),
        ("ACCELERATE_USE_CPU", "true", ["launch.processes=2"], "ACCELERATE_USE_CPU is set, but"),
    ],
)
def test_conflicting_environment_is_refused(monkeypatch, name, value, overrides, message) -> None:
    with_gpus(monkeypatch, 2)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        check_launch(recipe(*overrides))


@deepspeed
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither zero1, zero2, zero3 nor"),
        ("{stage: 3}", "not JSON"),
        ("[3]", "JSON object"),
        ({}, "zero_optimization.stage is None, .*1, 2 or 3"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": False}},
            r"zero_optimization\.overlap_com: Extra inputs are not permitted",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}},
            r"zero_optimization\.offload_param\.device: Input should be",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs stage 3",
        ),
        (
            {"zero_optimization": {"stage": 2}, "train_batch_size": 8},
            'train_batch_size must be "auto"',
        ),
        (
            {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}},
            r"one learning rate.*policy\.trainer\.critic_learning_rate",
        ),
    ],
)
def test_unusable_deepspeed_file_is_refused(tmp_path, content, message) -> None:
    asked = str(tmp_path / "none.json") if content is None else saved(tmp_path, content)
    with pytest.raises(InputError, match=message) as raised:
        check_launch(recipe("launch.processes=2", f"launch.deepspeed={asked}"))
    assert str(raised.value).startswith("launch.deepspeed: ") and "\n" not in str(raised.value)


@deepspeed
def test_offload_needs_a_compiler(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # pip's ninja is beside it
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    asked = recipe("launch.processes=2", f"launch.deepspeed={saved(tmp_path, OFFLOAD)}")
    for tool in ("c++", "ninja"):
        with pytest.raises(InputError, match=f"{re.escape(tool)} is not on PATH"):
            check_launch(asked)
        (tmp_path / tool).touch()
        (tmp_path / tool).chmod(stat.S_IRWXU)
    check_launch(asked)


def test_missing_package_is_refused(monkeypatch) -> None:
    results = importlib.util.find_spec
    gone = ("deepspeed", "vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in gone else results(n))
    with pytest.raises(InputError, match=r"launch\.deepspeed: DeepSpeed is not installed; pip "):
        check_launch(recipe("launch.deepspeed=zero2"))
    with pytest.raises(InputError, match=r"policy\.trainer\.use_vllm: vLLM is not installed; pip "):
        check_training(recipe("policy.trainer.use_vllm=true"))
    with pytest.raises(InputError, match=r"evaluate\.engine: vllm is not installed: pip "):
        check_training(recipe("evaluate.engine=vllm", "evaluate.attach=off"))


@pytest.mark.parametrize(
    ("engine", "given", "reason"),
    [
        ("vllm", "policy.lora={use_dora: true}", r"policy\.lora: .*use_dora"),
        ("vllm", "policy.lora={modules_to_save: [lm_head]}", r"policy\.lora: .*modules_to_save"),
        ("vllm", "evaluate.engine_args.nonsense=1", r"engine_args: vLLM has no setting nonsense"),
        ("lm-eval:vllm", "policy.lora={r: 4}", r"evaluate\.engine: .* reads no adapters"),
    ],
)
def test_engine_that_could_not_measure_is_refused(monkeypatch, engine, given, reason) -> None:
    results = importlib.util.find_spec
    found = lambda name: results("json" if name in ("vllm", "lm_eval") else name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(vllm, "known_arguments", lambda: {"tensor_parallel_size"})
    with pytest.raises(InputError, match=reason):
        check_training(recipe(f"evaluate.engine={engine}", "evaluate.attach=off", given))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["evaluate.engine_args.device_map=auto", "evaluate.attach=inline"], "attach: off"),
        (["evaluate.engine=vllm", "evaluate.engine_args.device_map=auto"], "not a setting of vllm"),
        (["evaluate.engine_args.tensor_parallel_size=2"], "not a setting of packed"),
        (["evaluate.engine=vllm", "evaluate.engine_args.trust_remote_code=true"], "trust_remote"),
        (["evaluate.engine=lm-eval:api", "evaluate.dtype=bfloat16"], "chooses its own type"),
    ],
)
def test_settings_of_another_engine_are_refused(settings, reason) -> None:
    with pytest.raises(InputError, match=reason):
        recipe("evaluate.attach=off", *settings)


def test_deepspeed_file_is_passed_on_unchanged(tmp_path) -> None:
    given = {**OFFLOAD, "communication_data_type": "fp32"}
    launch = Launch(processes=3, deepspeed=saved(tmp_path, given))
    written = yaml.safe_load(write_settings(launch, tmp_path / "run", on_gpu=True).read_text())
    assert (written["distributed_type"], written["num_processes"]) == ("DEEPSPEED", 3)
    assert written["use_cpu"] is False and "num_machines" not in written
    assert written["deepspeed_config"]["zero3_init_flag"] is False
    content = json.loads(Path(written["deepspeed_config"]["deepspeed_config_file"]).read_text())
    assert {key: content[key] for key in given} == given
    assert content["train_batch_size"] == content["gradient_clipping"] == "auto"


def test_zero3_gathers_weights_on_saving(tmp_path) -> None:
    launch = Launch(processes=2, deepspeed="zero3")
    written = yaml.safe_load(write_settings(launch, tmp_path, on_gpu=False).read_text())
    assert written["use_cpu"] is True and written["deepspeed_config"]["zero3_init_flag"] is True
    zero = deepspeed_settings("zero3", on_gpu=True)["zero_optimization"]
    assert zero == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


def test_parallel_jobs_use_different_gpus(monkeypatch) -> None:
    launch = Launch(processes=2, jobs=2)
    slots = [process_environment(launch, 1, True, slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)]
    assert slots == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-7,6")  # a cluster's share of a machine
    slots = [process_environment(launch, 1, True, slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)]
    assert slots == ["4,5", "GPU-7,6"]


def test_variables_of_another_launcher_are_removed(monkeypatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    results = process_environment(Launch(processes=2, deepspeed="zero2"), 3, False, 0)
    assert "MASTER_PORT" not in results and "ACCELERATE_USE_CPU" not in results
    assert results["OMP_NUM_THREADS"] == "3"
    assert process_environment(Launch(processes=2), 1, False, 0)["ACCELERATE_USE_CPU"] == "true"


def test_training_digest_depends_on_the_processes() -> None:
    digests = {
        training_digest(recipe(*more), "width-16", 0)
        for more in ([], ["launch.processes=2"], ["launch.processes=2", "launch.deepspeed=zero2"])
    }
    assert len(digests) == 3
    alone = training_digest(recipe("launch.jobs=2", "launch.threads=1"), "width-16", 0)
    assert alone in digests


def test_plan_defaults_to_the_launch_section() -> None:
    asked = recipe("launch.processes=4", "launch.deepspeed=zero2")
    assert parallelism_of(asked, None, None, True) == Parallelism(4, 2, True)
    assert parallelism_of(asked, 8, 3, True) == Parallelism(8, 3, True)
    assert parallelism_of(asked, 1, None, True) == Parallelism(1, 0, True)
    assert parallelism_of(recipe(), None, None, False) == Parallelism(1, 0, False)
