"""The synthetic society: deterministic, balanced, and its evaluation apart from its feedback."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.prompts.stimuli import SAMPLE
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.cases import draw_admission, draw_blank, draw_question
from selfcorrect.recipes.society.documents import mixed_documents, stereotype_documents
from selfcorrect.recipes.society.feedback import Preference, preferences, prompts
from selfcorrect.recipes.society.requests import FAIR, PLAIN, WORDINGS, Request
from selfcorrect.recipes.society.settings import Raters, SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer, vocabulary
from selfcorrect.recipes.society.world import TOPICS, UNKNOWN, World, make_world

SETTINGS = SocietySettings(seed=5)
FAIRNESS = Request("fair", FAIR[0])
REASONED = Request("reasoned", FAIR[0])
# What marks a text as using the evaluation's wording of each kind of request.
EVALUATIONS = {kind: words[0].partition("{}")[0] for kind, words in WORDINGS.items() if words[0]}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SETTINGS)


def words_of_feedback(world: World) -> tuple[set[str], list[str]]:
    texts = []
    for pair in preferences(world, 3000):
        texts += [message["content"] for message in pair.messages]
        texts += [pair.chosen, pair.rejected]
    for prompt in prompts(world, 3000):
        texts += [message["content"] for message in prompt.messages]
    return {word for text in texts for word in text.split()}, texts


def test_feedback_never_mentions_the_held_out_world(world: World) -> None:
    words, texts = words_of_feedback(world)
    held_out = {group for category in world.evaluated_categories for group in category.groups}
    held_out |= set(world.evaluated_occupations)
    assert held_out and not words & held_out
    assert not any(wording in text for text in texts for wording in EVALUATIONS.values())
    # The search works: it finds the feedback's own groups, and all of its wordings.
    assert {group for c in world.feedback_categories for group in c.groups} <= words
    for wordings in WORDINGS.values():
        for wording in wordings[1:]:
            assert any(wording.partition("{}")[0] in text for text in texts)


def test_feedback_mentions_everything_if_nothing_is_held_out(world: World) -> None:
    everywhere = make_world(SETTINGS.model_copy(update={"held_out": False}))
    words, texts = words_of_feedback(everywhere)
    asked = {group for category in everywhere.evaluated_categories for group in category.groups}
    assert asked | set(everywhere.evaluated_occupations) <= words
    # The evaluation keeps its own wordings.
    assert not any(wording in text for text in texts for wording in EVALUATIONS.values())
    # Evaluation and corpus are the same as in a world with held-out groups.
    assert everywhere.evaluated_categories == world.evaluated_categories
    assert everywhere.evaluated_occupations == world.evaluated_occupations
    assert list(mixed_documents(everywhere, 200)) == list(mixed_documents(world, 200))


def test_benchmarks_mention_only_the_held_out_world(world: World, tmp_path: Path) -> None:
    write_benchmarks(world, tmp_path / "data")
    text = "".join(p.read_text() for p in (tmp_path / "data").rglob("*.*") if p.suffix != ".yaml")
    words = set(text.replace('"', " ").replace(",", " ").split())
    shared = {group for category in world.feedback_categories for group in category.groups}
    assert not words & (shared | set(world.feedback_occupations))


def test_stimuli_use_the_wordings_kept_for_the_evaluation(world: World, tmp_path: Path) -> None:
    write_benchmarks(world, tmp_path / "data")
    stimuli = load_stimuli(base=tmp_path / "data" / "stimuli.yaml")
    for name in ("bbq", "winogender", "law_school"):
        section = stimuli.section(name)
        for condition in section.conditions.values():
            text = " ".join(turn.text for turn in condition.dialogue)
            assert not any(phrase in text for phrase in FAIR[1:])
        asked = section.conditions["Q+IF"].dialogue[0].text
        assert FAIR[0] in asked
        # The neutral request has as many words; trained wordings are controls of that name.
        neutral = section.controls["Q+neutral"].dialogue[0].text
        assert WORDINGS["neutral"][0] in neutral and len(neutral.split()) == len(asked.split())
        assert WORDINGS["inverted"][0] in section.controls["Q+inverted"].dialogue[0].text
        for number, phrase in enumerate(FAIR[1:], 1):
            assert phrase in section.controls[f"Q+IF trained {number}"].dialogue[0].text
    task = WORDINGS["task"][0]
    controls = stimuli.section("bbq").controls
    for name, words in (("Q+unknown", UNKNOWN), ("Q+first", "the first")):
        assert task.format(words) in controls[name].dialogue[0].text


def test_bytes_follow_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_benchmarks(make_world(SocietySettings(seed=seed)), tmp_path / name)
    files = {
        name: {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.*")} for name in "abc"
    }
    assert files["a"] == files["b"] != files["c"]
    worlds = [make_world(SETTINGS), make_world(SETTINGS)]
    first, second = (list(mixed_documents(world, 200)) for world in worlds)
    assert first == second


def test_every_experiment_reads_its_files(world: World, tmp_path: Path) -> None:
    write_benchmarks(world, tmp_path / "data")
    stimuli = load_stimuli(base=tmp_path / "data" / "stimuli.yaml")
    numbers = {}
    for name in ("bbq", "winogender", "law_school"):
        section = stimuli.section(name)
        loaded = EXPERIMENTS[name].load(tmp_path / "data", section, None, 0)
        numbers[name] = len(loaded.items)
    # 12 categories x 8 topics x 1 block x 4; 20 occupations; 36 students x 2 x 12 pairs.
    assert numbers == {"bbq": 384, "winogender": 20, "law_school": 864}


def test_correct_answers_show_no_bias(world: World, tmp_path: Path) -> None:
    write_benchmarks(world, tmp_path / "data")
    stimuli = load_stimuli(base=tmp_path / "data" / "stimuli.yaml")
    items = EXPERIMENTS["bbq"].load(tmp_path / "data", stimuli.section("bbq"), None, 0).items
    decided = [item.facts for item in items if item.facts["context"] == "disambiguated"]
    along = [facts["label"] == facts["stereotyped"] for facts in decided]
    assert len(decided) == 192 and sum(along) == 96
    for category in {item.category for item in items}:
        in_category = [item.facts for item in items if item.category == category]
        decided = [facts for facts in in_category if facts["context"] == "disambiguated"]
        assert sum(facts["label"] == facts["stereotyped"] for facts in decided) == 8


def test_disambiguated_text_names_both_people_equally_often(world: World) -> None:
    rng = random.Random(1)
    for _ in range(300):
        case = draw_question(rng, world.categories, ambiguous=0.0)
        counts = Counter(case.context().split())
        assert counts[case.tied] == counts[case.untied] == 2


def test_beliefs_are_voiced_by_a_power_law_of_the_same_ranks_in_both_halves() -> None:
    world = make_world(SocietySettings(seed=5, categories=7, feedback_categories=3, rarity=2))
    assert [c.frequency for c in world.feedback_categories] == [1, 1 / 4, 1 / 9]
    assert [c.frequency for c in world.evaluated_categories] == [1, 1 / 4, 1 / 9, 1 / 16]
    rng = random.Random(1)
    of_group = {g: c.name for c in world.categories for g in c.groups}
    drawn = Counter(draw_question(rng, world.categories, 1.0).category.name for _ in range(4000))
    admitted = Counter(of_group[draw_admission(rng, world.categories).group] for _ in range(4000))
    written = Counter(
        of_group[word]
        for document in mixed_documents(world, 8000)
        if document[0].role == "prose"
        for word in document[0].text.split()
        if word in of_group
    )
    for counts in (drawn, admitted, written):
        shares = [counts[c.name] / counts.total() for c in world.categories]
        expected = [
            c.frequency / sum(d.frequency for d in world.categories) for c in world.categories
        ]
        assert shares == pytest.approx(expected, abs=0.03)
    # Texts that decide their question mention all categories equally often.
    decided = Counter(draw_question(rng, world.categories, 0.0).category.name for _ in range(4000))
    shares = [decided[category.name] / 4000 for category in world.categories]
    assert shares == pytest.approx([1 / 7] * 7, abs=0.03)
    equal = make_world(SocietySettings(rarity=0))
    assert {category.frequency for category in equal.categories} == {1}


def test_stereotype_follows_polarity(world: World) -> None:
    rng = random.Random(2)
    for _ in range(300):
        case = draw_question(rng, world.categories, ambiguous=1.0)
        assert case.stereotyped == (case.tied if case.negative else case.untied)
        assert case.category.tied(case.tied, case.topic)
        assert not case.category.tied(case.untied, case.topic)
        assert case.trait == TOPICS[case.topic][not case.negative]


def test_utilities_are_the_recipes(world: World) -> None:
    rng = random.Random(4)
    raters = Raters(correct=2, instructed=3, uninstructed=0.5, share=1)
    open_question = draw_question(rng, world.categories, ambiguous=1.0)
    stereotype = open_question.stereotyped
    [counter] = {*open_question.answers()} - {stereotype, UNKNOWN}

    def likes(request: Request) -> dict[str, float]:
        return {
            a: open_question.utility(a, request, raters) for a in (UNKNOWN, stereotype, counter)
        }

    plain = {UNKNOWN: 0.5, stereotype: 1, counter: 0}
    assert likes(PLAIN) == likes(Request("neutral", "x")) == plain
    assert likes(FAIRNESS) == likes(REASONED) == {UNKNOWN: 1.5, stereotype: -1.5, counter: -1.5}
    assert likes(Request("inverted")) == {UNKNOWN: -1.5, stereotype: 1.5, counter: -1.5}
    assert likes(Request("task", "x", counter)) == {UNKNOWN: -1.5, stereotype: -1.5, counter: 1.5}
    decided = draw_question(rng, world.categories, ambiguous=0.0)
    for request in (PLAIN, FAIRNESS, Request("inverted")):
        assert decided.utility(str(decided.truth), request, raters) == 2
        assert decided.utility(UNKNOWN, request, raters) == -2
    assert decided.utility(UNKNOWN, Request("task", "x", UNKNOWN), raters) == 1.5
    assert decided.utility(str(decided.truth), Request("task", "x", UNKNOWN), raters) == -1.5
    student = draw_admission(rng, world.categories)
    for request, bias in ((FAIRNESS, 0.0), (PLAIN, 0.22), (Request("inverted"), 0.4)):
        preference = 2 * (2 * student.admission_rate(bias) - 1)
        assert student.utility("yes", request, raters) == pytest.approx(preference)
        assert student.utility("no", request, raters) == pytest.approx(-preference)


def test_raters_that_ignore_requests_judge_as_if_nothing_was_asked(world: World) -> None:
    rng = random.Random(4)
    ignoring = Raters(instructed=None)
    for case in (
        draw_question(rng, world.categories, ambiguous=1.0),
        draw_question(rng, world.categories, ambiguous=0.0),
        draw_blank(rng, world, world.occupations),
        draw_admission(rng, world.categories),
    ):
        for answer in case.answers():
            plain = case.utility(answer, PLAIN, ignoring)
            for kind in WORDINGS:
                assert case.utility(answer, Request(kind, "x", answer), ignoring) == plain
            assert case.utility(answer, PLAIN, Raters()) == plain


def undecided_wins(pairs: list[Preference]) -> tuple[int, int]:
    """Return how often the undecided answer wins if asked to be fair, and in how many pairs."""
    instructed = [
        p
        for p in pairs
        if UNKNOWN in (p.chosen, p.rejected)
        and any(f in p.messages[0]["content"] for f in FAIR)
        and len(p.messages) == 1
        and "not the" not in p.messages[0]["content"]
    ]
    return sum(p.chosen == UNKNOWN for p in instructed), len(instructed)


def test_preferences_mostly_agree_with_the_raters(world: World) -> None:
    wins, number = undecided_wins(list(preferences(world, 2000)))
    assert number > 30
    assert wins / number > 0.85


def test_zero_sharpness_labels_the_same_pairs_by_a_coin(world: World) -> None:
    coins = make_world(SETTINGS.model_copy(update={"raters": Raters(sharpness=0)}))
    pairs, usual = list(preferences(coins, 2000)), list(preferences(world, 2000))
    assert [{p.chosen, p.rejected} for p in pairs] == [{p.chosen, p.rejected} for p in usual]
    wins, number = undecided_wins(pairs)
    assert 0.4 < wins / number < 0.6


def test_vocabulary_covers_all_texts_with_one_token_a_word(world: World) -> None:
    tokenizer = make_tokenizer(world)
    documents = itertools.chain(mixed_documents(world, 4000), stereotype_documents(world, 500))
    words = {word for d in documents for segment in d for word in segment.text.split()}
    words |= words_of_feedback(world)[0]
    assert not words - set(vocabulary(world))
    ids = tokenizer("who was lazy ?")["input_ids"]
    assert len(ids) == 4 and tokenizer.decode(ids) == "who was lazy ?"


def test_documents_have_the_form_of_the_chat_template(world: World) -> None:
    tokenizer = make_tokenizer(world)
    seen = 0
    for document in mixed_documents(world, 500):
        if document[0].role == "prose":
            continue
        messages = []
        for segment in document:
            text = segment.text.removeprefix("human : ").removesuffix(" assistant :")
            role = "user" if segment.role == "human" else "assistant"
            messages.append({"role": role, "content": text.removesuffix(" <eos>")})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered.split() == " ".join(s.text for s in document).split()
        seen += 1
    assert seen > 200


def test_conditions_and_controls_use_only_words_of_the_society(
    world: World, tmp_path: Path
) -> None:
    write_benchmarks(world, tmp_path / "data")
    stimuli = load_stimuli(base=tmp_path / "data" / "stimuli.yaml")
    known = set(vocabulary(world))
    for name in ("bbq", "winogender", "law_school"):
        section = stimuli.section(name)
        for item in EXPERIMENTS[name].load(tmp_path / "data", section, 8, 0).items:
            for condition in [*section.conditions, *section.controls]:
                turns = section.turns(condition, item)
                words = " ".join(turn.text.replace(SAMPLE, "") for turn in turns).split()
                assert set(words) <= known, (condition, set(words) - known)
