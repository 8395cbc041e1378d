"""The recipe's `launch.slurm`: what each job asks the cluster for, by model and by kind of job."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

_NUMBERS = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


def _time(given: Any) -> str:
    text = str(given)
    if isinstance(given, bool) or not _NUMBERS.fullmatch(text) or minutes(text) < 1:
        raise ValueError("SLURM's times are minutes, h:mm:ss, d-h or d-h:mm:ss, such as 4:00:00")
    return text


def minutes(time: str) -> int:
    """Minutes of a time as SLURM reads it, rounded up as SLURM does."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]  # without days the first of one or two numbers is minutes
    hours, mins, seconds = (*parts, 0, 0)[:3]
    return math.ceil((int(days or 0) * 24 + hours) * 60 + mins + seconds / 60)


Time = Annotated[
    str, BeforeValidator(_time), WithJsonSchema({"type": ["string", "integer"], "minimum": 1})
]
Memory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$")]
Positive = Annotated[int, Field(gt=0)]


class Resources(BaseModel):
    """What a job asks for; a key that is not named is left to the cluster."""

    model_config = ConfigDict(extra="forbid")

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: Time | None = Field(None, description="as in sbatch --time: 4:00:00, 1-12, or minutes")
    gpus: Annotated[int, Field(ge=0)] | None = Field(
        None, description="default: one for each of launch.processes; 0: a CPU job"
    )
    cpus: Positive | None = Field(None, description="CPU cores")
    mem: Memory | None = Field(
        None, description="memory of the machine, such as 64G; default of CPU jobs: as planned"
    )
    options: dict[str, str | int | bool] = Field(
        {}, description="further options of sbatch by their long names, such as constraint: a100"
    )
    setup: list[str] = Field([], description="lines of shell before the command: module load cuda")


class Slurm(Resources):
    """Resources of every job, and where a model's, the evaluation's or the report's differ."""

    models: dict[str, Resources] = Field({}, description="by the model's name in the recipe")
    evaluation: Resources = Resources()
    report: Resources = Resources()
    requeues: Annotated[int, Field(ge=0)] = Field(
        20, description="times that a job which has run out of its time goes on in a new turn"
    )
    save_seconds: Positive = Field(
        300, description="before its time ends, when a job is told to save; a step takes less"
    )
    parallel: Positive = Field(16, description="checkpoints of a model and seed measured at once")

    def of(self, kind: Literal["train", "evaluate", "report"], model: str | None) -> Resources:
        """What one job asks for. Evaluation takes one GPU at most, the report none."""
        if kind == "report":
            kept = self.model_dump(include={"partition", "account", "qos", "time", "setup"})
            return _over(Resources(**kept, gpus=0), self.report)
        own = _over(Resources(**self.model_dump(include=set(Resources.model_fields))),
                    self.models.get(model or "", Resources()))  # fmt: skip
        if kind == "train":
            return own
        own.gpus = None if own.gpus is None else min(own.gpus, 1)
        return _over(own, self.evaluation)


def _over(below: Resources, above: Resources) -> Resources:
    named = above.model_dump(exclude_unset=True)
    options = {**below.options, **above.options}
    return Resources(**{**below.model_dump(), **named, "options": options})
