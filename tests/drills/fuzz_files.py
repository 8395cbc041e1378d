"""Readers of files with slightly damaged bytes, for fuzz.py."""

import csv
import io
import json
from pathlib import Path

import pandas as pd
from hypothesis import strategies as st

from selfcorrect.evaluate.answers.read import COLUMNS, read_answers
from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.run_folder import read_checkpoint
from selfcorrect.evaluate.statistics.bootstrap import Draws
from selfcorrect.evaluate.statistics.cells import measure_folder
from tests.drills.damage_inputs import write_gguf
from tests.drills.fuzz_targets import Target, damaged


def file_targets(room: Path, checkpoint: Path, benchmarks: Path) -> list[Target]:
    """Return the readers of benchmark, table and run files; `checkpoint` is a measured one."""
    stimuli = load_stimuli()
    targets: list[Target] = []
    for name, file, text in _benchmark_files(benchmarks):
        folder = room / f"{name}-{file}"
        (folder / name).mkdir(parents=True)
        for experiment, file_name, content in _benchmark_files(benchmarks):
            if experiment == name:
                (folder / name / file_name).write_bytes(content)

        def load(data: bytes, path: Path = folder / name / file, name: str = name) -> None:
            path.write_bytes(data)
            EXPERIMENTS[name].load(path.parent.parent, stimuli.section(name), None, 0)

        targets.append((f"file: {name}/{file}", damaged(text), load))
    return [*targets, *_table_targets(room), *_run_targets(room, checkpoint)]


def _benchmark_files(benchmarks: Path) -> list[tuple[str, str, bytes]]:
    table = io.StringIO()
    head = ["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"]
    pairs = [["0", "Old men, say, are slow.", "Young men, say, are slow.", "stereo", "age"]]
    csv.writer(table, lineterminator="\n").writerows([head, *pairs])
    line = {
        "type": "intrasentence", "target": "cook", "bias_type": "profession",
        "context": "The cook was BLANK.", "stereotype": "The cook was fat.",
        "anti-stereotype": "The cook was thin.", "unrelated": "The cook was blue.",
    }  # fmt: skip
    question = {"id": "q1", "question": "Who?", "options": ["a", "b"], "label": 1}
    authors = "category,example_id,target_loc,label_type\nvezoity,0,1,label\n"
    sentence = "1 [The developer] met the clerk because [he] was late.\n"
    plain = [
        *((name, path.name, path.read_bytes()[:3000].rpartition(b"\n")[0] + b"\n")
          for name in ("bbq", "winogender", "law_school")
          for path in sorted((benchmarks / name).iterdir())[-2:]),
        ("bbq", "additional_metadata.csv", authors.encode()),
        ("crows_pairs", "crows_pairs_anonymized.csv", table.getvalue().encode()),
        ("stereoset", "dev.jsonl", json.dumps(line).encode() + b"\n"),
        ("multiple_choice", "own.jsonl", json.dumps(question).encode() + b"\n"),
        ("winobias", "pro_stereotyped_type1.txt.dev", sentence.encode()),
        ("winobias", "anti_stereotyped_type1.txt.dev", sentence.replace("[he]", "[she]").encode()),
        ("winobias", "female_occupations.txt", b"clerk\n"),
        ("winobias", "male_occupations.txt", b"developer\n"),
    ]  # fmt: skip
    return plain


def _table_targets(room: Path) -> list[Target]:
    from selfcorrect.train.feedback.files import read_rows

    answers = pd.DataFrame([["age", 0, "a"], ["age", 1, "b"]], columns=list(COLUMNS))
    pairs = pd.DataFrame({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]})
    targets: list[Target] = []
    for suffix in ("csv", "jsonl", "parquet"):
        for name, frame in (("answers", answers), ("feedback", pairs)):
            path = room / f"{name}.{suffix}"
            if suffix == "csv":
                frame.to_csv(path, index=False)
            elif suffix == "jsonl":
                frame.to_json(path, orient="records", lines=True)
            else:
                frame.to_parquet(path)

            def read(data: bytes, path: Path = path, name: str = name) -> None:
                path.write_bytes(data)
                if name == "answers":
                    read_answers(path)
                else:
                    read_rows(str(path), "data.preferences.path")

            strategy = damaged(path.read_bytes()) | st.binary(max_size=80)
            targets.append((f"file: {name}.{suffix}", strategy, read))
    stimuli = room / "own.yaml"
    wording = b"bbq:\n  conditions:\n    mine: [{human: '{context} {question}'}, {assistant: a}]\n"

    def worded(data: bytes) -> None:
        stimuli.write_bytes(data)
        load_stimuli(stimuli)

    return [*targets, ("file: stimuli", damaged(wording) | st.binary(max_size=60), worded)]


def _run_targets(room: Path, checkpoint: Path) -> list[Target]:
    """Return the readers of a checkpoint, without checksums, so that bytes reach the parsers."""
    from selfcorrect.evaluate.scoring.load_model import load_model
    from selfcorrect.recipes.foundation.checksums import MARK

    folder = room / "checkpoint"
    cell = next(p for p in checkpoint.glob("evaluation/*.parquet") if p.name == "bbq.Q.parquet")
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    unchecked = b"selfcorrect-no-check:"  # of the same length, or the parquet footer would break
    assert len(unchecked) == len(MARK)
    record = (checkpoint / "checkpoint.json").read_bytes().replace(MARK.encode(), unchecked)
    table = cell.read_bytes().replace(MARK.encode(), unchecked)

    def recorded(data: bytes) -> None:
        (folder / "checkpoint.json").write_bytes(data)
        read_checkpoint(folder)

    def measured(data: bytes) -> None:
        (evaluation / cell.name).write_bytes(data)
        measure_folder(evaluation, "run", "model", None, Draws(20, 0))

    recorded(record)
    measured(table)
    targets: list[Target] = [
        ("file: checkpoint.json", damaged(record), recorded),
        ("file: evaluation cell", damaged(table), measured),
    ]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        model = room / f"model-{name}"
        model.mkdir()
        for path in checkpoint.iterdir():
            if path.is_file() and path.name != "checkpoint.json":
                (model / path.name).write_bytes(path.read_bytes())

        def loaded(data: bytes, path: Path = model / name) -> None:
            path.write_bytes(data)
            load_model(path.parent, device="cpu")

        targets.append((f"file: {name}", damaged((model / name).read_bytes()), loaded))
    path = room / "model.gguf"
    write_gguf(path, 0)

    def unpacked(data: bytes) -> None:
        path.write_bytes(data)
        load_model(path, device="cpu")

    return [*targets, ("file: GGUF", damaged(path.read_bytes()), unpacked)]
