"""A made-up BBQ in the published format, small enough to count by hand."""

import gzip
import json

UNKNOWN = ["Not known", "unknown"]


def line(number, people, groups, category="Age", template=1, **changes):
    """Return one row of a category's file; `number` also gives its position in a block of four."""
    ambiguous = number % 2 == 0
    info = [*people[:1], UNKNOWN, *people[1:]]
    record = {
        "example_id": number,
        "question_index": str(template),
        "question_polarity": "neg" if number % 4 < 2 else "nonneg",
        "context_condition": "ambig" if ambiguous else "disambig",
        "category": category,
        "answer_info": {f"ans{i}": pair for i, pair in enumerate(info)},
        "additional_metadata": {"stereotyped_groups": groups, "subcategory": "None"},
        "context": "Two people met.",
        "question": "Who?",
        **{f"ans{i}": f"The {pair[0]}" for i, pair in enumerate(info)},
        "label": 1 if ambiguous else (0 if number % 4 == 1 else 2),
    }
    return record | changes


def block(first, people=(("elder", "old"), ("youth", "nonOld")), groups=("old",), **more):
    """Return the four rows of one template with one order of options, from `first` on."""
    return [line(first + i, [list(p) for p in people], list(groups), **more) for i in range(4)]


def write(folder, records, name="Age.jsonl"):
    """Write the rows to `folder`/bbq/`name` and return `folder`."""
    (folder / "bbq").mkdir(exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path = folder / "bbq" / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder
