"""Appendix B: integers, floating-point fields, rounding, formats, and a code book."""

import math

import numpy as np
import torch

from helpers import floats
from helpers.course.exercises import Exercise, Wrong, one_number


def _two_whole_numbers(answer, names):
    try:
        first, second = map(one_number, answer)
        if first % 1 or second % 1:
            raise ValueError
    except (TypeError, ValueError, Wrong):
        raise Wrong(f"Give two whole numbers: `{names}`.") from None
    return int(first), int(second)


def _callable(answer, name):
    if not callable(answer):
        raise Wrong(f"Give the function itself: `answer = {name}`, without parentheses.")
    return answer


# ── B.1 ──────────────────────────────────────────────────────────────────────────────────
_MISREAD = {
    22: "The size is right; look at the first bit again.",
    6: "You left out the leading 1 that every normal number has.",
    1.375 * 2**19: "You used the exponent as it is stored, without taking off the bias.",
    11: "Off by a factor of two: FP16's bias is 15, not 16.",
    44: "Off by a factor of two: FP16's bias is 15, not 14.",
    385 * 16: "The mantissa counts 1024ths: its first digit is worth a half.",
}


def _check_fp16_by_hand(answer):
    number = one_number(answer)
    if number == -22:
        return "The three fields, one sentence each, and you can read any format there is."
    other = "Field by field: which power do `10011` and the bias make, and how many 1024ths follow?"
    raise Wrong(_MISREAD.get(abs(number), other))


# ── B.2 ──────────────────────────────────────────────────────────────────────────────────
def _check_three_sums(answer):
    try:
        first, second, third = given = tuple(one_number(number) for number in answer)
    except (TypeError, ValueError, Wrong):
        raise Wrong("Give three numbers, such as `(1, 2, 3)`: the sums A, B and C.") from None
    if given == (256, 512, 512):
        return (
            "One sum stands still, one is exact, and one grows too fast: 259 is half-way between "
            "258 and 260, and 260 has the even mantissa. So each 3 counts as 4."
        )
    if given == (512, 512, 448):
        raise Wrong("Those are the exact sums. Round to bfloat16 after every single addition.")
    if first != 256:
        raise Wrong("A: which two bfloat16 numbers lie around 257, and which one is even?")
    if second != 512:
        raise Wrong("B: are there whole numbers up to 256 that bfloat16 cannot hold?")
    if third == 448:
        raise Wrong(
            "C: 448 is the exact sum. The first step gives 259, which BF16 cannot hold: round it "
            "before you add the next 3."
        )
    raise Wrong("C: by how much does each addition of 3 move the sum? Which even number is 259?")


# ── B.3 ──────────────────────────────────────────────────────────────────────────────────
_SIZES = ((5, 10), (3, 2), (2, 3), (4, 3), (8, 7), (3, 6))  # FP16 first: the familiar one


def _check_any_format(answer):
    function = _callable(answer, "decode")
    if function(1, 5, 10) in (None, ...):
        raise Wrong("The function returned nothing yet.")
    for exponent_bits, mantissa_bits in _SIZES:
        form = floats.FloatFormat(
            "any", exponent_bits, mantissa_bits, reserved=2**mantissa_bits, nan=0
        )
        step = max(1, 2**form.bits // 997)  # a prime number of steps, so all fields vary
        patterns = sorted({*range(0, 2**form.bits, step), 1, form.largest, form.infinity})
        for pattern in patterns:
            right = float(form.decode(np.array(pattern)))
            given = float(function(pattern, exponent_bits, mantissa_bits))
            if given != right and not (math.isnan(given) and math.isnan(right)):
                raise Wrong(_what_is_off(form, pattern, given, right))
    return "It reads FP64, BF16 and E5M2; only E4M3 and FP4 have another rule for all ones."


def _what_is_off(form, pattern, given, right):
    sizes = f"{form.fields['exponent']} exponent and {form.mantissa_bits} mantissa bits"
    where = f"pattern {pattern:0{form.bits}b} ({sizes})"
    exponent = (pattern >> form.mantissa_bits) & (2 ** form.fields["exponent"] - 1)
    if given == -right:
        return f"{where}: the size is right, the sign is not."
    if not math.isfinite(right):
        meant = "not zero is NaN" if math.isnan(right) else "zero is infinity"
        return f"{where}: exponent all ones and mantissa {meant}; you gave {given}."
    if form.fields["exponent"] != 5:
        return f"Right for FP16, but not for {where}. Which numbers in it fit FP16 alone?"
    if exponent == 0:
        return f"{where} is subnormal: leading 0, and the smallest normal power, not {given}."
    return f"{where} is a normal number, and you gave {given}. Check bias and leading 1."


# ── B.4 ──────────────────────────────────────────────────────────────────────────────────
_HIDDEN = floats.FloatFormat("hidden", 6, 9, reserved=2**9, nan=None)  # IBM's DLFloat has these


def _worst_errors():
    """Sizes (powers of two), and the worst relative error of the hidden format at each."""
    sizes = np.ldexp(1.0, np.arange(-45, 32)).astype(np.float64)
    patterns = _HIDDEN.encode(sizes)
    gaps = _HIDDEN.decode(patterns + 1) - _HIDDEN.decode(patterns)
    seen = gaps / 2 / sizes < 1
    return sizes[seen], (gaps / 2 / sizes)[seen]


def _check_hidden_format(answer):
    exponent, mantissa = given = _two_whole_numbers(answer, "(exponent bits, mantissa bits)")
    if given == (6, 9):
        return "Between FP16 and BF16: the fields of IBM's DLFloat (Agrawal et al., 2019)."
    if given == (9, 6):
        raise Wrong("The right numbers in the wrong order: exponent first, then mantissa.")
    if mantissa in (8, 10):
        raise Wrong(
            "One mantissa bit off: the gap after 1 is 2^-mantissa, and the worst error is half "
            "of that."
        )
    if mantissa != 9:
        raise Wrong("The height of the flat stretch gives the mantissa bits. Which power of 2?")
    reach = "shorter" if exponent < 6 else "longer"
    raise Wrong(f"Mantissa right. With {exponent} exponent bits the flat stretch is {reach}.")


# ── B.5 ──────────────────────────────────────────────────────────────────────────────────
def _check_to_bf16(answer):
    function = _callable(answer, "to_bf16")
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2**32, 20_000)
    patterns[:5_000] = (patterns[:5_000] & ~0xFFFF) | 0x8000  # ties, where even must win
    patterns = patterns[(patterns & 0x7F800000) != 0x7F800000]  # finite ones
    given = function(patterns.copy())
    if given is None or given is ...:
        raise Wrong("The function returned nothing yet.")
    given = np.asarray(given)
    if given.shape != patterns.shape:
        raise Wrong(f"From {patterns.shape} patterns came {given.shape}: one for one, please.")
    right = floats.encode_array(floats.decode_array(patterns, "fp32"), "bf16")
    if np.array_equal(given, right):
        used = getattr(getattr(function, "__code__", None), "co_names", ())
        if any(name.startswith(("encode", "decode", "float", "bfloat")) for name in used):
            raise Wrong("Right, but a library rounds for you. Three lines of `>>`, `&`, `+` do it.")
        return "This is what processors do, and a carry runs into the exponent by itself."
    if np.array_equal(given, patterns >> 16):
        raise Wrong("That cuts the lower half off, which always rounds toward zero.")
    if np.array_equal(given, (patterns + 0x8000) >> 16):
        raise Wrong("Nearest is right, but every tie went up. The last bit kept decides.")
    if np.array_equal(given, (patterns + 0x7FFF) >> 16):
        raise Wrong("Nearest is right, but every tie went down. The last bit kept decides.")
    if (given > 0xFFFF).any() or (given < 0).any():
        raise Wrong("Some results do not fit into 16 bits: a shift is missing, or a sign.")
    ties = (patterns & 0xFFFF) == 0x8000
    if np.array_equal(given[~ties], right[~ties]):
        raise Wrong("All is well except for ties: there, the result has to be even.")
    first = patterns[given != right][0]
    raise Wrong(f"{(given != right).mean():.0%} of the patterns are off, such as {first:#010x}.")


# ── B.6 ──────────────────────────────────────────────────────────────────────────────────
# name: smallest size, largest size, worst relative error allowed, format, what rules out its rival
_NEEDS = {
    "norms": (0.25, 40.0, 1e-3, "fp16", "precision"),
    "activations": (1e-3, 1e5, 5e-3, "bf16", "range"),
    "weights": (0.02, 4.0, 0.07, "fp8_e4m3", "precision"),
    "gradients": (1e-4, 2000.0, 0.13, "fp8_e5m2", "range"),
}


def _tensors():
    """{name: (numbers of both signs, worst relative error allowed)}."""
    generator, tensors = np.random.default_rng(7), {}
    for name, (low, high, allowed, *_) in _NEEDS.items():
        sizes = np.geomspace(low, high, 4_000)
        tensors[name] = torch.tensor(sizes * generator.choice([-1.0, 1.0], 4_000)), allowed
    return tensors


def _check_choice(answer):
    if not isinstance(answer, dict) or set(answer) != set(_NEEDS):
        raise Wrong(f"Give a dictionary with the keys {', '.join(_NEEDS)}.")
    for name, (numbers, allowed) in _tensors().items():
        given = list(answer[name]) if isinstance(answer[name], tuple | list) else [answer[name]]
        if len(given) != 2:
            raise Wrong(f"{name}: give two things, a format and 'range' or 'precision'.")
        kind, why = given
        if kind not in floats.FORMATS:
            raise Wrong(f"{name}: {kind!r} is none of {', '.join(floats.FORMATS)}.")
        exact, (*_, best, reason) = numbers.numpy(), _NEEDS[name]
        with np.errstate(invalid="ignore"):
            read = floats.decode_array(floats.encode_array(exact, kind), kind)
            error = np.nan_to_num(abs(read - exact) / abs(exact), posinf=np.inf)
        worst = int(error.argmax())
        if error[worst] > allowed:
            off = f", which is off by {error[worst]:.1%} of it; {allowed:.1%} is allowed."
            if np.isinf(read[worst]):
                off = ": too large for it."
            raise Wrong(f"{name}: {kind} turns {exact[worst]:.4g} into {read[worst]:.4g}{off}")
        if kind != best:
            raise Wrong(f"{name}: {kind} is good enough, but a format with fewer bits is, too.")
        if why != reason:
            raise Wrong(
                f"{name}: {kind} is right. What would the other float format of the same "
                "width lack here, 'range' or 'precision'?"
            )
    return "Range first: what overflows is lost for good. With the bits that are left, precision."


# ── B.7 ──────────────────────────────────────────────────────────────────────────────────
_COLUMNS, _POSITION, _BIT = 8, 21, 13
_MISSED = {
    divmod(_POSITION, _COLUMNS): "Row and column? Flatten the tensor first; then find the bit.",
    (_POSITION, 15 - _BIT): "The right weight, but the bit is counted from the right, from 0.",
    (_POSITION, _BIT + 1): "The right weight, one bit off: the rightmost bit has number 0.",
    (_POSITION, 1 << _BIT): "The right weight, and the bit's value. Which place is it?",
    (_POSITION + 1, _BIT): "Off by one: the first weight has position 0.",
}


def _damage():
    """Weights as a small layer has them, and a copy with one bit flipped."""
    generator = torch.Generator().manual_seed(8)
    weights = (torch.randn(4, _COLUMNS, generator=generator) * 0.05).half()
    damaged = weights.clone()
    damaged.view(torch.int16).view(-1)[_POSITION] ^= 1 << _BIT
    return weights, damaged


def _check_flipped_bit(answer):
    given = _two_whole_numbers(answer, "(position, bit)")
    if given == (_POSITION, _BIT):
        return "An exponent bit, so the weight all but vanished. This is what checksums are for."
    if given[0] != _POSITION and given not in _MISSED:
        raise Wrong("That weight is intact. Which one differs between the two tensors?")
    other = "The right weight. Compare the two patterns with `^`, exclusive or."
    raise Wrong(_MISSED.get(given, other))


# ── B.8 ──────────────────────────────────────────────────────────────────────────────────
_SHARE = 0.88  # of FP4's error; evenly spaced levels reach 1.02, NF4's 0.89, Lloyd's 0.85


def _blocks(seed=9):
    """Peaked, heavy-tailed numbers in blocks of 32, each divided by its largest size."""
    blocks = np.random.default_rng(seed).laplace(size=(4_000, 32))
    return (blocks / np.abs(blocks).max(axis=1, keepdims=True)).ravel()


def _error(levels, numbers):
    levels = np.sort(levels)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, numbers)]
    return float(np.sqrt(((numbers - nearest) ** 2).mean()))


def _check_code_book(answer):
    try:
        levels = np.asarray(answer, dtype=float).ravel()
    except (TypeError, ValueError):
        levels = np.array(math.nan)
    if levels.size < 2 or not np.isfinite(levels).all():
        raise Wrong("Give the levels: a list or an array of up to 16 finite numbers.")
    if len(levels) > 16:
        raise Wrong(f"Four bits tell 16 levels apart; you gave {len(levels)}.")
    numbers = _blocks(seed=10)  # not the ones the reader has
    share = _error(levels, numbers) / _error(floats.values("fp4_e2m1") / 6, numbers)
    said = f"On fresh numbers your error is {share:.1%} of FP4's"
    if share <= _SHARE:
        return f"{said}. What you gain depends on the numbers: this book is made for these."
    if np.abs(levels).max() > 1.5:
        raise Wrong(f"{said}. All numbers lie between -1 and 1; do your levels?")
    if len(np.unique(levels)) < 16:
        raise Wrong(f"{said}, and you use only {len(np.unique(levels))} of 16 levels.")
    if np.ptp(np.diff(np.sort(levels))) < 1e-3:
        raise Wrong(f"{said}. Evenly spaced levels ignore where the numbers are.")
    if np.abs(levels).max() < 0.85:
        raise Wrong(f"{said}. Most numbers are small, but the large ones now pay too much.")
    raise Wrong(f"{said}; {_SHARE:.0%} is wanted. Move each level to the mean of its numbers.")


EXERCISES = [
    Exercise(
        "B.1",
        "FP16 by hand",
        _check_fp16_by_hand,
        hints=(
            "`10011` is 19 as an integer, and FP16's bias is 15.",
            "`0110000000` is 384 of 1024 parts; put a 1 in front of the point.",
        ),
        solution="answer = -(2.0 ** (19 - 15)) * (1 + 384 / 1024)",
    ),
    Exercise(
        "B.2",
        "Three sums in bfloat16",
        _check_three_sums,
        hints=(
            "bfloat16 has eight binary digits, the leading 1 included: how far apart are its "
            "numbers between 256 and 512?",
            "Ties go to the even mantissa. 257 is between 256 and 258; 259 between 258 and 260. "
            "Counted in steps of two, these are 128, 129 and 130.",
        ),
        solution="""\
import torch

answer = []
for row in [256] + [1] * 256, [1] * 256 + [256], [256] + [3] * 64:
    total = torch.tensor(0.0, dtype=torch.bfloat16)
    for number in row:
        total += number
    answer.append(total.item())
""",
    ),
    Exercise(
        "B.3",
        "Find the bugs",
        _check_any_format,
        hints=(
            "There are four. Two are numbers that fit FP16 only; what do they depend on?",
            "The other two are in the special cases: what is the power of a subnormal number, "
            "and what does the exponent of all ones mean when the mantissa is not zero?",
        ),
        solution="""\
import math


def decode(pattern, exponent_bits, mantissa_bits):
    mantissa = pattern & (2**mantissa_bits - 1)
    exponent = (pattern >> mantissa_bits) & (2**exponent_bits - 1)
    sign = -1 if pattern >> (exponent_bits + mantissa_bits) else 1
    if exponent == 2**exponent_bits - 1:
        return math.nan if mantissa else sign * math.inf
    leading = 1 if exponent else 0
    power = max(exponent, 1) - (2 ** (exponent_bits - 1) - 1)
    return sign * 2.0**power * (leading + mantissa / 2**mantissa_bits)


answer = decode
""",
    ),
    Exercise(
        "B.4",
        "A format from its errors",
        _check_hidden_format,
        hints=(
            "On the flat stretch the worst error is half a gap: 2^-(mantissa bits + 1).",
            "The line turns up below the smallest normal number, 2^(1 - bias), and the bias is "
            "2^(exponent bits - 1) - 1.",
        ),
        solution="""\
import math

sizes, errors = given
mantissa_bits = -round(math.log2(errors.min())) - 1
smallest_power = round(math.log2(sizes[errors == errors.min()].min()))
answer = (round(math.log2(2 - smallest_power)) + 1, mantissa_bits)
""",
        given=_worst_errors,
    ),
    Exercise(
        "B.5",
        "Round FP32 to BF16",
        _check_to_bf16,
        hints=(
            "`patterns >> 16` keeps the upper half. Adding just under a half before the "
            "shift, 0x7FFF, rounds to nearest, with ties going down.",
            "A tie must go up when the last bit kept, `(patterns >> 16) & 1`, is odd. Add "
            "that bit as well.",
        ),
        solution="""\
def to_bf16(patterns):
    last_bit_kept = (patterns >> 16) & 1
    just_under_half = 0x7FFF
    return (patterns + just_under_half + last_bit_kept) >> 16


answer = to_bf16
""",
    ),
    Exercise(
        "B.6",
        "Choose a format",
        _check_choice,
        hints=(
            "Half of the gap after 1 is a format's worst relative error; `limits` has that gap, "
            "and the largest and smallest normal number.",
            "Two of the four need 16 bits. Look first at whether the range suffices.",
        ),
        solution="""\
answer = {"norms": ("fp16", "precision"), "activations": ("bf16", "range")}
answer |= {"weights": ("fp8_e4m3", "precision"), "gradients": ("fp8_e5m2", "range")}
""",
        given=_tensors,
    ),
    Exercise(
        "B.7",
        "A flipped bit",
        _check_flipped_bit,
        hints=(
            "`tensor.view(torch.int16)` shows the bits; `a ^ b` is zero where they agree.",
            "What is left after `^` is a single bit: a power of two. Which one?",
        ),
        solution="""\
import torch

weights, damaged = given
difference = (weights.view(torch.int16) ^ damaged.view(torch.int16)).flatten()
position = difference.nonzero().item()
answer = (position, difference[position].item().bit_length() - 1)
""",
        given=_damage,
    ),
    Exercise(
        "B.8",
        "A better code book",
        _check_code_book,
        hints=(
            "For given levels, each number goes to its nearest one. For given groups of numbers, "
            "which level is best for a group? Its mean. Take turns.",
            "Lloyd's algorithm: start from `np.linspace(-1, 1, 16)`; assign, take means, repeat "
            "some fifty times. An empty group keeps its level.",
        ),
        solution="""\
import numpy as np

answer = np.linspace(-1, 1, 16)
for _ in range(100):
    nearest = np.searchsorted((answer[1:] + answer[:-1]) / 2, given)
    for i in set(nearest):  # an empty group keeps its level
        answer[i] = given[nearest == i].mean()
""",
        given=_blocks,
    ),
]
