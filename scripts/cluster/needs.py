"""What the jobs of a launch need, from `selfcorrect plan`'s own footprints and hours."""

import math
from dataclasses import replace

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.cluster.jobs import ClusterJob, Needs, asked_of
from selfcorrect.train.distributed.settings import deepspeed_settings
from selfcorrect.train.planning.devices import GPUS
from selfcorrect.train.planning.estimate import estimate_model
from selfcorrect.train.planning.feedback import FeedbackFacts, feedback_facts
from selfcorrect.train.planning.memory import Parallelism
from selfcorrect.train.planning.model_shape import model_shape

# Bytes of a Python process with torch and transformers (docs/results/planning-accuracy.md).
LIBRARIES = 0.6e9
SPARE = 1.5  # on what is planned: an allocator keeps what is freed, most of all with LoRA there
UTILISATION = 0.3


def with_needs(recipe: Recipe, jobs: list[ClusterJob]) -> list[ClusterJob]:
    """The jobs, each with what is planned for it; the report's needs are not known."""
    try:
        facts = feedback_facts(recipe.data)
    except InputError as error:
        return [_without(job, error) for job in jobs]
    return [_with(recipe, job, facts) for job in jobs]


def _with(recipe: Recipe, job: ClusterJob, facts: FeedbackFacts) -> ClusterJob:
    if job.model is None:
        return job
    index = [model.name for model in recipe.models].index(job.model)
    gpus = asked_of(recipe, job).gpus or 0
    number = (gpus or recipe.launch.processes) if job.kind == "train" else 1
    try:
        shape = model_shape(recipe.models[index], f"models.{index}", facts.vocabulary)
        asked = recipe.launch.deepspeed if number > 1 else None
        settings = deepspeed_settings(asked, gpus > 0) if asked else {}
        stage = settings.get("zero_optimization", {}).get("stage", 0)
        parallelism = Parallelism(number, stage, gpu=gpus > 0)
        plan = estimate_model(recipe, job.model, shape, facts, parallelism)
    except InputError as error:
        return _without(job, error)
    stages = [s for s in plan.footprints if (s.stage == "evaluation") == (job.kind == "evaluate")]
    most = max((stage.total for stage in stages or plan.footprints), default=0.0)
    if gpus:
        hours = plan.hours(GPUS["h100"], UTILISATION)
        own = [hours[s] for s in hours if (s == "evaluation") == (job.kind == "evaluate")]
        spent = sum(own) / (len(recipe.policy.checkpoints) if job.kind == "evaluate" else 1)
        sentence = (
            f"planned: {most / 1e9:.1f} GB at most on each of {number} GPUs, "
            f"{spent:.1f} h at {UTILISATION:.0%} of an H100's peak"
        )
        return replace(job, needs=Needs(sentence))
    whole = number * (most + LIBRARIES)
    memory = f"{1 + math.ceil(SPARE * whole / 2**30)}G"
    return replace(job, needs=Needs(f"planned: {whole / 1e9:.1f} GB at most", memory))


def _without(job: ClusterJob, error: InputError) -> ClusterJob:
    return replace(job, needs=Needs(f"not planned: {error}")) if job.model else job
