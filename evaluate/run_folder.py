"""A run on disk: the contract between training, evaluation and people's own scripts.

    <run>/recipe.yaml  run.json  inputs.json
    <run>/<model>/seed-<n>/reward/stage.json   what fitting the reward model left out, and its facts
    <run>/<model>/seed-<n>/ppo/checkpoint-<step>/{model or adapter files, checkpoint.json}
    <run>/<model>/seed-<n>/ppo/checkpoint-<step>/evaluation/<experiment>.<condition>.parquet
    <run>/results.parquet  statistics.json  figures/  report.html

Facts live in the records, not in the names: `step` is read from checkpoint.json. What is written
here is sealed, and read back only as it was written: docs/reference/file-integrity.md.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from selfcorrect.recipes.foundation.checksums import check_files, read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError

RECORD = "checkpoint.json"
STAGE_RECORD = "stage.json"  # in each stage's folder
POLICY_METHODS = ("ppo", "grpo", "sft")  # the policy stage's folder is named by its method


class CheckpointRecord(BaseModel):
    """What checkpoint.json says. `step` is one PPO update: one rollout batch.

    `kl` is the mean sequence KL to the initial policy in nats over the last rollout batch,
    `reward` the mean reward-model score of the same batch, both null at step 0. `weights_digest` is
    `weights.files_digest` of the folder as it was saved, `files` the SHA-256 of each file; null in
    folders of older versions. The file on disk carries a seal of its own besides.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    parameters: PositiveInt
    seed: int
    step: int
    episodes: int
    tokens: int
    optimizer_updates: int
    kl: float | None
    reward: float | None
    adapter_of: str | None = None
    weights_digest: str | None = None
    files: dict[str, str] | None = None
    recipe_digest: str
    versions: dict[str, str]
    seal: str | None = Field(None, exclude=True)

    def write(self, folder: Path) -> None:
        """Write checkpoint.json into `folder`."""
        write_record(folder / RECORD, self.model_dump())


@dataclass(frozen=True)
class Checkpoint:
    """One kept checkpoint: its folder and its record."""

    folder: Path
    record: CheckpointRecord

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation's parquet files."""
        return self.folder / "evaluation"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint folder; raises InputError when its record is missing or malformed."""
    path = folder / RECORD
    try:
        record = CheckpointRecord.model_validate(read_record(path, _remedy(folder)))
    except FileNotFoundError:
        raise InputError(f"{folder}: no {RECORD} here, so this is not a checkpoint") from None
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a checkpoint record ({reason})") from None
    return Checkpoint(folder, record)


def check_inside(run: Path, path: Path) -> None:
    """InputError where `path`, below the run's folder, is or lies behind a link that leads out.

    A run that comes from elsewhere must not make this one write, or show, what is not its own.
    """
    if not path.resolve().is_relative_to(run.resolve()):
        raise InputError(f"{path}: a link that leads out of {run}; put the folder itself there")


def check_saved(folder: Path) -> None:
    """Raises InputError where a file of a checkpoint, base or reward model has changed.

    That is what its record says, if it has one: other folders, and those of older versions, pass.
    """
    for name in (RECORD, STAGE_RECORD):
        try:
            files = read_record(folder / name, _remedy(folder)).get("files")
        except FileNotFoundError:
            continue
        if files is not None:
            check_files(folder, files, _remedy(folder))


def _remedy(folder: Path) -> str:
    if folder.parent.name in POLICY_METHODS:
        anew = (
            f"delete {folder.parent / STAGE_RECORD} and run the recipe again, which makes it anew"
        )
    else:
        anew = "delete the folder and run the recipe again, which makes it anew"
    return f"copy {folder} here again, or {anew}"


def find_checkpoints(run: Path, malformed: dict[Path, str] | None = None) -> list[Checkpoint]:
    """All kept checkpoints of a run, ordered by parameters, model, seed and step.

    One that is deleted at this moment is passed over. Raises InputError for a malformed record,
    unless `malformed` is there to take down what is wrong with which folder.
    """
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run}: no recipe.yaml here, so this is not a run folder")
    found = []
    paths = (
        path
        for name in POLICY_METHODS
        for path in run.glob(f"*/seed-*/{name}/checkpoint-*/{RECORD}")
    )
    for path in paths:
        try:
            check_inside(run, path.parent / "evaluation")
            found.append(read_checkpoint(path.parent))
        except InputError as error:
            if not path.exists():
                continue
            if malformed is None:
                raise
            malformed[path.parent] = str(error)
    return sorted(
        found, key=lambda c: (c.record.parameters, c.record.model, c.record.seed, c.record.step)
    )
