"""The recipe section `launch.slurm`: the resources of each job, by model and kind of job."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

_NUMBERS = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


def _time(given: Any) -> str:
    text = str(given)
    if isinstance(given, bool) or not _NUMBERS.fullmatch(text) or minutes(text) < 1:
        raise ValueError("a SLURM time is minutes, h:mm:ss, d-h or d-h:mm:ss, such as 4:00:00")
    return text


def minutes(time: str) -> int:
    """Return the minutes of a SLURM time, rounded up as SLURM does."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]  # without days, one or two numbers begin with minutes
    hours, mins, seconds = (*parts, 0, 0)[:3]
    return math.ceil((int(days or 0) * 24 + hours) * 60 + mins + seconds / 60)


Time = Annotated[
    str, BeforeValidator(_time), WithJsonSchema({"type": ["string", "integer"], "minimum": 1})
]
Memory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$")]
Positive = Annotated[int, Field(gt=0)]


class Resources(BaseModel, extra="forbid"):
    """The resources of a job; the cluster decides about keys that are not given."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: Time | None = Field(None, description="as in sbatch --time: 4:00:00, 1-12, or minutes")
    gpus: Annotated[int, Field(ge=0)] | None = Field(
        None, description="default: launch.processes; 0: a CPU job"
    )
    cpus: Positive | None = Field(None, description="CPU cores")
    mem: Memory | None = Field(
        None, description="memory per node, such as 64G; default of CPU jobs: the estimate"
    )
    options: dict[str, str | int | bool] = Field(
        {}, description="other sbatch options by their long names, such as constraint: a100"
    )
    setup: list[str] = Field(
        [], description="shell lines before the command, such as module load cuda"
    )


class Slurm(Resources):
    """Resources of all jobs, and those that differ for a model, the evaluation or the report."""

    models: dict[str, Resources] = Field({}, description="by the model's name in the recipe")
    evaluation: Resources = Resources()
    report: Resources = Resources()
    requeues: Annotated[int, Field(ge=0)] = Field(
        20, description="how often a job that reaches its time limit is queued again"
    )
    save_seconds: Positive = Field(
        300, description="seconds before the time limit at which a job saves; longer than a step"
    )
    parallel: Positive = Field(
        16, description="checkpoints of a model and seed measured at the same time"
    )

    def of(self, kind: Literal["train", "evaluate", "report"], model: str | None) -> Resources:
        """Return the resources of a job: evaluation uses one GPU at most, the report none."""
        if kind == "report":
            shared = self.model_dump(include={"partition", "account", "qos", "time", "setup"})
            return _override(Resources(**shared, gpus=0), self.report)
        resources = _override(Resources(**self.model_dump(include=set(Resources.model_fields))),
                    self.models.get(model or "", Resources()))  # fmt: skip
        if kind == "train":
            return resources
        resources.gpus = None if resources.gpus is None else min(resources.gpus, 1)
        return _override(resources, self.evaluation)


def _override(base: Resources, override: Resources) -> Resources:
    given = override.model_dump(exclude_defaults=True)  # a saved recipe names every key
    options = {**base.options, **override.options}
    return Resources(**{**base.model_dump(), **given, "options": options})
