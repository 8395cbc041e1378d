"""The user's files, for damage.py: feedback, benchmarks, answers, models, wording.

In a run they are compared with the files that the run started with. When a well-formed file is read
for the first time, no reader can recognise a changed letter.
"""

import gzip
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd

from selfcorrect.evaluate.answers.read import read_answers
from selfcorrect.evaluate.answers.score import score_bbq
from selfcorrect.evaluate.data.fetch import fetch_file
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.inputs import check_inputs
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.prompts.dialogue import read_style
from selfcorrect.recipes.load import check_recipe, load_recipe
from selfcorrect.recipes.schema import Recipe
from tests.drills.damage_run import Kind, load_folder

PUBLISHED = [
    "bbq/additional_metadata.csv",
    "winogender/templates.tsv",
    "winogender/occupations-stats.tsv",
    "law_school/law_data.csv",
]


def run_of_files(run: Path, room: Path) -> Iterator[Kind]:
    """Yield the files that a recipe names: feedback in four formats, benchmarks, wording."""
    data, runs = room / "data", room / "given-run"
    benchmarks = shutil.copytree(run / "benchmarks", data / "benchmarks")
    questions = min((benchmarks / "bbq").glob("*.jsonl"))
    published = [str(questions.relative_to(benchmarks)), *PUBLISHED]
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    table = [
        {"category": row["category"], "example_id": row["example_id"], "target_loc": "NA",
         "label_type": "label"} for row in rows
    ]  # fmt: skip
    pd.DataFrame(table).to_csv(benchmarks / "bbq" / "additional_metadata.csv", index=False)
    stimuli = Path(shutil.copy(benchmarks / "stimuli.yaml", data / "stimuli.yaml"))
    recipes = {}
    for suffix in ("jsonl", "csv", "parquet", "jsonl.gz"):
        pairs, others = data / f"pairs.{suffix}", data / f"others.{suffix}"
        write_pairs(pairs, "lazy")
        write_pairs(others, "rude")
        recipes[suffix] = recipe = recipe_on(room, pairs, benchmarks, stimuli)
        check_inputs(recipe, runs / suffix, training=True)
        yield Kind(
            f"feedback of a run, .{suffix}",
            pairs,
            others,
            partial(checked_feedback, recipe, runs / suffix),
        )
        yield Kind(
            f"feedback at first sight, .{suffix}", pairs, others, partial(feedback, recipe),
            known=False,
        )  # fmt: skip
    recipe, folder = recipes["jsonl"], runs / "jsonl"
    for name, other in zip(published, [*published[1:], published[0]], strict=True):
        yield Kind(
            f"benchmark of a run: {name}", benchmarks / name, benchmarks / other,
            partial(checked_plan, recipe, folder),
        )  # fmt: skip
        yield Kind(
            f"benchmark at first sight: {name}", benchmarks / name, benchmarks / other,
            partial(plan_digest, recipe, folder), known=False,
        )  # fmt: skip
    wording = partial(checked_plan, recipe, folder)
    yield Kind("stimuli of a run", stimuli, room / "given-run.yaml", wording)
    yield Kind("inputs.json", folder / "inputs.json", runs / "csv" / "inputs.json",
               partial(checked_feedback, recipe, folder))  # fmt: skip


def write_pairs(path: Path, trait: str) -> None:
    """Write forty pairs in the format of the file's suffix."""
    rows = [
        {"prompt": f"who was {trait} {n} ?", "chosen": "unknown", "rejected": "the one"}
        for n in range(40)
    ]
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def recipe_on(room: Path, pairs: Path, benchmarks: Path, stimuli: Path) -> Recipe:
    """Return a recipe on given files, which are read before anything is trained."""
    return check_recipe(
        {
            "name": "given",
            "models": [{"name": "tiny", "path": str(room)}],
            "data": {
                "preferences": {"path": str(pairs)},
                "benchmarks": str(benchmarks),
                "stimuli": str(stimuli),
            },
            "reward": {},
            "policy": {"steps": 1, "checkpoints": [0]},
            "evaluate": {"conditions": ["Q", "Q+IF"]},
        },
        "given",
    )


def feedback(recipe: Recipe) -> Any:
    """Return pairs and prompts."""
    from selfcorrect.train.feedback.feedback import load_feedback

    return load_feedback(recipe.data, 0)


def checked_feedback(recipe: Recipe, run: Path) -> Any:
    """Return pairs and prompts after the check that a second start makes."""
    check_inputs(recipe, run, training=True)
    return feedback(recipe)


def checked_plan(recipe: Recipe, run: Path) -> Any:
    """Return the evaluation plan's digest after the check that an evaluation makes."""
    record = (run / "inputs.json").read_bytes()
    try:
        check_inputs(recipe, run, training=False)
    finally:
        (run / "inputs.json").write_bytes(record)
    return plan_digest(recipe, run)


def plan_digest(recipe: Recipe, run: Path) -> str:
    """Return the digest of the evaluation plan."""
    return recipe_plan(recipe, run).settings_digest


# --- at first sight -------------------------------------------------------------------------------


def outside_kinds(run: Path, room: Path) -> Iterator[Kind]:
    """Yield files that are read for the first time."""
    benchmarks = run / "benchmarks"
    lines = [p.read_text().splitlines() for p in sorted((benchmarks / "bbq").glob("*.jsonl"))]
    rows = [json.loads(line) for part in lines for line in part]
    for suffix in ("csv", "jsonl", "parquet"):
        paths = [room / f"answers-{n}.{suffix}" for n in (0, 1)]
        for number, path in enumerate(paths):
            write_answers(path, rows, number)
        read = partial(scored, paths[0], benchmarks)
        yield Kind(f"answers to score, .{suffix}", paths[0], paths[1], read, known=False)
    recipe = Path(shutil.copy(Path(__file__).parents[2] / "recipes/quickstart.yaml", room))
    other = Path(shutil.copy(recipe.parent / "data" / "stimuli.yaml", room / "swap.yaml"))
    yield Kind("user's recipe", recipe, other, lambda: load_recipe(str(recipe)), known=False)
    stimuli = Path(shutil.copy(other, room / "own.yaml"))
    yield Kind("user's stimuli", stimuli, recipe, lambda: load_stimuli(stimuli), known=False)
    template, text = room / "own.jinja", room / "other.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    text.write_text("{{ messages[0].content }}")
    yield Kind("chat template", template, text, lambda: read_style(str(template)), known=False)
    yield from _foreign_models(run, room)
    yield _partial_download(room)


def write_answers(path: Path, rows: list[dict[str, Any]], shift: int) -> None:
    """Write an answer to every row in the format of the file's suffix."""
    frame = pd.DataFrame(
        {
            "category": [row["category"] for row in rows],
            "example_id": [row["example_id"] for row in rows],
            "answer": [str((n + shift) % 3) for n in range(len(rows))],
        }
    )
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)


def scored(path: Path, data: Path) -> Any:
    """Return the scores of `selfcorrect score bbq`."""
    return score_bbq(read_answers(path), data, str(path))


def _foreign_models(run: Path, room: Path) -> Iterator[Kind]:
    """Yield the files of a model folder without our record, and a GGUF file."""
    folder = shutil.copytree(run / "tiny" / "seed-0" / "base", room / "foreign")
    (folder / "stage.json").unlink()
    other = run / "tiny" / "seed-0" / "reward"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        yield Kind(
            f"foreign {name}", folder / name, other / name, lambda: load_folder(folder), known=False
        )
    files = [room / "one.gguf", room / "two.gguf"]
    for number, path in enumerate(files):
        write_gguf(path, number)

    def loaded() -> Any:
        from selfcorrect.evaluate.scoring.load_model import load_model
        from selfcorrect.evaluate.scoring.weights import weights_digest

        model, tokenizer = load_model(files[0], device="cpu")
        return weights_digest(model), tokenizer("w1 w2")["input_ids"]

    yield Kind("GGUF", files[0], files[1], loaded, known=False)


def write_gguf(path: Path, seed: int) -> None:
    """Write a random Llama with one layer as GGUF."""
    import gguf
    import numpy as np

    width, inner, words = 32, 64, [f"▁w{i}" for i in range(61)]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *words])
    writer.add_token_scores([0.0] * 64)
    writer.add_token_types([2, 3, 3, *[1] * 61])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    square, norm = (width, width), (width,)
    shapes = {
        "token_embd": (64, width), "output_norm": norm, "output": (64, width),
        **{f"blk.0.attn_{part}": square for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner), "blk.0.attn_norm": norm, "blk.0.ffn_norm": norm,
    }  # fmt: skip
    noise = np.random.default_rng(seed)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", noise.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _partial_download(room: Path) -> Kind:
    """Return the part that an interrupted download leaves, and the next one resumes from."""
    served = room / "served"
    served.mkdir()
    content = b"".join(b"%06d a line of the file\n" % n for n in range(2000))
    (served / "file.txt").write_bytes(content)
    part, other = room / "fetched" / ".file.txt.part", room / "other.part"
    part.parent.mkdir()
    part.write_bytes(content[:20_000])
    other.write_bytes(content[5000:25_000])

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    def fetched() -> bytes:
        path = part.with_name("file.txt")
        path.unlink(missing_ok=True)
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served))) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            fetch_file(
                f"http://127.0.0.1:{server.server_address[1]}/file.txt", path,
                num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest(),
                pause_seconds=0.01,
            )  # fmt: skip
            server.shutdown()
        return path.read_bytes()

    return Kind("interrupted download", part, other, fetched, derived=True)
