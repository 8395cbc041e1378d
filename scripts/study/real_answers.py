"""Sample what the checkpoints of `real-ladder` answer to PPO's own prompts; count it by request.

    python scripts/study/real_answers.py runs/real-ladder

It says whether PPO taught what the raters reward, on the groups and wordings of the feedback. The
run's answers.json gets, for each checkpoint of a finished job, the number of answers by request
("plain", "fair", ...), context, meaning and form. Checkpoints that it has are not sampled again.
Every checkpoint answers the first 256 prompts, at temperature 1 and with the same noise.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.prompts.dialogue import AUTO
from selfcorrect.evaluate.run_folder import STAGE_RECORD, Checkpoint, find_checkpoints
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.sampling import sample_batch
from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.study.records import read_json
from selfcorrect.train.feedback.feedback import load_feedback
from selfcorrect.train.ppo.prompts import policy_prompt_ids

FILE = "answers.json"
NUM_PROMPTS = 256
ROWS = 32  # prompts that are sampled together
NO_ANSWER = "no answer"


def name_of(model: str, seed: int, step: int) -> str:
    """Return the key of a checkpoint in answers.json."""
    return f"{model} seed {seed} step {step}"


def meaning(prompt: Any, text: str, ended: bool) -> tuple[str, bool]:
    """Return what an answer means, or NO_ANSWER, and whether it is well-formed and ends."""
    found = prompt.read(text.strip())
    if found is None:
        return NO_ANSWER, False
    answer, is_well_formed = found
    return prompt.case.meaning(answer), is_well_formed and ended


def count_answers(
    checkpoint: Checkpoint, prompts: Sequence[Any], new_tokens: int
) -> list[dict[str, Any]]:
    """Return rows of request, context ("ambiguous", "decided"), meaning, form and number."""
    model, tokenizer = load_model(checkpoint.folder, dtype=checkpoint.dtype or "auto")
    sampling = Sampling(new_tokens, temperature=1.0, seed=0)
    counts: Counter[tuple[str, str, str, bool]] = Counter()
    for first in range(0, len(prompts), ROWS):
        batch = prompts[first : first + ROWS]
        messages = [list(prompt.messages) for prompt in batch]
        ids = [policy_prompt_ids(tokenizer, dialogue, AUTO) for dialogue in messages]
        keys = [f"answer {first + index}" for index in range(len(batch))]
        samples = sample_batch(model, tokenizer, ids, keys, sampling).samples
        for prompt, sample in zip(batch, samples, strict=True):
            context = "ambiguous" if prompt.case.row.ambiguous else "decided"
            answer = meaning(prompt, sample.text, not sample.truncated)
            counts[prompt.request.kind, context, *answer] += 1
    names = ("request", "context", "meaning", "well_formed")
    return [dict(zip(names, key, strict=True)) | {"number": n} for key, n in sorted(counts.items())]


def main(words: Sequence[str] | None = None) -> None:
    """Sample and count the checkpoints that answers.json does not have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    run = parser.parse_args(words).run
    recipe = load_recipe(str(run / "recipe.yaml"))
    prompts = load_feedback(recipe.data, seed=0).rated[:NUM_PROMPTS]
    answers = read_json(run / FILE) if (run / FILE).is_file() else {}
    for checkpoint in find_checkpoints(run):
        record = checkpoint.record
        name = name_of(record.model, record.seed, record.step)
        if name in answers or not (checkpoint.folder.parent / STAGE_RECORD).is_file():
            continue
        length = recipe.policy.trainer.get("max_completion_length", 0)
        answers[name] = count_answers(checkpoint, prompts, length)
        write_text(run / FILE, json.dumps(answers, indent=1) + "\n")
        print(f"{name}: {len(prompts)} answers", flush=True)


if __name__ == "__main__":
    main()
