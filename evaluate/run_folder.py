"""The layout of a run folder: the contract between training, evaluation and users' own scripts.

    <run>/recipe.yaml  run.json  inputs.json
    <run>/<model>/seed-<n>/reward/stage.json                 facts of the reward model
    <run>/<model>/seed-<n>/<method>/checkpoint-<step>/       weights or adapter, checkpoint.json
    <run>/<model>/seed-<n>/<method>/checkpoint-<step>/evaluation/<experiment>.<condition>.parquet
    <run>/results.parquet  statistics.json  figures/  report.html

<method> is ppo, grpo, sft or dpo, or series: checkpoints trained elsewhere, whose folders have no
weights but name their source. Facts live in the records, not in file names: `step` is read from
checkpoint.json. Files written here carry a checksum that is verified on reading:
docs/reference/file-integrity.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from selfcorrect.recipes.foundation.checksums import check_files, read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError, reason_of
from selfcorrect.recipes.load import load_measured
from selfcorrect.recipes.series import METHOD, Measured, Series

RECORD = "checkpoint.json"
STAGE_RECORD = "stage.json"  # in each stage's folder
POLICY_METHODS = ("ppo", "grpo", "sft", "dpo")  # names of the policy stage's folder
RLHF_STEPS = "RLHF steps"
CHECKPOINT_FOLDERS = (*POLICY_METHODS, METHOD)


class CheckpointKey(NamedTuple):
    """The model, seed and step of a checkpoint, which identify it in its run."""

    model: str
    seed: int
    step: int

    def __str__(self) -> str:
        return f"{self.model}/{self.seed}/{self.step}"


class AnswerWorth(BaseModel):
    """What `num` answers of a policy are worth, each a mean over the same sampled answers.

    `utility` is that of the society's raters, in log-odds before `sharpness`; `score` is the reward
    model's; `kl` is the sequence KL to the initial policy in nats, estimated by the log ratios.
    `utility_error` and `score_error` are standard errors over the answers, null in older records.
    """

    model_config = ConfigDict(extra="forbid")

    num: PositiveInt
    utility: float
    score: float
    kl: float
    utility_error: float | None = None
    score_error: float | None = None


class Source(BaseModel):
    """Where a checkpoint that was trained elsewhere is.

    `path` is a folder, a GGUF file or a hub name; `base` the base model to put an adapter on, if
    not the one that the adapter names. `version` tells whether the weights may have changed: the
    commit on the hub, or a digest of the names, sizes and times of a folder's files.
    """

    model_config = ConfigDict(extra="forbid")

    path: str
    revision: str | None = None
    gguf_file: str | None = None
    base: str | None = None
    on_hub: bool
    version: str


class CheckpointRecord(BaseModel):
    """The content of checkpoint.json. A step is one update on one rollout batch.

    `kl` is the mean sequence KL to the initial policy in nats over the last rollout batch,
    `reward` the mean score of the same batch, both null at step 0. `answers` is null
    outside the society. The keys of the chat template are those of the dialogues trained on, null
    where it has none. `weights_digest` is `weights.files_digest` of the saved folder, `files` the
    SHA-256 of each file; both are null in folders of older versions. `precision` holds the types
    in which weights were held in training, `frozen` and `trained`, and `computed`; null in older
    folders and under DeepSpeed, which has its own. A checkpoint with a `source` was trained
    elsewhere: what only its training knows is null, and `weights_digest` until it is first loaded.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    parameters: PositiveInt
    seed: int
    step: int
    episodes: int | None
    tokens: int | None
    optimizer_updates: int | None
    kl: float | None
    reward: float | None
    answers: AnswerWorth | None = None
    adapter_of: str | None = None
    precision: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template_date: str | None = None
    weights_digest: str | None = None
    files: dict[str, str] | None = None
    source: Source | None = None
    recipe_digest: str
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write checkpoint.json into `folder`."""
        write_record(folder / RECORD, self.model_dump())


@dataclass(frozen=True)
class Checkpoint:
    """A kept checkpoint: its folder and its record."""

    folder: Path
    record: CheckpointRecord

    @property
    def key(self) -> CheckpointKey:
        """Model, seed and step."""
        return CheckpointKey(self.record.model, self.record.seed, self.record.step)

    @property
    def dtype(self) -> str | None:
        """The type in which training held the weights, those under an adapter; None: unknown."""
        held = self.record.precision
        return held["frozen" if self.record.adapter_of else "trained"] if held else None

    @property
    def evaluation(self) -> Path:
        """The folder of the checkpoint's evaluation files."""
        return self.folder / "evaluation"


def planned_checkpoints(recipe: Measured) -> set[CheckpointKey]:
    """Return the keys of all checkpoints that the recipe keeps, or the series lists."""
    if isinstance(recipe, Series):
        return {CheckpointKey(*key) for key in recipe.listed()}
    return {
        CheckpointKey(model.name, seed, step)
        for model in recipe.models
        for seed in recipe.seeds
        for step in recipe.policy.checkpoints
    }


def job_folder(run: Path, model: str, seed: int) -> Path:
    """Return the folder of one model and seed; it holds a folder for each stage."""
    return run / model / f"seed-{seed}"


def checkpoint_folder(recipe: Measured, run: Path, key: CheckpointKey) -> Path:
    """Return the folder of a checkpoint: its weights too, unless it was trained elsewhere."""
    method = METHOD if isinstance(recipe, Series) else recipe.policy.method
    return job_folder(run, key.model, key.seed) / method / f"checkpoint-{key.step}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint folder; raises InputError if its record is missing or malformed."""
    path = folder / RECORD
    try:
        record = CheckpointRecord.model_validate(read_record(path, _remedy(folder)))
    except FileNotFoundError:
        raise InputError(f"{folder}: not a checkpoint (no {RECORD})") from None
    except ValidationError as error:
        raise InputError(f"{path}: not a checkpoint record ({reason_of(error)})") from None
    return Checkpoint(folder, record)


def check_inside(run: Path, path: Path) -> None:
    """Raise InputError if `path`, below the run's folder, leads out of it through a link.

    A run from elsewhere must not make this process write or show files outside of it.
    """
    if not path.resolve().is_relative_to(run.resolve()):
        raise InputError(f"{path}: a link that leads out of {run}; replace it by the folder itself")


def check_saved(folder: Path) -> None:
    """Raise InputError if a file of a checkpoint, base or reward model has changed.

    Folders without a record, those of older versions, and GGUF files are not checked.
    """
    if folder.is_file():
        return
    for name in (RECORD, STAGE_RECORD):
        try:
            files = read_record(folder / name, _remedy(folder)).get("files")
        except FileNotFoundError:
            continue
        if files is not None:
            check_files(folder, files, _remedy(folder))


def _remedy(folder: Path) -> str:
    is_checkpoint = folder.parent.name in POLICY_METHODS
    deleted = folder.parent / STAGE_RECORD if is_checkpoint else folder
    return f"copy {folder} here again, or delete {deleted} and run the recipe again to rebuild it"


def find_checkpoints(run: Path, malformed: dict[Path, str] | None = None) -> list[Checkpoint]:
    """Return all checkpoints of a run, ordered by parameters, model, seed and step.

    A folder of stand-alone models has none. A checkpoint that is being deleted is skipped. Raises
    InputError for a malformed record; with `malformed`, the error is stored there instead, by
    folder.
    """
    if not (run / "recipe.yaml").is_file():
        if model_folders(run):
            return []
        raise InputError(f"{run}: not a run folder (no recipe.yaml)")
    checkpoints = []
    for method in CHECKPOINT_FOLDERS:
        for path in run.glob(f"*/seed-*/{method}/checkpoint-*/{RECORD}"):
            try:
                check_inside(run, path.parent / "evaluation")
                checkpoints.append(read_checkpoint(path.parent))
            except InputError as error:
                if not path.exists():
                    continue
                if malformed is None:
                    raise
                malformed[path.parent] = str(error)
    return sorted(
        checkpoints,
        key=lambda c: (c.record.parameters, c.record.model, c.record.seed, c.record.step),
    )


def step_words(runs: Iterable[Path]) -> str:
    """Return what the steps of some runs are, as figures and sentences name them."""
    words = set()
    for run in runs:
        try:
            recipe = load_measured(str(run / "recipe.yaml"))
        except InputError:
            continue
        words.add(recipe.steps_are if isinstance(recipe, Series) else RLHF_STEPS)
    return (words.pop() if words else RLHF_STEPS) if len(words) < 2 else "steps"


def model_folders(folder: Path) -> dict[str, Path]:
    """Return the evaluation files' folders of stand-alone models, by name; {} for a run.

    `folder` is what `selfcorrect evaluate MODEL...` writes: <model>/<digest>/, or one of its
    models. The names of models with several digests end in them.
    """
    if (folder / "recipe.yaml").is_file():
        return {}
    files = [path for way in ("*/*.*.parquet", "*/*/*.*.parquet") for path in folder.glob(way)]
    found = sorted({file.parent for file in files if file.parent.name not in ("prompts", "probe")})
    for path in found:
        check_inside(folder, path)
    names = [path.resolve().parent.name for path in found]
    return {
        name if names.count(name) == 1 else f"{name} {path.name}": path
        for name, path in zip(names, found, strict=True)
    }
