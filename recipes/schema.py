"""The sections and keys of a recipe, which describes a whole run. Unknown keys are refused."""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, WithJsonSchema, field_validator, model_validator

from selfcorrect.recipes.feedback import BenchmarkFeedback
from selfcorrect.recipes.slurm import Positive, Slurm
from selfcorrect.recipes.society.settings import Raters, SocietySettings

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
# File names a model may not be called.
RESERVED_NAMES = {"recipe.yaml", "run.json", "results.parquet", "statistics.json", "report.html",
         "benchmarks", "figures", "prompts"}  # fmt: skip

# Forms that a recipe file accepts; all are expanded to a list of steps.
CHECKPOINT_STEPS = WithJsonSchema(
    {
        "anyOf": [
            {"type": "array", "items": {"type": "integer", "minimum": 0}},
            {
                "type": "object",
                "properties": {"every": {"type": "integer", "minimum": 1}},
                "required": ["every"],
                "additionalProperties": False,
            },
            {"const": "powers of two"},
        ]
    }
)


class Section(BaseModel, extra="forbid"):
    """A part of a recipe; a key it does not know is an error."""


class Model(Section):
    """One rung of the ladder: a given model, or a configuration to initialise from scratch."""

    name: Name
    path: str | None = Field(None, description="Hugging Face folder or hub name")
    revision: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    scratch: dict[str, Any] | None = Field(
        None, description="model_type and the fields of its Hugging Face configuration"
    )
    trainer: dict[Literal["base", "reward", "policy"], dict[str, Any]] = Field(
        default_factory=dict,
        description="by stage: keys on top of its trainer:, for this model alone, such as "
        "{base: {learning_rate: 1.0e-3}}",
    )

    @model_validator(mode="after")
    def _check_origin(self) -> "Model":
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give either path or scratch")
        if self.scratch is not None and "model_type" not in self.scratch:
            raise ValueError("scratch needs model_type, for example llama")
        return self


class Source(Section):
    """A data set for `datasets.load_dataset`: local JSON lines, CSV or parquet, or a hub name."""

    path: str = Field(description="file, folder or hub name")
    name: str | None = Field(None, description="configuration on the hub")
    data_dir: str | None = Field(
        None, description="folder of a hub data set, for example harmless-base"
    )
    revision: str | None = None
    split: str = "train"
    limit: Positive | None = Field(None, description="rows, sampled with the recipe's first seed")


class Data(Section):
    """Where feedback comes from (one of three sources), and where the benchmarks are."""

    society: SocietySettings | None = None
    feedback: BenchmarkFeedback | None = None
    preferences: Source | None = Field(
        None, description="pairs: columns chosen and rejected (dialogues as text or messages)"
    )
    prompts: Source | None = Field(
        None, description="PPO prompts: column prompt; default: the prompts of the preferences"
    )
    benchmarks: Path | None = Field(None, description="folder with bbq/, winogender/, law_school/")
    stimuli: Path | None = Field(
        None,
        description="YAML with conditions of your own, added to the paper's (or the society's)",
    )

    @model_validator(mode="after")
    def _check_feedback(self) -> "Data":
        if [self.society, self.feedback, self.preferences].count(None) != 2:
            raise ValueError("give either society, feedback or preferences")
        return self

    @property
    def raters(self) -> Raters | None:
        """The simulated raters behind the feedback; None for pairs of other origin."""
        source = self.society or self.feedback
        return None if source is None else source.raters


class Base(Section):
    """The model before feedback: trained from scratch on the society's corpus, or fine-tuned."""

    method: Literal["pretrain", "sft"] = Field(
        description="pretrain: on the corpus; sft: on the preferred answers"
    )
    batch_tokens: Positive = Field(
        4096, description="pretrain: tokens a batch of one process, padding included"
    )
    loss_weights: dict[Literal["prose", "human", "assistant"], float] = Field(
        {"prose": 4.0, "human": 1.0, "assistant": 10.0},
        description="pretrain: weight of a token in the loss by who says it",
    )
    trainer: dict[str, Any] = Field(default_factory=dict, description="TrainingArguments/SFTConfig")


class Reward(Section):
    """What PPO and GRPO reward: a model fitted on the preference pairs, or the raters' own rule."""

    functions: Annotated[
        dict[Literal["model", "raters"], Annotated[float, Field(allow_inf_nan=False)]],
        Field(min_length=1),
    ] = Field(
        {"model": 1.0},
        description="weights of the rewards that are added. model: the score of a reward model, "
        "centred and in units of its standard deviation where another is added; raters: the "
        "utility of the simulated raters of data.society or data.feedback. Without model, no "
        "reward model is fitted",
    )
    path: str | None = Field(None, description="a finished reward model instead of fitting one")
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="pairs kept for accuracy"
    )
    trainer: dict[str, Any] = Field(default_factory=dict, description="fields of RewardConfig")
    lora: dict[str, Any] | None = Field(None, description="fields of peft's LoraConfig")

    @property
    def has_model(self) -> bool:
        """Whether there is a reward model."""
        return "model" in self.functions

    @property
    def is_fitted(self) -> bool:
        """Whether a reward model is fitted on the pairs."""
        return self.has_model and self.path is None

    @model_validator(mode="after")
    def _check_functions(self) -> "Reward":
        if not any(self.functions.values()):
            raise ValueError("functions: give at least one a weight other than 0")
        if not self.has_model and (self.path or self.trainer or self.lora):
            raise ValueError("functions has no model: remove path, trainer and lora")
        return self


class Policy(Section):
    """How the policy learns from the feedback.

    A step is one update on one batch of rollouts, as on the paper's x-axis.
    """

    method: Literal["ppo", "grpo", "sft", "dpo"] = Field(
        "ppo",
        description="ppo; grpo: TRL's GRPO on the same prompts and reward model; sft: fine-tuning "
        "on the preferred answers; dpo: TRL's DPO on the preference pairs. All keep checkpoints at "
        "the same steps",
    )
    steps: Positive
    checkpoints: Annotated[list[Annotated[int, Field(ge=0)]], CHECKPOINT_STEPS] = Field(
        description="steps at which the policy's weights are kept; 0 is the policy before any "
        "feedback. A list, {every: n}, or powers of two"
    )
    resume_every: Positive = Field(10, description="steps between saved training states")
    resume_minutes: Annotated[float, Field(gt=0)] = Field(
        15.0, description="minutes after which the next step saves a training state anyway"
    )
    trainer: dict[str, Any] = Field(
        default_factory=dict,
        description="fields of PPOConfig (ppo, grpo), SFTConfig (sft) or DPOConfig (dpo); the last "
        "two ignore fields that only PPOConfig has",
    )
    lora: dict[str, Any] | None = Field(None, description="fields of peft's LoraConfig")

    @property
    def is_offline(self) -> bool:
        """Whether the policy learns from the preference pairs, and samples nothing."""
        return self.method in ("sft", "dpo")

    @model_validator(mode="before")
    @classmethod
    def _refuse_replaced_by(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "replaced_by" not in given:
            return given
        if given["replaced_by"] is not None:
            raise ValueError(
                "ppo.replaced_by is now policy.method: write policy: {method: grpo} or {method: "
                "sft}, and put the keys of replaced_by.trainer under policy.trainer"
            )
        return {key: value for key, value in given.items() if key != "replaced_by"}

    @model_validator(mode="before")
    @classmethod
    def _expand_checkpoints(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("steps"), int):
            return given
        steps, checkpoints = given["steps"], given.get("checkpoints")
        if checkpoints == "powers of two":
            expanded = [0, *(2**n for n in range(steps.bit_length()) if 2**n <= steps), steps]
        elif isinstance(checkpoints, dict) and list(checkpoints) == ["every"]:
            every = checkpoints["every"]
            if not isinstance(every, int) or every < 1:
                raise ValueError("checkpoints: every must be a whole number above 0")
            expanded = [*range(0, steps, every), steps]
        else:
            return given
        return {**given, "checkpoints": sorted(set(expanded))}

    @model_validator(mode="after")
    def _check_steps(self) -> "Policy":
        if not self.checkpoints:
            raise ValueError("checkpoints is empty: give at least one step, such as [0, 10]")
        if self.checkpoints != sorted(set(self.checkpoints)):
            raise ValueError("checkpoints must be in rising order, without repeats")
        if self.checkpoints[-1] > self.steps:
            raise ValueError(
                f"checkpoints asks for step {self.checkpoints[-1]} but the run ends at steps: "
                f"{self.steps}"
            )
        return self


class Precision(Section):
    """The types in which weights are held; `trainer: {bf16: true}` computes in bfloat16."""

    frozen: Literal["auto", "float32", "bfloat16", "float16", "4bit"] = Field(
        "auto",
        description="weights that do not learn: the base under LoRA, the reference, the reward "
        "model at work. auto: bfloat16 for models of 10 million parameters and more where the "
        "device computes in it fast, else float32; 4bit: NF4 on a CUDA GPU (bitsandbytes)",
    )
    trained: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="weights that learn. float32: masters, with bfloat16 products under "
        "`trainer: {bf16: true}`; bfloat16: the weights themselves, without masters",
    )


# Settings of the packed engine, and settings of other engines that the program itself sets.
PLACEMENT = ("device_map", "max_memory", "offload_folder")
ENGINE_OWN = (
    *("model", "pretrained", "peft", "revision", "tokenizer", "dtype", "trust_remote_code"),
    *("load_format", "worker_extension_cls", "enable_lora", "enable_prefix_caching"),
)


class Evaluate(Section):
    """The evaluation of every checkpoint."""

    experiments: Annotated[list[str], Field(min_length=1)] = ["bbq", "winogender", "law_school"]
    conditions: list[str] | None = Field(
        None, description="for example [Q, Q+IF, Q+neutral]; default: all but the controls"
    )
    limit: Positive | None = Field(None, description="items an experiment, sampled by template")
    attach: Literal["inline", "off"] = Field(
        "inline", description="inline: during training; off: after it"
    )
    engine: Annotated[str, Field(pattern=r"^(packed|vllm|lm-eval:[a-z0-9_-]+)$")] = Field(
        "packed", description="packed (built in), vllm, or lm-eval:<model type>, such as lm-eval:hf"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="weights while measuring. auto: as training held them, which inline "
        "evaluation needs; an adapter stays float32 on any base",
    )
    engine_args: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="settings of the engine for saved checkpoints. packed: device_map, max_memory, "
        "offload_folder (transformers); vllm: fields of its EngineArgs, such as "
        "tensor_parallel_size, gpu_memory_utilization, max_model_len; lm-eval: arguments of its LM",
    )
    max_new_tokens: Positive = Field(256, description="length limit of sampled reasoning")
    temperature: Annotated[float, Field(ge=0)] = 1.0
    samples: Positive = Field(1, description="samples of the reasoning per question")
    permutations: Literal[1, 3, 6] = Field(
        1, description="orders of the options: 1 as published, 3 rotations, 6 both directions"
    )
    style: str = Field(
        "auto", description="auto, chat, plain (Human/Assistant), or a chat template *.jinja"
    )
    seed: int = 0

    @field_validator("attach", mode="before")
    @classmethod
    def _read_unquoted_off(cls, given: Any) -> Any:
        return "off" if given is False else given  # YAML 1.1 reads an unquoted off as false

    @model_validator(mode="after")
    def _check_engine(self) -> "Evaluate":
        if self.engine != "packed" and self.attach == "inline":
            raise ValueError(f"engine: {self.engine} loads saved checkpoints: set attach: off")
        if self.engine not in ("packed", "vllm", "lm-eval:hf") and self.dtype != "auto":
            raise ValueError(f"engine: {self.engine} chooses its own type: remove dtype")
        if self.engine_args and self.attach == "inline":
            raise ValueError("engine_args: are for saved checkpoints: set attach: off")
        for key in self.engine_args:
            if key in ENGINE_OWN or (self.engine == "packed") != (key in PLACEMENT):
                raise ValueError(
                    f"engine_args: {key} is not a setting of {self.engine}, or one that a recipe "
                    "sets elsewhere: remove it"
                )
        return self


class Launch(Section):
    """How the run uses machines: jobs, threads, processes, SLURM."""

    jobs: Positive = Field(1, description="jobs (a model with a seed) trained at the same time")
    threads: Positive | None = Field(
        None, description="CPU threads a process; default: cores / jobs / processes"
    )
    processes: Positive = Field(
        1,
        description="processes that train one model, each on its own device; batch sizes are per "
        "device",
    )
    deepspeed: str | None = Field(None, description="zero1, zero2, zero3, or a DeepSpeed JSON file")
    slurm: Slurm | None = Field(None, description="for `selfcorrect launch --cluster slurm`")

    @property
    def starts_processes(self) -> bool:
        """Whether accelerate starts separate processes for a job's training."""
        return self.processes > 1 or self.deepspeed is not None


def rename_old_sections(content: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's content with its section `ppo`, the name of older versions, as `policy`.

    Raises ValueError if both are given.
    """
    models = content.get("models")
    if isinstance(models, list):
        content = {**content, "models": [_rename_ppo_in_model(model) for model in models]}
    return _rename_ppo(content, "")


def _rename_ppo_in_model(model: Any) -> Any:
    if not isinstance(model, dict) or not isinstance(model.get("trainer"), dict):
        return model
    return {**model, "trainer": _rename_ppo(model["trainer"], "models: trainer.")}


def _rename_ppo(section: dict[str, Any], where: str) -> dict[str, Any]:
    if "ppo" not in section:
        return section
    if "policy" in section:
        raise ValueError(f"{where}ppo: is an older name of {where}policy: give only policy")
    return {"policy" if key == "ppo" else key: value for key, value in section.items()}


class Recipe(Section):
    """One whole run."""

    name: Name
    description: str = ""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    models: Annotated[list[Model], Field(min_length=1)]
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="arguments of chat templates in all stages and in the evaluation, such as "
        "{enable_thinking: false}",
    )
    chat_template_date: date | None = Field(
        None,
        description="the day for chat templates that write today's date; default: the day on which "
        "the run begins",
    )
    data: Data
    base: Base | None = None
    reward: Reward
    policy: Policy
    precision: Precision = Precision()
    evaluate: Evaluate = Evaluate()
    launch: Launch = Launch()

    @model_validator(mode="before")
    @classmethod
    def _read_old_sections(cls, given: Any) -> Any:
        return rename_old_sections(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check_sections(self) -> "Recipe":
        names = [model.name for model in self.models]
        if reserved := RESERVED_NAMES.intersection(names):
            raise ValueError(f"models: the name {min(reserved)} is reserved; rename the model")
        if len(set(names)) < len(names):
            raise ValueError("models: two models have the same name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is given twice")
        pretrains = self.base is not None and self.base.method == "pretrain"
        if pretrains and self.data.society is None:
            raise ValueError("base: method pretrain needs data.society, whose corpus it trains on")
        for model in self.models:
            if "base" in model.trainer and self.base is None:
                raise ValueError(f"models: {model.name}: trainer.base, but the recipe has no base")
            if (model.scratch is not None) != pretrains:
                raise ValueError(
                    f"models: {model.name}: scratch and base.method: pretrain need each other"
                )
        if "raters" in self.reward.functions and self.data.raters is None:
            raise ValueError(
                "reward.functions: raters are those of data.society or data.feedback; the raters "
                "of data.preferences are unknown"
            )
        if "reward_weights" in self.policy.trainer and self.reward.functions != {"model": 1.0}:
            raise ValueError("policy.trainer.reward_weights: reward.functions has the weights")
        self._check_precision()
        if self.policy.method != "ppo" and self.launch.starts_processes:
            raise ValueError(
                f"policy.method: {self.policy.method} trains in one process: remove "
                "launch.processes and launch.deepspeed"
            )
        if self.launch.slurm is not None:
            for name in self.launch.slurm.models:
                if name not in names:
                    raise ValueError(
                        f"launch.slurm.models: the recipe has no model {name!r}; it has "
                        f"{', '.join(names)}"
                    )
        return self

    def _check_precision(self) -> None:
        """Raise ValueError for types that contradict each other or another key."""
        trained, frozen = self.precision.trained, self.precision.frozen
        if trained == "bfloat16":
            if self.policy.lora is not None or self.reward.lora is not None:
                raise ValueError(
                    "precision.trained: bfloat16 saves nothing with an adapter: remove the key"
                )
            if self.base is not None and self.base.method == "pretrain":
                raise ValueError("precision.trained: bfloat16 cannot pretrain: use float32")
            stages = {"base": self.base, "reward": self.reward, "policy": self.policy}
            overrides = [model.trainer for model in self.models]
            for name, stage in stages.items():
                given = [stage.trainer] if stage is not None else []
                given += [override.get(name, {}) for override in overrides]  # type: ignore[call-overload]
                if any(keys.get("bf16") or keys.get("fp16") for keys in given):
                    raise ValueError(
                        f"precision.trained: bfloat16 computes in bfloat16 without {name}.trainer: "
                        "{bf16: true}: remove one of the two"
                    )
        if self.launch.deepspeed is not None and (trained, frozen) != ("float32", "auto"):
            raise ValueError(
                "precision: DeepSpeed holds weights as its own settings and bf16 say; remove "
                "precision or launch.deepspeed"
            )
        wanted = self.evaluate.dtype
        if self.evaluate.attach == "inline" and wanted not in ("auto", self._dtype_in_training):
            raise ValueError(
                f"evaluate.dtype: {wanted}, but attach: inline measures weights as training holds "
                f"them ({self._dtype_in_training}): remove dtype, or set attach: off"
            )

    @property
    def _dtype_in_training(self) -> str:
        lora = self.policy.lora is not None
        return self.precision.frozen if lora else self.precision.trained

    def of(self, name: str) -> "Recipe":
        """Return the recipe for one of its models, with the model's `trainer` keys filled in."""
        overrides = next(model.trainer for model in self.models if model.name == name)
        parts: dict[str, Any] = {}
        for stage, keys in overrides.items():
            part = getattr(self, stage)
            parts[stage] = part.model_copy(update={"trainer": {**part.trainer, **keys}})
        return self.model_copy(update=parts)
