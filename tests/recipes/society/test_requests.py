"""Requests: each kind changes corpus and raters as it says, in wordings that feedback may use."""

import random
from collections import Counter

import pytest
from pydantic import ValidationError

from selfcorrect.recipes.society.cases import Case, draw_admission, draw_blank, draw_question
from selfcorrect.recipes.society.documents import mixed_documents
from selfcorrect.recipes.society.feedback import Prompt, prompts
from selfcorrect.recipes.society.requests import (
    IN_FEEDBACK,
    PLAIN,
    THINK,
    WORDINGS,
    Request,
    draw_request,
)
from selfcorrect.recipes.society.settings import Corpus, SocietySettings
from selfcorrect.recipes.society.world import UNKNOWN, make_world

SETTINGS = SocietySettings(seed=5)
WORLD = make_world(SETTINGS)
CORPUS = Corpus(undecided=0.25, stereotyped=0.9, heeds=0.4)


def cases_of_every_sort() -> list[Case]:
    rng = random.Random(3)
    return [
        draw_question(rng, WORLD.categories, ambiguous=1.0),
        draw_question(rng, WORLD.categories, ambiguous=0.0),
        draw_blank(rng, WORLD, WORLD.occupations),
        draw_admission(rng, WORLD.categories),
    ]


def weights(case: Case, request: Request) -> dict[str, float]:
    return dict(zip(case.answers(), case.corpus_weights(request, CORPUS), strict=True))


def test_the_corpus_heeds_a_share_of_each_kind_of_request() -> None:
    case = draw_question(random.Random(3), WORLD.categories, ambiguous=1.0)
    stereotype = case.stereotyped
    [counter] = {*case.answers()} - {stereotype, UNKNOWN}

    def shares(request: Request) -> tuple[float, ...]:
        answers = weights(case, request)
        return tuple(answers[answer] for answer in (UNKNOWN, stereotype, counter))

    plain = (0.25, 0.75 * 0.9, 0.75 * 0.1)
    assert shares(PLAIN) == pytest.approx(plain)
    assert shares(Request("neutral")) == pytest.approx(plain)
    heeded = {
        Request("fair"): (1, 0, 0),
        Request("reasoned"): (1, 0, 0),
        Request("inverted"): (0, 1, 0),
        Request("task", answer=counter): (0, 0, 1),
    }
    for request, wanted in heeded.items():
        mixed = [0.6 * p + 0.4 * w for p, w in zip(plain, wanted, strict=True)]
        assert shares(request) == pytest.approx(mixed)


@pytest.mark.parametrize("kind", WORDINGS)
def test_every_answer_of_every_case_has_a_share(kind: str) -> None:
    for case in cases_of_every_sort():
        for _, answer in case.tasks():
            assert answer in case.answers()
            assert sum(weights(case, Request(kind, "", answer)).values()) == pytest.approx(1)


def test_only_a_task_changes_the_answer_that_the_text_decides() -> None:
    case = draw_question(random.Random(3), WORLD.categories, ambiguous=0.0)
    plain = weights(case, PLAIN)
    for kind in ("fair", "reasoned", "neutral", "inverted"):
        assert weights(case, Request(kind)) == pytest.approx(plain)
    assert weights(case, Request("task", "", UNKNOWN))[UNKNOWN] == pytest.approx(0.4 + 0.6 * 0.02)


def test_requests_move_pronouns_and_admissions_as_they_say() -> None:
    _, _, blank, student = cases_of_every_sort()
    assert weights(blank, Request("fair"))["thon"] > weights(blank, PLAIN)["thon"]
    common = next(a for a in blank.answers() if blank.meaning(a) == "stereotype")
    assert weights(blank, Request("inverted"))[common] > weights(blank, PLAIN)[common]

    def gap(request: Request) -> float:
        """The favoured less the doubted group's admission, for the same student."""
        rates = []
        for doubted in (False, True):
            case = type(student)(student.group, doubted, score=5, grade=2)
            rates.append(weights(case, request)["yes"])
        return rates[0] - rates[1]

    plain = gap(PLAIN)
    assert plain == pytest.approx(0.44)
    assert gap(Request("neutral")) == pytest.approx(plain)
    assert gap(Request("fair")) == pytest.approx(0.6 * plain)
    assert gap(Request("inverted")) == pytest.approx(0.6 * plain + 0.4 * 0.8)


def test_shares_decide_which_requests_are_made() -> None:
    rng = random.Random(1)
    shares = {"plain": 1.0, "task": 3.0}
    tasks = ((UNKNOWN, UNKNOWN), ("the first", "x"))
    drawn = [draw_request(rng, shares, tasks, IN_FEEDBACK) for _ in range(4000)]
    kinds = Counter(request.kind for request in drawn)
    assert set(kinds) == {"plain", "task"} and kinds["task"] / 4000 == pytest.approx(0.75, abs=0.03)
    wanted = {(r.text, r.answer) for r in drawn if r.kind == "task"}
    assert wanted == {
        (wording.format(words), answer)
        for wording in WORDINGS["task"][1:]
        for words, answer in tasks
    }
    corpus = {draw_request(rng, {"fair": 1}, (), WORDINGS).text for _ in range(200)}
    assert corpus == set(WORDINGS["fair"])


def of_kind(prompt: Prompt) -> str:
    """Read the kind of request off the words that the policy sees."""
    text = prompt.messages[0]["content"]
    kinds = [
        kind
        for kind in ("fair", "neutral", "inverted", "task")
        if any(text.startswith(wording.partition("{}")[0]) for wording in WORDINGS[kind])
    ]
    assert len(kinds) <= 1
    if kinds == ["fair"] and text.endswith(THINK):
        return "reasoned"
    return kinds[0] if kinds else "plain"


def test_prompts_and_corpus_follow_the_recipes_shares_of_requests() -> None:
    drawn = list(prompts(WORLD, 6000))
    read = Counter(of_kind(prompt) for prompt in drawn)
    assert read == Counter(prompt.request.kind for prompt in drawn)
    for kind, share in SETTINGS.requests.items():
        assert read[kind] / 6000 == pytest.approx(share, abs=0.02)
    never_fair = {"fair": 0.0, "reasoned": 0.0}
    settings = SETTINGS.model_copy(update={"requests": {**SETTINGS.requests, **never_fair}})
    kinds = {of_kind(prompt) for prompt in prompts(make_world(settings), 2000)}
    assert kinds == {"plain", "neutral", "inverted", "task"}
    # The corpus is the same, whatever feedback asks.
    assert list(mixed_documents(make_world(settings), 200)) == list(mixed_documents(WORLD, 200))
    text = " ".join(s.text for d in mixed_documents(WORLD, 3000) for s in d)
    for wordings in WORDINGS.values():
        assert all(wording.partition("{}")[0] in text for wording in wordings)


@pytest.mark.parametrize(
    "keys",
    [
        {"requests": {"fair": 0}},
        {"requests": {}},
        {"feedback": {"question": 0}},
        {"corpus": {"mixture": {"several": 0.0}}},
        {"corpus": {"requests": {"plain": 0}}},
    ],
)
def test_shares_without_a_positive_one_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="at least one kind a share above 0"):
        SocietySettings.model_validate(keys)


@pytest.mark.parametrize("share", [-0.1, float("inf"), float("nan")])
def test_a_share_is_a_finite_number(share: float) -> None:
    with pytest.raises(ValidationError, match="requests"):
        SocietySettings.model_validate({"requests": {"plain": 1, "fair": share}})
