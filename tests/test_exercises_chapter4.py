"""Chapter 4's exercises refuse typical wrong answers and say what is off."""

import pytest

from helpers import chat
from helpers.course import exercises
from helpers.course.exercises import chapter4

ROW = chapter4._row()
IDS, LABELS = ROW["input_ids"], ROW["labels"]
END = chapter4._tokenizer().eos_token_id


def first_header(ids, header):
    return next(
        (i + len(header) for i in range(len(ids)) if ids[i : i + len(header)] == header),
        None,
    )


def header_itself(ids, header):
    return next(i for i in range(len(ids)) if ids[i : i + len(header)] == header)


def never_none(ids, header):
    for i in range(len(ids) - len(header), -1, -1):
        if ids[i : i + len(header)] == header:
            return i + len(header)
    return 0


WRONG = [
    ("4.1", IDS, "train the question"),
    ("4.1", [-100] * len(IDS), "nothing is learned"),
    ("4.1", LABELS[:-1], "each token needs one"),
    ("4.1", [*LABELS[1:], -100], "Shifted by one"),
    ("4.1", [x if x != END else -100 for x in LABELS], "not the token that ends"),
    ("4.1", [int(x != -100) for x in LABELS], "zeros and ones"),
    ("4.2", 54, "number of padding tokens"),
    ("4.2", 1.0, "divided by the real tokens"),
    ("4.2", 0.3, "as long as the longest"),
    ("4.3", "<|im_end|>", "That is EOS"),
    ("4.3", "<|im_start|>", "start of every turn"),
    ("4.3", "<pad>", "not in the vocabulary"),
    ("4.3", "the", "ordinary word"),
    ("4.3", 16, "not its id"),
    ("4.4", list(range(9)), "one text of 9"),
    ("4.4", [1, 2, 3, 4, 1, 2, 1, 2, 3], "start at 0"),
    ("4.4", [0, 0, 0, 0, 1, 1, 2, 2, 2], "numbers the samples"),
    ("4.5", chapter4._given_template(), "end_of_turn_not_trained"),
    ("4.5", "{% generation %}{% for %}{% endgeneration %}", "does not compile"),
    ("4.5", "hello", "no {% generation %} markers"),
    ("4.5", 7, "a str"),
    ("4.6", "prompt_trained", "very beginning"),
    ("4.6", "something", "Give the code"),
    ("4.6", "labels_differ", "a consequence"),
    ("4.7", first_header, "last header counts"),
    ("4.7", header_itself, "where the header starts"),
    ("4.7", never_none, "return None"),
    ("4.8", 0.5, "divided by all five"),
    ("4.8", 2.5, "the sum"),
    ("4.8", 1.8, "ignored ones included"),
    ("4.9", 2, "last one again"),
    ("4.9", 4, "Four rows"),
    ("4.9", 1, "end to end"),
]


@pytest.mark.parametrize(("number", "answer", "feedback"), WRONG)
def test_wrong_answers_get_their_own_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert not result.passed
    assert feedback in result.message, result.message


@pytest.mark.parametrize("exercise", chapter4.EXERCISES, ids=lambda e: e.number)
def test_solutions_pass_and_hints_exist(exercise):
    names = {"given": exercise.given()} if exercise.given else {}
    exec(exercise.solution, names)
    assert exercises.check(exercise.number, names["answer"]).passed
    assert len(exercise.hints) >= 2


def test_the_broken_template_is_broken_in_exactly_one_way():
    row = chat.encode_chat(
        chapter4._tokenizer(), chapter4.MESSAGES, template=chapter4._given_template()
    )
    assert row["input_ids"] == IDS
    assert [t for t in LABELS if t != -100] == [
        *(t for t in row["labels"] if t != -100),
        END,
    ]
