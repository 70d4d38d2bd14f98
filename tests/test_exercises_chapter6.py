"""Chapter 6's exercises: typical wrong answers get the feedback meant for them."""

import shutil

import pytest
import torch

from helpers.course import exercises

NUMBERS = [f"6.{n}" for n in range(1, 8)]


def padded(side, mask_by_id=False):
    def answer(rows, pad_id):
        longest = max(map(len, rows))
        gaps = [longest - len(row) for row in rows]
        pairs = list(zip(gaps, rows, strict=True))
        if side == "left":
            ids = [[pad_id] * gap + row for gap, row in pairs]
            mask = [[0] * gap + [1] * len(row) for gap, row in pairs]
        else:
            ids = [row + [pad_id] * gap for gap, row in pairs]
            mask = [[1] * len(row) + [0] * gap for gap, row in pairs]
        if mask_by_id:
            mask = [[int(token != pad_id) for token in row] for row in ids]
        return ids, mask

    return answer


def in_place(W, A, B, alpha):
    W += alpha / A.shape[0] * (B @ A)
    return W


def divergence(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def with_stop(text):
    return text + 'PARAMETER stop "<|im_end|>"\n'


BROKEN = exercises.given("6.7")
WRONG = [
    ("6.1", "large", "one number"),
    ("6.1", 32.3, "gigabits"),
    ("6.1", 3.76, "GiB"),
    ("6.1", 3.8, "half a bit"),
    ("6.1", 1, "make bytes"),
    ("6.2", 768, "a list"),
    ("6.2", [768, 1000], "1000 was not"),
    ("6.2", [576, 768], "2.25"),
    ("6.2", [768, 2048], "at least one more"),
    ("6.3", [[1]], "should be a function"),
    ("6.3", lambda rows, pad: rows[:1], "two things"),
    ("6.3", lambda rows, pad: padded("left")(rows, pad)[0], "a list of rows"),
    ("6.3", lambda rows, pad: (rows, rows), "must be 3 long"),
    ("6.3", padded("right"), "right padding"),
    ("6.3", padded("left", mask_by_id=True), "happen to have"),
    ("6.4", 1, "should be a function"),
    ("6.4", lambda W, A, B, alpha: A, "shape of W"),
    ("6.4", lambda W, A, B, alpha: W + B @ A, "at full"),
    ("6.4", lambda W, A, B, alpha: W + alpha * B @ A, "divide it"),
    ("6.4", lambda W, A, B, alpha: W - B @ A, "should equal"),
    ("6.4", in_place, "in place"),
    ("6.5", "double_bos", "list of three"),
    ("6.5", ["double_bos", "bos", "bos"], "none of"),
    ("6.5", ["missing_generation_prompt", "double_bos", "different_text"], "pair 3"),
    ("6.6", 3, "should be a function"),
    ("6.6", divergence, "one number"),
    ("6.6", lambda p, q: divergence(q, p).mean(), "Weigh with"),
    ("6.6", lambda p, q: divergence(p, q).sum(), "the sum over"),
    ("6.6", lambda p, q: divergence(p, q).sum() / p.numel(), "over the vocabulary"),
    ("6.6", lambda p, q: divergence(p, q).mean() / torch.tensor(2.0).log(), "in bits"),
    ("6.6", lambda p, q: (p * (p - q)).sum(-1).mean(), "log-probabilities"),
    ("6.7", None, "the text"),
    ("6.7", "FROM x\n", "no TEMPLATE"),
    ("6.7", BROKEN, "still never stops"),
    ("6.7", with_stop(BROKEN), "still goes nowhere"),
]


@pytest.mark.parametrize(("number", "answer", "feedback"), WRONG)
def test_wrong_answers_get_their_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert not result.passed
    assert feedback in result.message, result.message


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go: apt-get install golang-go")
def test_a_template_with_another_text_is_caught_by_go():
    text = BROKEN.replace('{{ if ne .Role "system" }}', "").replace("{{ end }}{{", "{{")
    result = exercises.check("6.7", with_stop(text.replace("assistant\n", "assistant")))
    assert "differ from training's" in result.message


@pytest.mark.parametrize("number", NUMBERS)
def test_the_shown_solution_passes(number):
    exercise = exercises.catalog()[number]
    names = {"given": exercises.given(number)} if exercise.given else {}
    exec(exercise.solution, names)
    result = exercises.check(number, names["answer"])
    assert result.passed, result.message


def test_the_answer_may_be_tensors_for_padding():
    def answer(rows, pad_id):
        return tuple(torch.tensor(part) for part in padded("left")(rows, pad_id))

    assert exercises.check("6.3", answer).passed
