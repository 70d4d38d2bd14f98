"""Appendix B: integers, floating-point fields, rounding, and a flipped bit."""

import math

import numpy as np
import torch

from helpers import floats
from helpers.course.exercises import Exercise, Wrong, near, one_number


def _callable(answer, name):
    if not callable(answer):
        raise Wrong(f"Give the function itself: `answer = {name}`, without parentheses.")
    return answer


# ── B.1 ──────────────────────────────────────────────────────────────────────────────────
def _check_signed_byte(answer):
    number = one_number(answer)
    if number == -74:
        return (
            "To negate a two's complement number, flip every bit and add one: that turns "
            "`10110110` into `01001010`, which is 74."
        )
    if number == 182:
        raise Wrong("That is the unsigned reading. In int8 the highest place is negative.")
    if number == -54:
        raise Wrong(
            "You took the first bit for a minus sign in front of the other seven. In two's "
            "complement it is a place like the others, with a negative value."
        )
    if number in (-73, 73):
        raise Wrong("Off by one: flipping all bits is only the first half of negating.")
    if number == 74:
        raise Wrong("The size is right. Is a number whose first bit is on positive?")
    raise Wrong("Write the eight place values below the bits, and mind the first one.")


# ── B.2 ──────────────────────────────────────────────────────────────────────────────────
def _check_fp16_by_hand(answer):
    number = one_number(answer)
    fraction, power = 0b0110000000 / 1024, 0b10011 - 15
    if number == -(1 + fraction) * 2**power:
        return "The three fields, one sentence each, and you can read any format there is."
    if number == (1 + fraction) * 2**power:
        raise Wrong("The size is right; look at the first bit again.")
    if abs(number) == fraction * 2**power:
        raise Wrong("You left out the leading 1 that every normal number has.")
    if abs(number) == (1 + fraction) * 2.0 ** (power + 15):
        raise Wrong("You used the exponent as it is stored, without taking off the bias.")
    if abs(number) in (
        (1 + fraction) * 2 ** (power + 1),
        (1 + fraction) * 2 ** (power - 1),
    ):
        raise Wrong("Off by a factor of two: FP16's bias is 15, not 16 or 14.")
    if abs(number) == (1 + 0b0110000000) * 2**power:
        raise Wrong("The mantissa counts 1024ths: its first digit is worth a half.")
    raise Wrong(
        "Take the fields one by one: which power of two do `10011` and the bias make, and "
        "how many 1024ths is `0110000000`?"
    )


# ── B.3 ──────────────────────────────────────────────────────────────────────────────────
def _check_spell_bf16(answer):
    if not isinstance(answer, str):
        raise Wrong('Give the bits as text, such as "0 01111111 0000000".')
    digits = answer.replace(" ", "").replace("_", "")
    if digits and set(digits) <= {"0", "1"} and digits == floats.encode(0.15625, "fp16").bits:
        raise Wrong("That is right for FP16. BF16 has eight exponent bits and a bias of 127.")
    if len(digits) != 16 or set(digits) - {"0", "1"}:
        raise Wrong(f"BF16 has 16 zeros and ones (1 + 8 + 7); this has {len(digits)} digits.")
    given, right = floats.decode(digits, "bf16"), floats.encode(0.15625, "bf16")
    if given.pattern == right.pattern:
        return "FP32 spells it the same way, with sixteen more zeros: BF16 is its upper half."
    if given.sign != right.sign:
        raise Wrong("The sign bit is off: 0 is plus.")
    if given.mantissa == right.mantissa:
        raise Wrong(f"The mantissa is right, but your exponent says 2^({given.exponent} - 127).")
    if given.exponent == right.exponent:
        raise Wrong(f"The exponent is right, but your mantissa says 1 + {given.mantissa}/128.")
    raise Wrong("Find the power of two first: 1.25 times which one is 0.15625?")


# ── B.4 ──────────────────────────────────────────────────────────────────────────────────
def _check_smallest(answer):
    number = one_number(answer)
    if number == 2.0**-16:
        return "Pattern 0 00000 01: the first step up from zero, and it has one digit only."
    if number == 2.0**-14:
        raise Wrong("That is the smallest normal number. What lies between it and zero?")
    if number == 2.0**-15:
        raise Wrong(
            "The bias is 15, but an exponent field of zero shares its power with a field "
            "of one; and the mantissa has two bits."
        )
    if number in (2.0**-17, 2.0**-18):
        raise Wrong("Too small: an exponent field of zero stands for 2^(1 - bias).")
    if number == 2.0**-9:
        raise Wrong("That is E4M3's smallest. E5M2 has one more exponent bit.")
    if near(number, 2.0**-16, 1e-3):
        raise Wrong("Nearly: a rounded value. Give it exactly, as a power of two.")
    if number <= 0:
        raise Wrong("Positive, please: greater than zero.")
    raise Wrong("Which pattern comes right after zero? Decode that one.")


# ── B.5 ──────────────────────────────────────────────────────────────────────────────────
def _check_counting(answer):
    number = one_number(answer)
    if number == 257:
        return (
            "Seven mantissa bits and the leading 1 make eight digits, enough for every "
            "whole number up to 2^8. From there on, only every second one has a pattern."
        )
    if number == 256:
        raise Wrong("256 is a power of two, so a mantissa of zero spells it. Go one on.")
    if number == 129:
        raise Wrong("Count the leading 1 as a digit too: there are eight, not seven.")
    if number == 2049:
        raise Wrong("That is FP16's limit. BF16 has fewer mantissa bits.")
    if number < 256 and number == int(number) and number > 0:
        raise Wrong(f"BF16 holds {number:.0f} exactly; `floats.encode` will show you.")
    raise Wrong("Where does the gap between neighbors in BF16 grow from 1 to 2?")


# ── B.6 ──────────────────────────────────────────────────────────────────────────────────
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
        return (
            "This is what processors do: add just under a half, and one more if the last "
            "bit kept is odd. A carry runs into the exponent by itself."
        )
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
    wrong = int(np.flatnonzero(given != right)[0])
    raise Wrong(
        f"{(given != right).mean():.0%} of the patterns are off, for instance "
        f"{patterns[wrong]:#010x}. How far is it from its two neighbors?"
    )


# ── B.7 ──────────────────────────────────────────────────────────────────────────────────
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
    return (
        "With sizes as parameters this reads FP64, FP16, BF16, E5M2 and whatever comes "
        "next; only E4M3 and FP4 break the rule for the exponent of all ones."
    )


def _what_is_off(form, pattern, given, right):
    sizes = f"{form.fields['exponent']} exponent and {form.mantissa_bits} mantissa bits"
    where = f"pattern {pattern:0{form.bits}b} ({sizes})"
    exponent = (pattern >> form.mantissa_bits) & (2 ** form.fields["exponent"] - 1)
    if math.isnan(right):
        return f"{where}: exponent all ones and mantissa not zero is NaN; you gave {given}."
    if math.isinf(right):
        return f"{where}: exponent all ones and mantissa zero is infinity; you gave {given}."
    if given == -right:
        return f"{where}: the size is right, the sign is not."
    if form.fields["exponent"] != 5:
        return (
            f"Right for FP16, but not for {where}. Do the bias and the mantissa's share "
            "follow from the sizes?"
        )
    if exponent == 0:
        return (
            f"{where} is subnormal: leading 0, and the power of the smallest normal "
            f"numbers. You gave {given}."
        )
    return f"{where} is a normal number, and you gave {given}. Check bias and leading 1."


# ── B.8 ──────────────────────────────────────────────────────────────────────────────────
_COLUMNS, _POSITION, _BIT = 8, 21, 13


def _damage():
    """Weights as a small layer has them, and a copy with one bit flipped."""
    generator = torch.Generator().manual_seed(8)
    weights = (torch.randn(4, _COLUMNS, generator=generator) * 0.05).half()
    damaged = weights.clone()
    damaged.view(torch.int16).view(-1)[_POSITION] ^= 1 << _BIT
    return weights, damaged


def _check_flipped_bit(answer):
    try:
        position, bit = (int(number) for number in answer)
    except (TypeError, ValueError):
        raise Wrong("Give two whole numbers: `(position, bit)`.") from None
    if (position, bit) == (_POSITION, _BIT):
        return (
            "An exponent bit, so the weight all but vanished; a mantissa bit would have "
            "passed for noise. This is why checkpoints come with checksums."
        )
    if (position, bit) == divmod(_POSITION, _COLUMNS):
        raise Wrong("That is row and column. Flatten the tensor first; then find the bit.")
    if position == _POSITION and bit == 15 - _BIT:
        raise Wrong("The right weight. You counted the bit from the left; count from the right.")
    if position == _POSITION and bit in (_BIT - 1, _BIT + 1):
        raise Wrong("The right weight, one bit off. The rightmost bit has number 0.")
    if position == _POSITION and bit == 1 << _BIT:
        raise Wrong("The right weight. You gave the value of the bit; which place is it?")
    if position == _POSITION:
        raise Wrong("The right weight. Compare the two patterns with `^`, exclusive or.")
    if position == _POSITION + 1:
        raise Wrong("Off by one: the first weight has position 0.")
    raise Wrong("That weight is intact. Which one differs between the two tensors?")


EXERCISES = [
    Exercise(
        "B.1",
        "A signed byte",
        _check_signed_byte,
        hints=(
            "The places are worth -128, 64, 32, 16, 8, 4, 2 and 1.",
            "Start at -128 and add the places of the other bits that are on.",
        ),
        solution="answer = -128 + 32 + 16 + 4 + 2",
    ),
    Exercise(
        "B.2",
        "FP16 by hand",
        _check_fp16_by_hand,
        hints=(
            "`10011` is 19 as an integer, and FP16's bias is 15.",
            "`0110000000` is 384 of 1024 parts; put a 1 in front of the point.",
        ),
        solution="answer = -(2.0 ** (19 - 15)) * (1 + 384 / 1024)",
    ),
    Exercise(
        "B.3",
        "The other direction",
        _check_spell_bf16,
        hints=(
            "0.15625 is 1.25 × 2^-3. Which integer, less 127, is -3?",
            "1.25 is 1 + 1/4, and the mantissa's places are 1/2, 1/4, 1/8 and so on.",
        ),
        solution='answer = "0 01111100 0100000"',
    ),
    Exercise(
        "B.4",
        "The smallest of all",
        _check_smallest,
        hints=(
            "It is subnormal: exponent field 0, smallest mantissa above zero.",
            "The mantissa has two bits, so it counts quarters, times 2^(1 - 15).",
        ),
        solution="answer = 2.0 ** (1 - 15) * 1 / 4",
    ),
    Exercise(
        "B.5",
        "Counting in BF16",
        _check_counting,
        hints=(
            "How many binary digits can a BF16 number have, the leading 1 included?",
            "Between which powers of two is the gap between neighbors 2?",
        ),
        solution="""\
import torch

counted = torch.arange(1, 1000)
answer = counted[counted.bfloat16().long() != counted][0]
""",
    ),
    Exercise(
        "B.6",
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
        "B.7",
        "Any format at all",
        _check_any_format,
        hints=(
            "Cut the pattern into three fields with `>>` and `&`; the bias is "
            "`2 ** (exponent_bits - 1) - 1`.",
            "Two cases are special: stored exponent 0 (leading 0, power 1 - bias) and "
            "stored exponent all ones (infinity or NaN).",
        ),
        solution="""\
import math


def decode(pattern, exponent_bits, mantissa_bits):
    mantissa = pattern & (2**mantissa_bits - 1)
    exponent = (pattern >> mantissa_bits) & (2**exponent_bits - 1)
    sign = -1 if pattern >> (exponent_bits + mantissa_bits) else 1
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 2**exponent_bits - 1:
        return math.nan if mantissa else sign * math.inf
    leading = 1 if exponent else 0
    power = max(exponent, 1) - bias
    return sign * 2.0**power * (leading + mantissa / 2**mantissa_bits)


answer = decode
""",
    ),
    Exercise(
        "B.8",
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
]
