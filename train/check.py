"""Check a recipe against the libraries' own settings, before anything is trained or written."""

import importlib.util
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.recipes.foundation.errors import InputError, machine_fault, reason_of
from selfcorrect.recipes.schema import Model, Recipe
from selfcorrect.train.feedback.benchmark import Source as BenchmarkSource


def check_training(recipe: Recipe) -> None:
    """Raise InputError for the first key of the recipe that would fail in training.

    The `trainer:` and `lora:` keys are passed to the libraries' classes; given models and data
    folders must exist; transformers must know the configurations from scratch.
    """
    if recipe.policy.trainer.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise InputError(
            "policy.trainer.use_vllm: vLLM is not installed; pip install 'selfcorrect[vllm]', or "
            "remove the key"
        )
    _check_engine(recipe)
    from selfcorrect.train.stages.arguments import lora_config
    from selfcorrect.train.stages.corpus import scratch_config

    _check_trainers(recipe)
    for index, model in enumerate(recipe.models):
        if not model.trainer:
            continue
        try:
            _check_trainers(recipe.of(model.name))
        except InputError as error:
            raise InputError(f"models.{index}.trainer: {error}") from None
    if recipe.policy.lora is not None:
        lora_config("policy.lora", recipe.policy.lora, "CAUSAL_LM")
    if recipe.reward.lora is not None:
        lora_config("reward.lora", recipe.reward.lora, "SEQ_CLS")
    for index, model in enumerate(recipe.models):
        _check_model(model.path, f"models.{index}.path")
        if model.scratch is not None:
            _check_family(scratch_config(model.scratch), f"models.{index}.scratch")
        elif model.path is not None and not model.trust_remote_code:
            _check_given(model, f"models.{index}.path")
    _check_model(recipe.reward.path, "reward.path")
    _check_data(recipe)


def _check_engine(recipe: Recipe) -> None:
    """Raise InputError if the engine could not measure the checkpoints that training leaves."""
    engine, lora = recipe.evaluate.engine, recipe.policy.lora
    if engine == "packed":
        return
    library = "vllm" if engine == "vllm" else "lm_eval"
    if importlib.util.find_spec(library) is None:
        extra = library.replace("_", "-")
        raise InputError(
            f"evaluate.engine: {engine} is not installed: pip install 'selfcorrect[{extra}]', or "
            f"remove the key and measure with --engine {engine} where it is"
        )
    for index, model in enumerate(recipe.models):
        if model.trust_remote_code:
            raise InputError(
                f"models.{index}.trust_remote_code: only the engine packed runs a model's own "
                f"code: remove evaluate.engine: {engine}"
            )
    if engine == "vllm":
        _check_vllm(recipe)
    elif engine != "lm-eval:hf" and lora is not None:
        raise InputError(
            f"evaluate.engine: {engine} reads no adapters (policy.lora): use lm-eval:hf or packed"
        )


def _check_vllm(recipe: Recipe) -> None:
    from selfcorrect.evaluate.scoring.vllm import known_arguments, problem_of_adapter

    evaluate, lora = recipe.evaluate, recipe.policy.lora
    held = recipe.precision.trained if lora is None else recipe.precision.frozen
    dtype = held if evaluate.dtype == "auto" else evaluate.dtype
    if dtype == "4bit":
        raise InputError(
            "evaluate.engine: vllm holds no weights in 4 bits (precision.frozen): set "
            "evaluate.dtype: bfloat16, or use packed"
        )
    if unknown := set(evaluate.engine_args) - known_arguments():
        raise InputError(f"evaluate.engine_args: vLLM has no setting {min(unknown)}")
    if lora is not None and (problem := problem_of_adapter(lora, dtype)):
        raise InputError(f"policy.lora: {problem}; or use evaluate.engine: packed")


def _check_trainers(recipe: Recipe) -> None:
    """Build the stages' settings with the libraries' own classes."""
    from transformers import TrainingArguments
    from trl import RewardConfig, SFTConfig

    from selfcorrect.train.stages.arguments import NO_CODE, build
    from selfcorrect.train.stages.baselines import offline_arguments
    from selfcorrect.train.stages.policy import policy_arguments

    folder = Path("unused")
    output = {"output_dir": str(folder)}
    fixed = {**output, **NO_CODE}
    if recipe.base is not None and recipe.base.method == "pretrain":
        build(TrainingArguments, "base.trainer", recipe.base.trainer, {"bf16": False}, output)
    elif recipe.base is not None:
        build(SFTConfig, "base.trainer", recipe.base.trainer, {"bf16": False}, fixed)
    build(RewardConfig, "reward.trainer", recipe.reward.trainer, {"bf16": False}, fixed)
    arguments = policy_arguments(recipe.policy, folder, recipe.seeds[0])
    if recipe.policy.is_offline:
        offline_arguments(recipe.policy, arguments)


def _check_model(path: str | None, key: str) -> None:
    """Raise InputError if a path that looks local does not exist; other names are hub names."""
    if path is None:
        return
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().exists():
        raise InputError(f"{key}: there is no model folder {path}")


def _check_given(model: Model, key: str) -> None:
    """Raise InputError for a given model of which no reward model can be made.

    A hub model's configuration is looked up on the hub if it is not on this machine. What cannot be
    looked up here is not checked.
    """
    from transformers import AutoConfig

    from selfcorrect.evaluate.scoring.load_model import ADAPTER, base_of

    assert model.path is not None
    source, revision = str(Path(model.path).expanduser()), model.revision
    if (adapter := Path(source) / ADAPTER).is_file():
        source, revision = base_of(adapter), None
    if model.gguf_file is not None or Path(source).is_file():
        return  # its configuration is in the GGUF file
    is_local = Path(source).is_dir()
    if is_local and not (Path(source) / "config.json").is_file():
        return  # loading it says what is missing
    for only_local in (True, False):
        try:
            config = AutoConfig.from_pretrained(
                source, revision=revision, trust_remote_code=False, local_files_only=only_local
            )
            return _check_family(config, key)
        except (OSError, ValueError, KeyError) as error:
            if machine_fault(error) is not None:
                raise
            if is_local or not isinstance(error, OSError):
                raise InputError(f"{key}: {source}: {reason_of(error)}") from None


def _check_family(config: Any, key: str) -> None:
    from selfcorrect.train.ppo.reward_models import check_family

    try:
        check_family(config)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _check_data(recipe: Recipe) -> None:
    for experiment in recipe.evaluate.experiments:
        if experiment not in EXPERIMENTS:
            known = ", ".join(EXPERIMENTS)
            raise InputError(
                f"evaluate.experiments: unknown experiment {experiment!r}; known: {known}"
            )
    if recipe.data.society is not None:
        return
    folder = recipe.data.benchmarks
    if folder is None:
        raise InputError(
            "data.benchmarks: name the folder with the experiments' folders, such as bbq/"
        )
    if recipe.data.feedback is not None:
        BenchmarkSource(recipe.data)
    for experiment in recipe.evaluate.experiments:
        if not (folder / experiment).is_dir():
            raise InputError(
                f"data.benchmarks: {folder} has no folder {experiment}/; add it, or remove "
                f"{experiment} from evaluate.experiments"
            )
