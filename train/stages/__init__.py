"""The stages of a job: base model, reward model, policy."""

from dataclasses import dataclass
from pathlib import Path

from selfcorrect.evaluate.prompts.dialogue import AUTO, Style
from selfcorrect.recipes.foundation.progress import Progress, no_progress


@dataclass(frozen=True)
class JobFacts:
    """What all stages of a job share. `folder` is <run>/<model>/seed-<n>.

    `frozen` and `trained` are the types in which weights are held that do not learn, and that do.
    """

    folder: Path
    seed: int
    progress: Progress = no_progress
    trust_remote_code: bool = False
    style: Style = AUTO
    frozen: str = "float32"
    trained: str = "float32"

    @property
    def base(self) -> Path:
        """The folder of the base model."""
        return self.folder / "base"

    @property
    def reward(self) -> Path:
        """The folder of the reward model."""
        return self.folder / "reward"
