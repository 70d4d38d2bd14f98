"""Chapter 1's exercises: typical wrong answers get the feedback that helps."""

import math

import pytest
import torch

from helpers.course import exercises
from helpers.course.exercises import chapter1


def solution(number):
    names = {}
    exec(exercises.show(number).code, names)
    return names["answer"]


@pytest.mark.parametrize("exercise", chapter1.EXERCISES, ids=lambda e: e.number)
def test_solutions_pass_and_blanks_wait(exercise):
    result = exercises.check(exercise.number, solution(exercise.number))
    assert result.passed, result
    assert exercises.check(exercise.number, ...).state == "open"
    assert exercise.hints
    assert exercise.solution.count("answer") >= 1


def attention_without(part):
    def answer(query, key, value):
        scores = query @ key.transpose(-2, -1)
        future = torch.ones(6, 6, dtype=torch.bool).triu(1)
        if part != "scale":
            scores = scores / (16 if part == "root" else 4)
        if part not in ("mask", "late"):
            scores = scores.masked_fill(future, 0 if part == "zero" else -math.inf)
        weights = scores.softmax(-2 if part == "rows" else -1)
        if part == "rows":
            weights = weights.nan_to_num()
        if part == "late":
            weights = weights * ~future
        return weights @ value

    return answer


def previous_head(offset=-1, flat=False, swapped=False, first=False):
    def answer(weights):
        score = weights.diagonal(offset, dim1=-2, dim2=-1).mean(-1)
        if first:
            score = weights[..., 0].mean(-1)
        index = int(score.argmax())
        found = divmod(index, score.shape[1])
        return index if flat else found[::-1] if swapped else found

    return answer


def greedy(*, stop=True, keep_eos=True, append=True, whole=True, prompt=True, second=False):
    def answer(next_logits, ids, steps, eos):
        start = len(ids)
        ids = list(ids)
        for _ in range(steps):
            logits = next_logits(ids if whole else ids[-1:])
            token = int(logits.topk(2).indices[1] if second else logits.argmax())
            if stop and not keep_eos and token == eos:
                break
            if append:
                ids.append(token)
            if stop and token == eos:
                break
        return ids if prompt else ids[start:]

    return answer


WRONG = [
    ("1.1", [3, 1, -3], "softmax"),
    ("1.1", [2.1213, 0.7071, -2.1213], "softmax"),
    ("1.1", torch.tensor([3.0, 1, -3]).softmax(0), "unscaled"),
    ("1.1", torch.tensor([1.5, 0.5, -1.5]).softmax(0), "not by its root"),
    ("1.1", [0.5, 0.2, 0.1], "sum to 0.800"),
    ("1.1", [0.5, 0.3, 0.2], "dot products again"),
    ("1.1", [0.5, 0.5], "2 numbers"),
    ("1.1", 0.8, "list of 3"),
    ("1.2", 1024, "variance"),
    ("1.2", 16, "Here theirs is 2"),
    ("1.2", 512, "do not add up"),
    ("1.2", 2, "ask for before"),
    ("1.2", 7, "one product"),
    ("1.2", "a lot", "one number"),
    ("1.3", lambda queries, keys: torch.ones(queries, keys).tril(), "newest one"),
    ("1.3", lambda queries, keys: torch.ones(queries, keys).triu(1), "Upside down"),
    ("1.3", lambda queries, keys: torch.ones(queries, keys).tril(-1), "diagonal"),
    ("1.3", lambda queries, keys: torch.ones(queries, keys), "row by row"),
    ("1.3", lambda queries, keys: torch.ones(keys, keys).tril(), "shape is (5, 5)"),
    ("1.3", torch.ones(4, 4).tril(), "function"),
    ("1.4", attention_without("mask"), "see the future"),
    ("1.4", attention_without("scale"), "Only the scale"),
    ("1.4", attention_without("root"), "square root"),
    ("1.4", attention_without("late"), "after the softmax"),
    ("1.4", attention_without("zero"), "exp(0) is 1"),
    ("1.4", attention_without("rows"), "over the queries"),
    ("1.4", lambda query, key, value: value * math.nan, "NaN"),
    ("1.4", lambda query, key, value: value, "one at a time"),
    ("1.4", lambda query, key, value: value[0], "got (4, 6, 16)"),
    ("1.4", lambda query, key, value: None, "got NoneType"),
    ("1.4", "softmax", "function"),
    ("1.5", 69120, "not from all 9"),
    ("1.5", 11520, "Keys and values both"),
    ("1.5", 46080, "2 bytes"),
    ("1.5", 768, "every layer"),
    ("1.5", 23040 * 8192, "one token"),
    ("1.5", 1, "Multiply"),
    ("1.6", previous_head(0), "main diagonal"),
    ("1.6", previous_head(first=True), "first token"),
    ("1.6", previous_head(flat=True), "(layer, head)"),
    ("1.6", previous_head(swapped=True), "wrong way round"),
    ("1.6", lambda weights: (0, 0), "just below"),
    ("1.6", (1, 2), "function"),
    ("1.7", greedy(stop=False), "ran past"),
    ("1.7", greedy(keep_eos=False), "keep the end-of-text"),
    ("1.7", greedy(append=False), "append the new token"),
    ("1.7", greedy(whole=False), "no memory"),
    ("1.7", greedy(prompt=False), "together"),
    ("1.7", greedy(second=True), "greedy choices"),
    ("1.7", lambda next_logits, ids, steps, eos: solution("1.7")(next_logits, ids, 20, eos),
     "three new tokens"),
    ("1.7", [1, 2, 3], "function"),
    ("1.8", ["rag", "prompt", "prompt", "rag", "fine-tune"], "Case 2"),
    ("1.8", ["fine-tune"] * 5, "*fact*"),
    ("1.8", ["rag", "fine-tune", "rag", "rag", "fine-tune"], "Try asking"),
    ("1.8", ["rag", "fine-tune", "magic", "rag", "fine-tune"], "'magic' is none of"),
    ("1.8", ["rag"], "5 words"),
    ("1.8", "rag", "5 words"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "answer", "fragment"), WRONG, ids=[f"{n}-{f[:20]}" for n, _, f in WRONG]
)
def test_wrong_answers_get_their_feedback(number, answer, fragment):
    result = exercises.check(number, answer)
    assert result.state == "wrong"
    assert fragment in result.message


def test_answers_in_other_clothes_pass():
    assert exercises.check("1.1", torch.tensor(solution("1.1"), dtype=torch.float64)).passed
    assert exercises.check("1.2", torch.tensor(32)).passed
    assert exercises.check("1.3", lambda q, k: solution("1.3")(q, k).int()).passed
    assert exercises.check("1.5", 23040.0).passed
    assert exercises.check("1.8", ("RAG", "finetune", "Prompt", "rag", "fine-tune ")).passed


def test_an_answer_that_raises_is_reported_kindly():
    result = exercises.check("1.4", lambda query, key, value: query @ key)
    assert result.state == "wrong"
    assert "RuntimeError" in result.message


def test_given_lists_the_cases():
    assert exercises.given("1.8") == list(chapter1.CASES)
