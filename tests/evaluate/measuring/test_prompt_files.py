"""Tables of prompts: every row of an evaluation can be asked again with nothing but its files."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.cell_files import read_cell, read_settings
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.plan import plan_evaluation
from selfcorrect.evaluate.measuring.prompt_files import read_prompts
from selfcorrect.evaluate.run_folder import CheckpointRecord
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from selfcorrect.scripts.commands.show import show
from tests.support.tiny_models import tiny_model

CONDITIONS = ["Q", "Q+IF+CoT"]
TEMPLATE = (
    "{% for m in messages %}"
    "{{ 'Assistant' if m['role'] == 'assistant' else 'Human' }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}Assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two checkpoints without a chat template, and a third one with it."""
    folder = tmp_path_factory.mktemp("asked") / "run"
    world = make_world(SocietySettings(seed=3))
    write_benchmarks(world, folder / "benchmarks")
    (folder / "recipe.yaml").write_text("name: asked\n")
    tokenizer = make_tokenizer(world)
    plan = plan_evaluation(
        folder / "benchmarks",
        load_stimuli(base=folder / "benchmarks" / "stimuli.yaml"),
        ["bbq", "winogender"],
        CONDITIONS,
        limit=8,
        max_new_tokens=4,
        permutations=3,
    )
    for step in (0, 1, 2):
        checkpoint = folder / "tiny" / "seed-0" / "ppo" / f"checkpoint-{step}"
        if step == 2:
            tokenizer.chat_template = TEMPLATE
        model = tiny_model(vocabulary=len(tokenizer), seed=step)
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        counts = dict.fromkeys(("step", "episodes", "tokens", "optimizer_updates"), step)
        CheckpointRecord(
            **{"model": "tiny", "parameters": 1, "seed": 0, "kl": None, "reward": None},
            **{"recipe_digest": "x", "versions": {}, **counts},
        ).write(checkpoint)
        measure(plan, model.eval(), tokenizer, checkpoint / "evaluation")
    return folder


def _cells(run: Path) -> list[Path]:
    return sorted(run.glob("tiny/seed-0/ppo/*/evaluation/*.parquet"))


def test_rows_are_asked_again_by_plain_transformers(run):
    """The table's text, tokenised without additions, gives the row's log-probabilities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    num_rows = 0
    for path in _cells(run):
        checkpoint = path.parents[1]
        model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        prompts = read_prompts(path)
        for row in read_cell(path)[0].to_dict("records"):
            prompt = prompts[row["item"], row["order"]]
            if row["samples"] is not None:
                assert row["prompt"].startswith(prompt)
                prompt = row["prompt"]
            for option, logprob in zip(row["options"], row["logprobs"], strict=True):
                ids, both = (
                    tokenizer(text, add_special_tokens=False)["input_ids"]
                    for text in (prompt, prompt + option)
                )
                assert both[: len(ids)] == ids
                with torch.no_grad():
                    scores = model(torch.tensor([both])).logits[0].log_softmax(-1)
                total = sum(scores[i - 1, both[i]].item() for i in range(len(ids), len(both)))
                assert total == pytest.approx(logprob, abs=1e-4)
                num_rows += 1
    assert num_rows > 100


def test_checkpoints_share_a_table_unless_they_render_differently(run):
    names = {}
    for path in _cells(run):
        names.setdefault(path.name, []).append(read_settings(path)["prompts"])
    assert set(names) == {f"{e}.{c}.parquet" for e in ("bbq", "winogender") for c in CONDITIONS}
    for first, second, with_template in names.values():
        assert first == second != with_template
    written = {path.name for path in (run / "prompts").iterdir()}
    assert written == {name for of_cell in names.values() for name in of_cell}


def test_unsampled_rows_hold_no_text_of_their_own(run):
    for path in _cells(run):
        sampled = "CoT" in path.name
        assert (pq.read_table(path)["prompt"].null_count == 0) == sampled


def test_damaged_or_missing_tables_are_named(run, tmp_path):
    path = _cells(run)[0]
    table = run / "prompts" / read_settings(path)["prompts"]
    content = table.read_bytes()
    try:
        for damage in (content[:-40] + b"x" + content[-39:], None):
            table.unlink() if damage is None else table.write_bytes(damage)
            with pytest.raises(InputError, match="missing or damaged") as error:
                read_prompts(path)
            assert str(table) in str(error.value)
    finally:
        table.write_bytes(content)


def test_show_prints_prompt_tokens_options_and_all_checkpoints(run, capsys):
    path = next(path for path in _cells(run) if path.name == "bbq.Q.parquet")
    frame = read_cell(path)[0]
    settings, item = read_settings(path), frame["item"][0]
    show(run, item, condition=settings["condition"])
    output = capsys.readouterr().out
    for (name, _), prompt in read_prompts(path).items():
        assert (name != item) or prompt in output
    for other in _cells(run):
        if other.name != path.name:
            continue
        for row in read_cell(other)[0].to_dict("records"):
            if row["item"] == item:
                for option, logprob in zip(row["options"], row["logprobs"], strict=True):
                    assert f"{option!r} {logprob:.6f}" in output
    for step in (0, 1, 2):
        assert f"tiny/0/{step}" in output
    assert "Tokens (" in output and "Q+IF+CoT" not in output


def test_show_names_what_there_is(run):
    with pytest.raises(InputError, match="no item 'nothing'"):
        show(run, "nothing")
    with pytest.raises(InputError, match="not a run folder, nor"):
        show(run / "tiny", "x")
