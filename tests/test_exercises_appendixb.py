"""Appendix B's exercises: typical wrong answers each get their own feedback."""

import math
import re

import pytest
import torch

from helpers import floats
from helpers.course import exercises


def rounds_ties_from_zero_in_half(patterns):
    """Nearest, but ties go up only for even last bits: exactly the wrong ones."""
    return (patterns + 0x8000 - ((patterns >> 16) & 1)) >> 16


def decoder(leading=True, specials=True, bias=None, shared_power=True, signed=True):
    """A decoder for any format with one typical mistake switched on."""

    def decode(pattern, exponent_bits, mantissa_bits):
        mantissa = pattern & (2**mantissa_bits - 1)
        exponent = (pattern >> mantissa_bits) & (2**exponent_bits - 1)
        negative = pattern >> (exponent_bits + mantissa_bits)
        sign = -1 if negative and signed else 1
        off = 2 ** (exponent_bits - 1) - 1 if bias is None else bias
        if specials and exponent == 2**exponent_bits - 1:
            return math.nan if mantissa and specials != "infinity" else sign * math.inf
        first = 1 if exponent or not leading else 0
        power = (max(exponent, 1) if shared_power else exponent) - off
        return sign * 2.0**power * (first + mantissa / 2**mantissa_bits)

    return decode


WRONG = [
    ("B.1", 182, "unsigned reading"),
    ("B.1", -54, "minus sign in front"),
    ("B.1", -73, "Off by one"),
    ("B.1", 74, "positive"),
    ("B.1", 7, "place values"),
    ("B.1", "10110110b", "one number"),
    ("B.2", 22, "first bit"),
    ("B.2", -6, "leading 1"),
    ("B.2", -1.375 * 2**19, "bias"),
    ("B.2", -11, "factor of two"),
    ("B.2", -44, "factor of two"),
    ("B.2", -385 * 16, "1024ths"),
    ("B.2", 3, "fields one by one"),
    ("B.3", 0.15625, "as text"),
    ("B.3", "0 01100 0100000000", "right for FP16"),
    ("B.3", "0 01111100 01", "this has 11 digits"),
    ("B.3", "0 01111100 0200000", "16 zeros and ones"),
    ("B.3", "1 01111100 0100000", "0 is plus"),
    ("B.3", "0 10000010 0100000", r"2\^\(130 - 127\)"),
    ("B.3", "0 01111100 0010000", "1 \\+ 16/128"),
    ("B.3", "0 01111101 1000000", "power of two first"),
    ("B.4", 2**-14, "smallest normal"),
    ("B.4", 2**-15, "shares its power"),
    ("B.4", 2**-17, "Too small"),
    ("B.4", 2**-9, "E4M3"),
    ("B.4", 0, "greater than zero"),
    ("B.4", 1e-5, "right after zero"),
    ("B.4", 1.5259e-5, "Give it exactly"),
    ("B.5", 256, "Go one on"),
    ("B.5", 129, "leading 1"),
    ("B.5", 2049, "FP16's limit"),
    ("B.5", 100, "holds 100 exactly"),
    ("B.5", 513, "from 1 to 2"),
    ("B.6", 0x3F80, "function itself"),
    ("B.6", lambda p: ..., "returned nothing"),
    ("B.6", lambda p: p[:3] >> 16, "one for one"),
    ("B.6", lambda p: p >> 16, "toward zero"),
    ("B.6", lambda p: (p + 0x8000) >> 16, "every tie went up"),
    ("B.6", lambda p: (p + 0x7FFF) >> 16, "every tie went down"),
    ("B.6", lambda p: p, "16 bits"),
    ("B.6", rounds_ties_from_zero_in_half, "except for ties"),
    ("B.6", lambda p: (p + 0xFFFF) >> 16, "of the patterns are off"),
    ("B.6", lambda p: p.nothing, "AttributeError"),
    ("B.7", 1.0, "function itself"),
    ("B.7", lambda pattern, e, m: None, "returned nothing"),
    ("B.7", decoder(leading=False), "subnormal"),
    ("B.7", decoder(shared_power=False), "subnormal"),
    ("B.7", decoder(specials=False), "infinity; you gave"),
    ("B.7", decoder(specials="infinity"), "NaN; you gave inf"),
    ("B.7", decoder(bias=15), "Right for FP16, but not"),
    ("B.7", decoder(bias=16), "subnormal"),
    ("B.7", decoder(signed=False), "sign is not"),
    ("B.8", (2, 5), "row and column"),
    ("B.8", (21, 2), "from the left"),
    ("B.8", (21, 14), "one bit off"),
    ("B.8", (21, 8192), "value of the bit"),
    ("B.8", (21, 5), "exclusive or"),
    ("B.8", (22, 13), "position 0"),
    ("B.8", (3, 13), "intact"),
    ("B.8", 21, "two whole numbers"),
]


@pytest.mark.parametrize(("number", "answer", "feedback"), WRONG)
def test_wrong_answers_get_their_own_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert result.state == "wrong"
    assert re.search(feedback, result.message), result.message


RIGHT = [
    ("B.1", -74),
    ("B.1", torch.tensor(-74)),
    ("B.1", floats.decode("10110110", "int8")),
    ("B.2", floats.decode("1 10011 0110000000", "fp16")),
    ("B.3", "0011111000100000"),
    ("B.3", "0_01111100_0100000"),
    ("B.4", torch.tensor(2.0**-16)),
    ("B.5", 257.0),
    ("B.6", lambda p: floats.encode_array(floats.decode_array(p, "fp32"), "bf16")),
    ("B.6", lambda p: torch.from_numpy((p + 0x7FFF + ((p >> 16) & 1)) >> 16)),
    ("B.7", decoder()),
    ("B.8", [21, torch.tensor(13)]),
]


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_right_answers_pass_in_any_spelling(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result.message
    assert len(result.message) > 20  # a closing remark


@pytest.mark.parametrize("number", [f"B.{n}" for n in range(1, 9)])
def test_solutions_pass(number):
    exercise = exercises.catalog()[number]
    names = {} if exercise.given is None else {"given": exercises.given(number)}
    exec(exercise.solution, names)
    assert exercises.check(number, names["answer"]).passed
    assert len(exercise.hints) >= 2


def test_exactly_one_bit_is_flipped_and_it_is_not_the_largest_weight():
    weights, damaged = exercises.given("B.8")
    changed = (weights.view(torch.int16) ^ damaged.view(torch.int16)).flatten()
    assert changed.count_nonzero() == 1 and changed.long().sum().item().bit_count() == 1
    assert damaged.isfinite().all() and damaged.abs().argmax() == weights.abs().argmax()
