"""External feedback: what another model wrote about each item is told to the model."""

from pathlib import Path

import pytest

from selfcorrect.evaluate.experiments.wording import Stimuli, load_stimuli
from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.plan import plan_evaluation
from selfcorrect.evaluate.prompts.items import Item
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.tiny_models import tiny_model, tiny_plan, tiny_stimuli, tiny_tokenizer


def stimuli_with(path: Path) -> Stimuli:
    section = tiny_stimuli().section("winogender")
    human, opened = {"human": "who went ? {sentence}"}, {"assistant": "{prefix}"}
    told = [human, {"assistant": "{sample}"}, {"human": "{critique} ?"}, opened]
    data = {
        "pronouns": section.pronouns,
        "critiques": path,
        "texts": {"critique": "fair please ."},
        "conditions": {"Q": [human, opened], "Q+critique": told},
    }
    return Stimuli({"winogender": type(section).model_validate(data)})


def test_each_item_gets_the_critics_text(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path / "data", ["Q", "reviews 1"], samples=2)
    critic = tmp_path / "critic"
    measure(plan, tiny_model(seed=1), tiny_tokenizer(), critic)
    path = critic / "winogender.reviews_1.parquet"
    written = read_cell(path)[0]
    written = written[written["draw"] == 0].set_index("item")["samples"]
    told = plan_evaluation(
        tmp_path / "data", stimuli_with(path), ["winogender"], None, max_new_tokens=6
    )
    # What the conditions without critiques ask does not depend on the critic.
    without = tiny_plan(tmp_path / "data", ["Q"], max_new_tokens=6)
    assert told.cells[0].loaded.digest == without.cells[0].loaded.digest
    _, cell = measure(told, tiny_model(), tiny_tokenizer(), tmp_path / "out")
    frame = read_cell(cell)[0]
    assert len(frame) == 6 and written.map(lambda texts: texts[-1]).nunique() > 1
    for item, prompt in zip(frame["item"], frame["prompt"], strict=True):
        assert f"Human: {written[item][-1].strip()} ?" in prompt
        assert "fair please" not in prompt


def test_missing_file_and_missing_text_are_one_line(tmp_path: Path) -> None:
    tiny_plan(tmp_path / "data", ["Q"])

    def refusal(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            plan_evaluation(tmp_path / "data", stimuli_with(path), ["winogender"], None)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "none.parquet (critiques in the stimuli): not found" in refusal(
        tmp_path / "none.parquet"
    )
    some = tiny_plan(tmp_path / "data", ["Q", "reviews 1"], limit=3)
    measure(some, tiny_model(), tiny_tokenizer(), tmp_path / "critic")
    message = refusal(tmp_path / "critic" / "winogender.reviews_1.parquet")
    assert "reviews_1.parquet (critiques in the stimuli): has no text for item" in message
    assert "has no text for item" in refusal(tmp_path / "critic" / "winogender.Q.parquet")
    other = tmp_path / "other.parquet"
    other.write_bytes(b"PAR1")
    assert "damaged, or not an evaluation file" in refusal(other)


def test_shipped_critique_is_a_fixed_text_and_a_path_is_relative_to_its_file(
    tmp_path: Path,
) -> None:
    fields = {"context": "c", "question": "q", "ans0": "a", "ans1": "b", "ans2": "d"}
    item = Item("i", "c", "k", 1.0, fields, (" a", " b", " d"), {})
    section = load_stimuli().section("bbq")
    assert section.turns("Q+critique", item)[2].text.startswith("A reader says")
    own = tmp_path / "own.yaml"
    own.write_text("bbq: {critiques: critic/bbq.write_critique.parquet}\n")
    section = load_stimuli(own).section("bbq")
    assert section.critiques == tmp_path / "critic" / "bbq.write_critique.parquet"
    item = Item("i", "c", "k", 1.0, {**fields, "critique 120": "Hm."}, (" a", " b", " d"), {})
    assert section.turns("Q+critique", item, (1, 2, 0))[2].text == "Hm."
    assert section.uses_critiques("Q+critique") and not section.uses_critiques("Q+reviews 1")
