"""Appendix B's exercises: typical wrong answers each get their own feedback."""

import math
import re

import numpy as np
import pytest
import torch

from helpers import floats, quantization
from helpers.course import exercises


def rounds_ties_from_zero_in_half(patterns):
    """Nearest, but ties go up only for even last bits: exactly the wrong ones."""
    return (patterns + 0x8000 - ((patterns >> 16) & 1)) >> 16


def decoder(leading=True, specials=True, bias=None, shared_power=True, signed=True, share=None):
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
        return sign * 2.0**power * (first + mantissa / (share or 2**mantissa_bits))

    return decode


def choice(**changed):
    """The right formats with some exchanged."""
    return {
        "norms": ("fp16", "precision"),
        "activations": ("bf16", "range"),
        "weights": ("fp8_e4m3", "precision"),
        "gradients": ("fp8_e5m2", "range"),
    } | changed


def lloyd(start, rounds=60):
    """Levels that take the mean of their numbers, again and again."""
    numbers, levels = exercises.given("B.8"), np.array(start, dtype=float)
    for _ in range(rounds):
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, numbers)
        levels = np.array([numbers[nearest == i].mean() for i in range(len(levels))])
    return levels


def quantiles(count=16):
    return np.quantile(exercises.given("B.8"), (np.arange(count) + 0.5) / count)


def unsigned_infinity(pattern, exponent_bits, mantissa_bits):
    number = decoder()(pattern, exponent_bits, mantissa_bits)
    return abs(number) if math.isinf(number) else number


def by_conversion(patterns):
    numbers = torch.from_numpy(patterns).to(torch.uint32).view(torch.float32)
    return numbers.bfloat16().view(torch.uint16)


def by_the_rest(patterns):
    """Another algorithm: compare what is cut off with a half."""
    kept, rest = np.divmod(patterns, 2**16)
    return kept + ((rest > 2**15) | ((rest == 2**15) & (kept % 2 == 1)))


NF4 = quantization.four_bit.nf4_code_book().numpy()
FP4 = floats.values("fp4_e2m1") / 6
FP4_AND_ONE = [*FP4[:8], 0.04, *FP4[8:]]  # its sixteenth pattern, a second zero, put to use

WRONG = [
    ("B.1", 22, "first bit"),
    ("B.1", -6, "leading 1"),
    ("B.1", 6, "leading 1"),
    ("B.1", -1.375 * 2**19, "bias"),
    ("B.1", -11, "factor of two"),
    ("B.1", -44, "factor of two"),
    ("B.1", -385 * 16, "1024ths"),
    ("B.1", 3, "Field by field"),
    ("B.1", "1 10011 0110000000", "one number"),
    ("B.1", True, "one number"),
    ("B.2", (512, 512, 448), "exact sums"),
    ("B.2", (512, 512, 512), "A: which two"),
    ("B.2", (257, 512, 512), "A: which two"),
    ("B.2", (258, 512, 512), "A: which two"),
    ("B.2", (256, 256, 512), "B: are there"),
    ("B.2", (256, 511, 512), "B: are there"),
    ("B.2", (256, 512, 448), "C: 448 is the exact sum"),
    ("B.2", (256, 512, 256), "C: by how much"),
    ("B.2", (256, 512, 384), "C: by how much"),
    ("B.2", (256, 512), "three numbers"),
    ("B.2", 256, "three numbers"),
    ("B.2", "B, C, A", "three numbers"),
    ("B.3", 1.0, "function itself"),
    ("B.3", lambda pattern, e, m: None, "returned nothing"),
    ("B.3", decoder(leading=False), "subnormal"),
    ("B.3", decoder(shared_power=False), "subnormal"),
    ("B.3", decoder(specials=False), "infinity; you gave"),
    ("B.3", decoder(specials="infinity"), "NaN; you gave inf"),
    ("B.3", decoder(bias=15), "Right for FP16, but not"),
    ("B.3", decoder(share=1024), "Right for FP16, but not"),
    ("B.3", decoder(bias=15, share=1024), "fit FP16 alone"),
    ("B.3", decoder(bias=16), "subnormal"),
    ("B.3", decoder(signed=False), "sign is not"),
    ("B.3", unsigned_infinity, "sign is not"),
    ("B.3", decoder(bias=15, share=1024, shared_power=False, specials="infinity"), "subnormal"),
    ("B.3", lambda pattern: pattern, "TypeError"),
    ("B.4", (9, 6), "wrong order"),
    ("B.4", (6, 10), "gap after 1 .* half"),
    ("B.4", (6, 8), "gap after 1 .* half"),
    ("B.4", (5, 10), "half"),
    ("B.4", (8, 7), "flat stretch gives"),
    ("B.4", (5, 9), "shorter"),
    ("B.4", (7, 9), "longer"),
    ("B.4", (8, 9), "longer"),
    ("B.4", (6, 23), "flat stretch gives"),
    ("B.4", (6, 9.5), "two whole numbers"),
    ("B.4", 16, "two whole numbers"),
    ("B.4", "bf16", "two whole numbers"),
    ("B.5", 0x3F80, "function itself"),
    ("B.5", lambda p: ..., "returned nothing"),
    ("B.5", lambda p: p[:3] >> 16, "one for one"),
    ("B.5", lambda p: p >> 16, "toward zero"),
    ("B.5", lambda p: (p + 0x8000) >> 16, "every tie went up"),
    ("B.5", lambda p: (p + 0x7FFF) >> 16, "every tie went down"),
    ("B.5", lambda p: p, "16 bits"),
    ("B.5", rounds_ties_from_zero_in_half, "except for ties"),
    ("B.5", lambda p: (p + 0xFFFF) >> 16, "of the patterns are off"),
    ("B.5", lambda p: p.nothing, "AttributeError"),
    ("B.5", lambda p: floats.encode_array(floats.decode_array(p, "fp32"), "bf16"), "a library"),
    ("B.5", by_conversion, "a library"),
    ("B.6", "fp16", "dictionary"),
    ("B.6", {"norms": ("fp16", "precision")}, "dictionary"),
    ("B.6", choice(norms=("bf16", "range")), "norms: bf16 turns"),
    ("B.6", choice(norms=("fp32", "precision")), "fewer bits"),
    ("B.6", choice(norms=("fp16", "range")), "'range' or 'precision'"),
    ("B.6", choice(norms="fp16"), "give two things"),
    ("B.6", choice(gradients=["fp8_e5m2"]), "give two things"),
    ("B.6", choice(gradients=()), "give two things"),
    ("B.6", choice(norms=("float16", "precision")), "is none of"),
    (
        "B.6",
        choice(activations=("fp16", "precision")),
        "activations: fp16 turns .* into -?inf: too large",
    ),
    ("B.6", choice(activations=("fp32", "range")), "fewer bits"),
    ("B.6", choice(weights=("int8", "precision")), "weights: int8 turns .* into -?0,"),
    ("B.6", choice(weights=("uint8", "precision")), "weights: uint8 turns"),
    ("B.6", choice(weights=("fp8_e5m2", "range")), "weights: fp8_e5m2 turns"),
    ("B.6", choice(weights=("fp4_e2m1", "range")), "weights: fp4_e2m1 turns"),
    ("B.6", choice(weights=("fp16", "precision")), "fewer bits"),
    ("B.6", choice(gradients=("fp8_e4m3", "range")), "gradients: fp8_e4m3 turns"),
    ("B.6", choice(gradients=("bf16", "range")), "fewer bits"),
    ("B.6", choice(gradients=("fp8_e5m2", "precision")), "'range' or 'precision'"),
    ("B.7", (2, 5), "Row and column"),
    ("B.7", (21, 2), "from the right"),
    ("B.7", (21, 14), "one bit off"),
    ("B.7", (21, 8192), "the bit's value"),
    ("B.7", (21, 5), "exclusive or"),
    ("B.7", (22, 13), "position 0"),
    ("B.7", (3, 13), "intact"),
    ("B.7", 21, "two whole numbers"),
    ("B.7", (21.5, 13), "two whole numbers"),
    ("B.8", FP4, "use only 15 of 16"),
    ("B.8", quantization.four_bit.fp4_code_book(), "Move each level|use only"),
    ("B.8", NF4, "88% is wanted"),
    ("B.8", np.linspace(-1, 1, 16), "Evenly spaced"),
    ("B.8", np.linspace(-1, 1, 17), "tell 16 levels apart"),
    ("B.8", exercises.given("B.8"), "tell 16 levels apart"),
    ("B.8", quantiles(), "large ones now pay"),
    ("B.8", lloyd(np.linspace(-1, 1, 12)), "only 12 of 16"),
    ("B.8", floats.values("fp4_e2m1"), "between -1 and 1"),
    ("B.8", np.linspace(-0.5, 0.5, 16), "Evenly spaced"),
    ("B.8", [0.0] * 16, "only 1 of 16"),
    ("B.8", [math.nan] * 16, "finite"),
    ("B.8", 0.5, "finite"),
    ("B.8", "nf4", "finite"),
]


@pytest.mark.parametrize(("number", "answer", "feedback"), WRONG)
def test_wrong_answers_get_their_own_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert result.state == "wrong"
    assert re.search(feedback, result.message), result.message


def by_torch(pattern, exponent_bits, mantissa_bits):
    """Another algorithm: the pattern is moved into the fields of a float64."""
    size = exponent_bits + mantissa_bits
    magnitude = pattern & (2**size - 1)
    if magnitude >> mantissa_bits == 2**exponent_bits - 1:
        number = math.nan if magnitude % 2**mantissa_bits else math.inf
    else:
        wide = np.array(magnitude << (52 - mantissa_bits), dtype=np.int64).view(np.float64)
        number = float(wide) * 2.0 ** (1023 - (2 ** (exponent_bits - 1) - 1))
    return torch.tensor(-number if pattern >> size else number)


RIGHT = [
    ("B.1", -22),
    ("B.1", torch.tensor(-22.0)),
    ("B.1", floats.decode("1 10011 0110000000", "fp16")),
    ("B.2", (256, 512, 512)),
    ("B.2", [256.0, np.float32(512), torch.tensor(512)]),
    ("B.2", torch.tensor([256, 512, 512], dtype=torch.bfloat16)),
    ("B.3", decoder()),
    ("B.3", by_torch),
    ("B.4", (6, 9)),
    ("B.4", np.array([6, 9])),
    ("B.4", torch.tensor([6.0, 9.0])),
    ("B.5", lambda p: (p + 0x7FFF + ((p >> 16) & 1)) >> 16),
    ("B.5", by_the_rest),
    ("B.5", lambda p: torch.from_numpy((p + 0x7FFF + ((p >> 16) & 1)) >> 16)),
    ("B.6", choice()),
    ("B.6", choice(norms=["fp16", "precision"])),
    ("B.7", [21, torch.tensor(13)]),
    ("B.7", np.array([21, 13])),
    ("B.8", lloyd(np.linspace(-1, 1, 16))),
    ("B.8", lloyd(FP4_AND_ONE)[::-1].tolist()),
    ("B.8", torch.from_numpy(lloyd(NF4))),
]


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_right_answers_pass_in_any_spelling(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result.message
    assert len(result.message) > 20  # a closing remark


@pytest.mark.parametrize("number", [f"B.{n}" for n in range(1, 9)])
def test_every_exercise_meets_at_least_eight_wrong_answers(number):
    assert sum(wrong == number for wrong, *_ in WRONG) >= 8


@pytest.mark.parametrize("number", [f"B.{n}" for n in range(1, 9)])
def test_solutions_pass(number):
    exercise = exercises.catalog()[number]
    names = {} if exercise.given is None else {"given": exercises.given(number)}
    exec(exercise.solution, names)
    assert exercises.check(number, names["answer"]).passed
    assert len(exercise.hints) >= 2


def test_exactly_one_bit_is_flipped_and_it_is_not_the_largest_weight():
    weights, damaged = exercises.given("B.7")
    changed = (weights.view(torch.int16) ^ damaged.view(torch.int16)).flatten()
    assert changed.count_nonzero() == 1 and changed.long().sum().item().bit_count() == 1
    assert damaged.isfinite().all() and damaged.abs().argmax() == weights.abs().argmax()
