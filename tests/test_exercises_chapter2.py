"""Chapter 2's exercises: typical wrong answers get the feedback that fits them."""

import pytest
import torch

from helpers.course import exercises
from helpers.course.exercises import chapter2


def blockwise(weights, block_size, *, scale=127, magnitude=True, dtype=torch.int8):
    blocks = weights.reshape(-1, block_size)
    absmax = blocks.abs().amax(1) if magnitude else blocks.amax(1)
    codes = (blocks / absmax[:, None] * scale).round().to(dtype)
    return codes.reshape(weights.shape), absmax


def truncated_blocks(weights, block_size):
    blocks = weights.reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    return (blocks / absmax[:, None] * 127).to(torch.int8), absmax


def first_draft(weights, bits):
    edges = torch.linspace(weights.min(), weights.max(), 2**bits + 1)[:-1]
    return (weights[:, None] > edges).sum(dim=1) - 1


def steps(weights, bits):
    low, high = weights.min(), weights.max()
    return (weights - low) / ((high - low) / (2**bits - 1))


def squared(weights, bits):
    return ((steps(weights, bits) / (2**bits - 1)) ** 2 * (2**bits - 1)).round()


HALF = {"float16": [1e-9, 70000.0, 1e30], "bfloat16": []}
WRONG = [
    ("2.1", 4.5 / 16, "count the gaps"),
    ("2.1", 3.0 / 15, "both signs"),
    ("2.1", 4.5 / 4, "each bit doubles"),
    ("2.1", 7, "Divide the whole range"),
    ("2.1", "wide", "one number"),
    ("2.2", 4.0, "block scales take some space"),
    ("2.2", 4.5, "without double quantization"),
    ("2.2", 33.01, "gigabits"),
    ("2.2", 3.844, "GiB"),
    ("2.2", 4.127e9, "divide bytes by 1e9"),
    ("2.2", 16, "divided by 8, gives bytes"),
    ("2.3", 7, "A function is wanted"),
    ("2.3", lambda w, bits: 3, "should be a torch tensor"),
    ("2.3", lambda w, bits: w[:5], "exactly one"),
    ("2.3", steps, "not rounded yet"),
    ("2.3", first_draft, "lowest code is -1"),
    ("2.3", lambda w, bits: (steps(w, bits) * 2).round(), "counting starts at 0"),
    ("2.3", lambda w, bits: (steps(w, bits) / 2).floor(), "should get 0 and"),
    ("2.3", lambda w, bits: steps(w, bits).floor(), "cutting off decimals"),
    ("2.3", squared, "do not follow the weights evenly"),
    ("2.3", lambda w: w, "TypeError"),
    ("2.4", 85.2, "whole number"),
    ("2.4", -85, "codes run from 0 to 255"),
    ("2.4", 128, "middle of the codes"),
    ("2.4", 0, "smallest value"),
    ("2.4", 42, "How many steps"),
    ("2.5", [1e-9], "Give a dictionary"),
    ("2.5", {**HALF, "float16": [70000.0, 1e30]}, "too small"),
    ("2.5", {**HALF, "float16": [1e-9, 1e30]}, "too large"),
    ("2.5", {**HALF, "float16": [1e-9, 3e-6, 70000.0, 1e30]}, "*normal* number"),
    ("2.5", {**HALF, "bfloat16": [2049.0]}, "rounded, but not lost"),
    ("2.5", {**HALF, "bfloat16": [1e30]}, "within its range"),
    ("2.5", {**HALF, "bfloat16": [5.0]}, "not among VALUES"),
    ("2.6", 4.127, "blocks of 64"),
    ("2.6", 5.0, "without double quantization"),
    ("2.6", 4.25, "scales of their own"),
    ("2.6", 0.2539, "add the codes"),
    ("2.6", 32, "Add three terms"),
    ("2.7", None, "A function is wanted"),
    ("2.7", lambda w, n: blockwise(w, n)[0], "Return two things"),
    ("2.7", lambda w, n: blockwise(w, w.numel()), "one scale for everything"),
    ("2.7", lambda w, n: blockwise(w, n // 2), "blocks of 64 make 4 blocks"),
    ("2.7", lambda w, n: blockwise(w, n, magnitude=False), "largest magnitude"),
    ("2.7", lambda w, n: (blockwise(w, n)[0][:1], blockwise(w, n)[1]), "as many codes"),
    ("2.7", lambda w, n: blockwise(w, n, dtype=torch.int32), "torch.int8"),
    ("2.7", lambda w, n: blockwise(w, n, scale=-128), "wrap around"),
    ("2.7", truncated_blocks, "a plain cast cuts off"),
    ("2.8", lambda codes: codes, "nothing was packed"),
    ("2.8", lambda codes: codes[:8], "should make 32 bytes"),
    ("2.8", lambda codes: (codes[::2].int() << 4) | codes[1::2], "torch.uint8"),
    ("2.8", lambda codes: (codes[1::2] << 4) | codes[::2], "swapped"),
    ("2.8", lambda codes: (codes[:32] << 4) | codes[32:], "Neighbors share a byte"),
    ("2.8", lambda codes: codes[::2] + codes[1::2], "Shift the first code up"),
]


@pytest.mark.parametrize(
    ("number", "answer", "feedback"), WRONG, ids=[f"{n}: {f[:24]}" for n, _, f in WRONG]
)
def test_wrong_answers_get_fitting_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert not result.passed
    assert feedback in result.message


RIGHT = [
    ("2.1", 0.3),
    ("2.1", torch.tensor(0.3)),
    ("2.1", "0.3"),
    ("2.2", 4.13),
    ("2.3", lambda w, bits: steps(w, bits).round()),  # any dtype
    ("2.4", 85.0),
    ("2.5", {"bfloat16": (), "float16": {1e-9, 7e4, 1e30}}),
    ("2.6", 4.254),
    ("2.7", blockwise),
    ("2.8", lambda codes: (codes[::2] * 16 + codes[1::2]).view(-1, 1)),
]


@pytest.mark.parametrize(
    ("number", "answer"), RIGHT, ids=[f"{n} #{i}" for i, (n, _) in enumerate(RIGHT)]
)
def test_right_answers_in_any_form(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result.message


@pytest.mark.parametrize("exercise", chapter2.EXERCISES, ids=lambda e: e.number)
def test_solutions_pass_and_hints_do_not_repeat(exercise):
    scope = {}
    exec(exercise.solution, scope)
    assert exercises.check(exercise.number, scope["answer"]).passed
    assert len(exercise.hints) >= 2 and len(set(exercise.hints)) == len(exercise.hints)
