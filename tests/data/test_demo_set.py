"""The demo sets: many kinds of question, and held-out ones unlike any of them.

A model trained on few sentence frames learns the frames. So no frame may take over the training
set, and no held-out question may have the frame of a training question.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"
SETS = ("dpo_en_demo", "dpo_en_demo_heldout")
JUDGED = dict(zip(SETS, ("kto_en_demo", "kto_en_demo_heldout"), strict=True))
INSTRUCTIONS = ("alpaca_en_demo", "alpaca_en_demo_heldout")
LARGEST_FRAME = 10

FUNCTION_WORDS = """
a an the this that these those there here
i me my mine you your we us our he him his she her it its they them their
who whom whose what which when where why how
am is are was were be been being do does did have has had
can could will would shall should may might must need
and or but so if because than then as while once since
of to in on at by for from with without about into over under after before between during
up down out off through
not no never yes any some all each every both much many more most
really just only even still always too very
please tell give explain say name
i'm i'd i've what's there's who's can't don't
"""


def frame(question: str) -> tuple[str, str]:
    """The opening three words, and the function words with every other run of words as `_`.

    >>> frame("How do I boil fresh eggs for my cat?")
    ('how do i', 'how do i _ for my _')
    """
    kept = FUNCTION_WORDS.split()
    words = re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", question.lower().replace("’", "'"))
    skeleton = " ".join(word if word in kept else "_" for word in words)
    return " ".join(words[:3]), re.sub(r"_( _)+", "_", skeleton)


def source(name: str) -> list[tuple[str, ...]]:
    lines = (DATA / "source" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines]


def pairs(name: str) -> list[dict]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def questions(name: str) -> list[str]:
    return [row[0] for row in source(name)]


def test_the_sets_are_large_enough():
    training, heldout = SETS
    assert len(pairs(training)) >= 300
    assert len(pairs(heldout)) >= 20


def test_every_question_is_asked_once():
    asked = [question.casefold() for name in SETS + INSTRUCTIONS for question in questions(name)]
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("key", [0, 1], ids=["opening", "skeleton"])
@pytest.mark.parametrize("training", [SETS[0], INSTRUCTIONS[0]])
def test_no_frame_takes_over_the_training_set(key, training):
    counts = Counter(frame(question)[key] for question in questions(training))
    assert [common for common in counts.most_common() if common[1] > LARGEST_FRAME] == []


@pytest.mark.parametrize("key", [0, 1], ids=["opening", "skeleton"])
@pytest.mark.parametrize(("training", "heldout"), [SETS, INSTRUCTIONS])
def test_no_heldout_question_has_a_training_frame(key, training, heldout):
    trained = {frame(question)[key] for question in questions(training)}
    assert [question for question in questions(heldout) if frame(question)[key] in trained] == []


@pytest.mark.parametrize("name", SETS)
def test_chosen_is_one_short_sentence(name):
    for _, answer in source(name):
        assert answer.endswith("."), answer
        assert not re.search(r"[.!?:\n]\s", answer), answer
        assert 8 <= len(answer.split()) <= 25, answer


@pytest.mark.parametrize("name", SETS)
def test_rejected_is_a_longer_other_answer(name):
    for pair in pairs(name):
        chosen, rejected = pair["chosen"]["value"], pair["rejected"]["value"]
        assert rejected != chosen
        assert len(rejected.split()) >= 25, rejected


@pytest.mark.parametrize("name", SETS)
def test_the_pairs_are_those_of_the_source(name):
    made = [(pair["conversations"][0]["value"], pair["chosen"]["value"]) for pair in pairs(name)]
    assert made == source(name)


@pytest.mark.parametrize("name", SETS)
def test_judged_rows_are_one_answer_of_each_pair_and_half_are_desirable(name):
    judged = pairs(JUDGED[name])
    assert sum(row["label"] for row in judged) == len(judged) / 2
    for row, pair in zip(judged, pairs(name), strict=True):
        question, answer = (turn["content"] for turn in row["messages"])
        assert question == pair["conversations"][0]["value"]
        assert answer == pair["chosen" if row["label"] else "rejected"]["value"]


@pytest.mark.parametrize(("name", "number"), [("alpaca_en_demo", 160), ("alpaca_en_demo_heldout", 40)])
def test_instructions_are_those_of_the_source_and_a_third_has_an_input(name, number):
    rows = pairs(name)
    assert [tuple(row.values()) for row in rows] == source(name) and len(rows) == number
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    assert 0.3 <= sum(bool(row["input"]) for row in rows) / number <= 0.4


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_output_is_one_or_two_plain_sentences(name):
    for _, _, output in source(name):
        assert output[-1] in ".!?", output
        assert 1 <= len(re.findall(r"[.!?](?=\s|$)", output)) <= 2, output
        assert len(output.split()) <= 25, output
