"""Strategies of odd inputs, and the code that reads them, for fuzz.py.

A target is a name, a strategy, and a function that reads an example and may raise only InputError
and RunFailure. Each target writes files in its own folder.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hypothesis import strategies as st

from selfcorrect.evaluate.answers.read import COLUMNS
from selfcorrect.evaluate.answers.score import score_bbq
from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.prompts.dialogue import before_sample, render, with_sample
from selfcorrect.evaluate.prompts.items import Item
from selfcorrect.evaluate.prompts.stimuli import SAMPLE, Turn, option_orders
from selfcorrect.recipes.foundation.yaml_text import parse_yaml
from selfcorrect.recipes.load import apply_override, check_recipe, load_recipe
from selfcorrect.recipes.society.benchmarks import bbq_rows
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.world import make_world

Target = tuple[str, st.SearchStrategy[Any], Callable[[Any], object]]

SMALL: dict[str, Any] = {
    "name": "small",
    "models": [
        {
            "name": "tiny",
            "scratch": {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2},
        },
    ],
    "data": {"society": {"seed": 3, "corpus": {"documents": 10}, "pairs": 20}},
    "base": {"method": "pretrain", "trainer": {"learning_rate": 0.001, "save_steps": 5}},
    "reward": {"trainer": {"num_train_epochs": 1}, "lora": {"r": 2}},
    "policy": {"steps": 4, "checkpoints": [0, 2, 4], "trainer": {"beta": 0.1}, "lora": {"r": 2}},
    "evaluate": {"experiments": ["bbq"], "conditions": ["Q"], "limit": 16},
    "launch": {"jobs": 1},
}
ODD = st.sampled_from(
    ["", " ", "~", "null", "0", "-1", "1e400", "nan", "1e-5", "..", "/etc", "\x00", "é" * 300, "{}"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400)
    | st.floats() | st.text(max_size=20) | ODD | st.dates()
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.integers() | st.none(), inner, max_size=4)
    ),
    max_leaves=12,
)


def paths_in(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    paths = []
    for key, value in pairs:
        paths.append((*here, key))
        if isinstance(value, dict | list):
            paths += paths_in(value, (*here, key))
    return paths


def mostly(
    valid: st.SearchStrategy[Any], odd: st.SearchStrategy[Any] = SCALARS
) -> st.SearchStrategy[Any]:
    """Return valid examples nine times in ten, so that several values are reached."""
    return st.integers(0, 9).flatmap(lambda n: odd if n == 9 else valid)


@st.composite
def near_misses(draw: st.DrawFn, tree: Any = SMALL) -> Any:
    """Return the tree with up to three values changed, dropped, renamed by a letter, or doubled."""
    changed = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        paths = paths_in(changed)
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        parent = changed
        for key in parents:
            parent = parent[key]
        change = draw(st.sampled_from(["value", "tree", "drop", "rename", "extra"]))
        if change == "value":
            parent[last] = draw(SCALARS)
        elif change == "tree":
            parent[last] = draw(TREES)
        elif change == "drop":
            del parent[last]
        elif isinstance(parent, dict) and isinstance(last, str) and last:
            at = draw(st.integers(0, len(last) - 1))
            name = last[:at] + draw(st.sampled_from("aeiousz_.")) + last[at + 1 :]
            parent[name] = parent.pop(last) if change == "rename" else draw(SCALARS)
    return changed


@st.composite
def damaged(draw: st.DrawFn, intact: bytes) -> bytes:
    """Return the bytes with up to four parts cut out, flipped, overwritten or repeated."""
    data = bytearray(intact)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 24))
        change = draw(st.sampled_from(["cut", "flip", "write", "end", "again"]))
        if change == "cut":
            del data[start : start + length]
        elif change == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif change == "write":
            data[start : start + length] = draw(st.binary(max_size=24))
        elif change == "end":
            del data[start:]
        else:
            data[start:start] = data[max(0, start - length) : start]
    return bytes(data)


# --- recipes --------------------------------------------------------------------------------------


def recipe_targets(room: Path) -> list[Target]:
    """Return targets for trees, files, overrides, and settings of the libraries."""
    keys = [".".join(map(str, path)) for path in paths_in(SMALL)]
    assigned = st.tuples(
        st.sampled_from(keys) | st.text(max_size=20), st.sampled_from(["=", "", "==", ".x="]),
        SCALARS.map(str) | st.text(max_size=20) | TREES.map(lambda tree: yaml.dump(tree)),
    ).map("".join)  # fmt: skip
    text = yaml.safe_dump(SMALL).encode()
    path = room / "fuzz.yaml"

    def loads(data: bytes) -> None:
        path.write_bytes(data)
        load_recipe(str(path))

    def overrides(given: list[str]) -> None:
        content = copy.deepcopy(SMALL)
        for override in given:
            apply_override(content, override)
        check_recipe(content, "fuzz")

    def libraries(tree: Any) -> None:
        from selfcorrect.train.check import check_training

        check_training(check_recipe(tree, "fuzz"))

    settings = st.sampled_from(["base.trainer", "reward.trainer", "reward.lora", "policy.trainer",
                                "policy.lora", "models.0.scratch"])  # fmt: skip
    return [
        ("recipe: near misses", near_misses(), lambda tree: check_recipe(tree, "fuzz")),
        ("recipe: any tree", TREES, lambda tree: check_recipe(tree, "fuzz")),
        ("recipe: YAML files", damaged(text) | st.binary(max_size=60), loads),
        ("recipe: any text", st.text(max_size=80), lambda text: parse_yaml(text, "fuzz")),
        ("overrides", st.lists(assigned, min_size=1, max_size=3), overrides),
        ("recipe: trainer, lora, scratch", _library_settings(settings, _library_keys()), libraries),
    ]


def _library_keys() -> dict[str, list[str]]:
    """Return the keys that the libraries accept, by section of the recipe."""
    from peft import LoraConfig
    from transformers import LlamaConfig

    from selfcorrect.train.ppo.config import PPOConfig

    kinds = {"lora": LoraConfig, "scratch": LlamaConfig, "trainer": PPOConfig}
    return {
        name: [key for key in kind.__dataclass_fields__ if not key.startswith("_")]
        for name, kind in kinds.items()
    }


@st.composite
def _library_settings(
    draw: st.DrawFn, settings: st.SearchStrategy[str], keys: dict[str, list[str]]
) -> Any:
    """Return the small recipe with an odd value of a key that a library accepts."""
    tree = copy.deepcopy(SMALL)
    section = draw(settings)
    known = keys[section.rpartition(".")[2]]
    part: Any = tree
    for key in section.split("."):
        part = part[int(key) if key.isdecimal() else key]
    odd = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS)
    part[draw(st.sampled_from(known))] = draw(odd)
    return tree


# --- dialogues and options ------------------------------------------------------------------------

TURNS = st.lists(
    st.builds(
        Turn,
        st.sampled_from(["human", "assistant", "system"]),
        st.text(max_size=40)
        | st.sampled_from([SAMPLE, "</s>", "<|user|>", "{{ 1/0 }}", "\n\nHuman:"]),
    ),
    max_size=5,
)


def dialogue_targets(tokenizer: Any, chat: Any) -> list[Target]:
    """Return targets for turns and samples of any text, and for untrusted templates."""
    template = damaged(chat.chat_template.encode()).map(lambda data: data.decode(errors="replace"))
    jinja = template | st.sampled_from(
        ["{{ 1 // 0 }}", "{{ messages[99].content }}", "{% for m in messages %}", "{{ x() }}",
         "{{ messages.foo.bar }}", "{{ 'a' + 1 }}", "{{ messages | sort }}", "{% include 'x' %}",
         "{{ raise_exception('no') }}", "{{ ''.__class__ }}", "{{ range(10**9) | list }}",
         "{{ '%d' % 'x' }}", "{{ messages[0]['content'].format(1, **2) }}"]
    )  # fmt: skip

    def rendered(turns: list[Turn], style: str, which: Any) -> str:
        return render(which, [*turns, Turn("assistant", "the")], style)

    end = chat.eos_token

    def sampled(given: tuple[list[Turn], str]) -> None:
        turns, sample = given
        closed = [Turn(turn.role, turn.text.replace(SAMPLE, "")) for turn in turns]
        waiting = [*closed, Turn("assistant", f"because{SAMPLE}")]
        render(chat, before_sample(waiting))
        filled = with_sample(chat, waiting, sample)
        ends = [
            render(chat, [*turns, Turn("assistant", "")]).count(end) for turns in (waiting, filled)
        ]
        if ends[0] != ends[1]:
            raise AssertionError("a sample ends its turn")

    samples = st.text() | st.sampled_from([end, f"a{end[:2]}{end}{end[2:]}b", f"{end[:-1]} {end}"])
    return [
        ("dialogue: plain", TURNS, lambda turns: rendered(turns, "plain", tokenizer)),
        ("dialogue: chat", TURNS, lambda turns: rendered(turns, "auto", chat)),
        ("dialogue: samples", st.tuples(TURNS, samples), sampled),
        ("dialogue: templates", st.tuples(TURNS, jinja.filter(bool)),
         lambda given: rendered(given[0], given[1], tokenizer)),
    ]  # fmt: skip


def option_targets(room: Path) -> list[Target]:
    """Return targets for multiple-choice rows and for answers to BBQ, with any values."""
    record = {"id": "q1", "question": "Who?", "options": ["a", "b", "c"], "label": 2,
              "category": "age", "cluster": "x", "stereotyped": 0, "unknown": 2}  # fmt: skip
    section = load_stimuli().section("multiple_choice")
    folder = room / "multiple_choice"
    folder.mkdir(parents=True, exist_ok=True)

    def chosen(rows: list[Any]) -> None:
        rows = [{**row, "id": n} if row == record else row for n, row in enumerate(rows)]
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        (folder / "own.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
        for item in EXPERIMENTS["multiple_choice"].load(room, section, None, 0).items:
            build_questions(item, section)

    rows = bbq_benchmark(room)
    given = st.sampled_from([row["ans0"] for row in rows] + ["a", "(b)", "2", "3", 1, 2.0, None])
    key = st.tuples(
        mostly(st.just(rows[0]["category"])), mostly(st.integers(0, len(rows) - 1)), mostly(given)
    )

    def scored(answers: list[Any]) -> None:
        score_bbq(pd.DataFrame(answers, columns=list(COLUMNS), dtype=object), room, "answers")

    answered = st.lists(key, max_size=6, unique_by=lambda answer: repr(answer[1]))
    return [
        (
            "options: multiple choice",
            st.lists(mostly(st.just(record), near_misses(record)), max_size=3),
            chosen,
        ),
        ("options: BBQ answers", answered, scored),
    ]


def build_questions(item: Item, section: Any) -> None:
    """Build every condition's question about an item, in every order."""
    for condition in section.conditions:
        for order in option_orders(len(item.options), 1):
            section.continuations(condition, item, order)
            section.turns(condition, item, order)


def bbq_benchmark(room: Path) -> list[dict[str, Any]]:
    """Write one category of a society in BBQ's format to room/bbq; return its rows."""
    import random

    world = make_world(SocietySettings())
    rows = bbq_rows(random.Random(0), world.evaluated_categories[0], 1)
    (room / "bbq").mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (room / "bbq" / "one.jsonl").write_text(text, encoding="utf-8")
    return rows
