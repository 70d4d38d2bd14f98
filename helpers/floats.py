"""Numbers as bits: eight formats taken apart and put together by hand (Appendix B).

A pattern becomes a number by the definition of its format, and a number becomes a pattern by
counting steps, in float64, which holds every number of every format here exactly. Sources:
IEEE 754 (fp32, fp16), "FP8 Formats for Deep Learning" (Micikevicius et al., 2022; e4m3 and
e5m2), and the OCP Microscaling Formats specification 1.0 (fp4 e2m1).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from itertools import islice
from typing import SupportsFloat, SupportsIndex, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helpers._checks import one_of
from helpers._report import Markup, card, escape, table
from helpers.plots import COLORS

_COLORS = {"sign": "purple", "exponent": "orange", "mantissa": "blue", "value": "blue"}


# ── formats ──────────────────────────────────────────────────────────────────────────────
class FloatFormat:
    """A floating-point format: one sign bit, then exponent, then mantissa.

    Args:
        name: as in `FORMATS`.
        exponent_bits: how many bits say the power of two.
        mantissa_bits: how many bits stand behind the binary point.
        reserved: how many patterns, counted from all ones down, are not numbers. IEEE 754 gives up
            all whose exponent is all ones (infinity and NaN), e4m3 one (NaN), fp4 none.
        nan: the pattern written for NaN, None where there is none.

    Example:
        >>> FORMATS["fp16"].bits
        16
    """

    def __init__(
        self, name: str, exponent_bits: int, mantissa_bits: int, *, reserved: int, nan: int | None
    ) -> None:
        self.name, self.mantissa_bits, self.nan = name, mantissa_bits, nan
        self.fields = {"sign": 1, "exponent": exponent_bits, "mantissa": mantissa_bits}
        self.bits = 1 + exponent_bits + mantissa_bits
        # The stored exponent is never negative; subtracting the bias gives the power.
        self.bias = 2 ** (exponent_bits - 1) - 1
        self.smallest_power = 1 - self.bias  # of the normal numbers and all subnormal ones
        self.largest = 2 ** (self.bits - 1) - 1 - reserved  # pattern of the largest number
        self.infinity = self.largest + 1 if reserved > 1 else None

    def decode(self, patterns: NDArray[np.int64]) -> NDArray[np.float64]:
        """The numbers that patterns stand for, in the same shape."""
        magnitude = patterns & (2 ** (self.bits - 1) - 1)
        exponent = magnitude >> self.mantissa_bits
        mantissa = magnitude & (2**self.mantissa_bits - 1)
        # Stored exponent 0 has no hidden 1 in front, and shares its power with exponent 1.
        hidden = np.where(exponent > 0, 2**self.mantissa_bits, 0)
        power = np.maximum(exponent, 1) - self.bias
        numbers = np.ldexp((hidden + mantissa).astype(float), power - self.mantissa_bits)
        numbers = np.where(magnitude > self.largest, np.nan, numbers)
        if self.infinity is not None:
            numbers = np.where(magnitude == self.infinity, np.inf, numbers)
        return np.copysign(numbers, np.where(patterns > magnitude, -1.0, 1.0))

    def encode(self, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
        """The nearest patterns, ties to even, in the shape of the numbers."""
        if self.nan is None and np.isnan(numbers).any():
            raise ValueError(f"number is NaN, and {self.name} has no pattern for it")
        magnitude = np.where(np.isfinite(numbers), np.abs(numbers), 0)
        # frexp gives a fraction below 1, so its exponent is one more than that of 1.xyz.
        # Numbers too small for an exponent of their own take the smallest one.
        power = np.frexp(np.maximum(magnitude, 2.0**self.smallest_power))[1] - 1
        power = power.astype(np.int64)
        # Between 2^power and its double, numbers lie 2^(power - mantissa_bits) apart: count
        # those steps from zero. np.rint rounds half to even.
        steps = np.rint(np.ldexp(magnitude, self.mantissa_bits - power)).astype(np.int64)
        # A positive pattern is its rank among the positive numbers, so this sum is right
        # for normal numbers, whose steps include the hidden 1; for subnormal ones, whose
        # first term is 0; and when rounding up carries into the next exponent.
        patterns = ((power - self.smallest_power) << self.mantissa_bits) + steps
        too_large = self.largest if self.infinity is None else self.infinity
        patterns = np.where(np.isinf(numbers), too_large, np.minimum(patterns, too_large))
        patterns = np.where(np.isnan(numbers), self.nan or 0, patterns)
        return patterns + (np.signbit(numbers).astype(np.int64) << (self.bits - 1))

    def formula(self, bits: Bits) -> str:
        """How the three fields make the number."""
        if math.isnan(bits) and self.infinity is None:
            return "all ones: the one pattern this format spends on NaN"
        if not math.isfinite(bits):
            rest = "not zero" if math.isnan(bits) else "zero"
            return f"exponent all ones, mantissa {rest}: {bits.value}"
        sign, exponent, mantissa = (int(digits, 2) for digits in bits.groups.values())
        power = f"2^({max(exponent, 1)} - {self.bias})"
        fraction = f"({min(exponent, 1)} + {mantissa}/{2**self.mantissa_bits})"
        return f"(-1)^{sign} × {power} × {fraction} = {bits.value}"


class IntegerFormat:
    """An integer format; where it is signed, the top bit counts negative (two's complement).

    Args:
        name: as in `FORMATS`.
        bits: how many.
        signed: whether there are negative numbers.

    Example:
        >>> FORMATS["int8"].signed
        True
    """

    def __init__(self, name: str, bits: int, *, signed: bool) -> None:
        self.name, self.bits, self.signed = name, bits, signed
        self.fields = {"sign": 1, "value": bits - 1} if signed else {"value": bits}

    def decode(self, patterns: NDArray[np.int64]) -> NDArray[np.float64]:
        """The whole numbers that patterns stand for, in the same shape."""
        negative = (patterns >= 2 ** (self.bits - 1)) & self.signed
        return (patterns - np.where(negative, 2**self.bits, 0)).astype(float)

    def encode(self, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
        """Patterns in the shape of the numbers: fraction cut off, then wrapped around."""
        if not np.isfinite(numbers).all():
            raise ValueError(f"number must be finite for {self.name}: it has no inf or NaN")
        remainder = np.fmod(np.trunc(numbers), 2**self.bits)
        return remainder.astype(np.int64) & (2**self.bits - 1)

    def formula(self, bits: Bits) -> str:
        """The sum of the powers of two whose bit is set."""
        weights = [2**place for place in reversed(range(self.bits))]
        weights[0] *= -1 if self.signed else 1
        terms = [str(w) for w, bit in zip(weights, bits.bits, strict=True) if bit == "1"]
        return f"{' + '.join(terms) or '0'} = {bits.value}"


FORMATS: dict[str, FloatFormat | IntegerFormat] = {
    "fp32": FloatFormat("fp32", 8, 23, reserved=2**23, nan=0x7FC0_0000),
    "bf16": FloatFormat("bf16", 8, 7, reserved=2**7, nan=0x7FC0),
    "fp16": FloatFormat("fp16", 5, 10, reserved=2**10, nan=0x7E00),
    "fp8_e4m3": FloatFormat("fp8_e4m3", 4, 3, reserved=1, nan=0x7F),  # float8_e4m3fn
    "fp8_e5m2": FloatFormat("fp8_e5m2", 5, 2, reserved=2**2, nan=0x7F),
    "fp4_e2m1": FloatFormat("fp4_e2m1", 2, 1, reserved=0, nan=None),
    "int8": IntegerFormat("int8", 8, signed=True),
    "uint8": IntegerFormat("uint8", 8, signed=False),
}


# ── one number ───────────────────────────────────────────────────────────────────────────
class Bits(float):
    """One stored number: a float that knows how it is spelled; from `decode` and `encode`.

    `.value` is the number (an int for integer formats), `.pattern` the bits as an unsigned
    integer, `.bits` as text and `.groups` as text by field; `.sign`, `.exponent` and
    `.mantissa` are the fields as integers (None where the format has no such field).

    Args:
        pattern: an unsigned integer.
        kind: a key of `FORMATS`.

    Example:
        >>> Bits(0x3F80, "bf16")
        bf16 0 01111111 0000000 = 1.0
    """

    def __new__(cls, pattern: int, kind: str) -> Bits:
        """The number as a float; the rest is told by `__init__`."""
        return super().__new__(cls, FORMATS[kind].decode(np.asarray(pattern)))

    def __init__(self, pattern: int, kind: str) -> None:
        self.pattern, self.kind, self.format = pattern, kind, FORMATS[kind]
        self.bits = f"{pattern:0{self.format.bits}b}"
        digits = iter(self.bits)
        self.groups = {
            name: "".join(islice(digits, width)) for name, width in self.format.fields.items()
        }
        fields = {name: int(digits, 2) for name, digits in self.groups.items()}
        self.sign, self.exponent, self.mantissa = map(fields.get, ("sign", "exponent", "mantissa"))
        self.value = int(self) if self.exponent is None else float(self)

    def __reduce__(self) -> tuple[type[Bits], tuple[int, str]]:  # for copy and pickle
        return Bits, (self.pattern, self.kind)

    @property
    def category(self) -> str:
        """'normal', 'subnormal', 'zero', 'infinity' or 'NaN'; 'integer' for int8, uint8."""
        if self.exponent is None:
            return "integer"
        if not math.isfinite(self):
            return "NaN" if math.isnan(self) else "infinity"
        if self.exponent:
            return "normal"
        return "subnormal" if self.mantissa else "zero"

    @property
    def formula(self) -> str:
        """How the fields make the number, as text."""
        return self.format.formula(self)

    def __repr__(self) -> str:
        return f"{self.kind} {' '.join(self.groups.values())} = {self.value}"

    def __str__(self) -> str:
        widths = [max(len(name), len(digits)) for name, digits in self.groups.items()]
        rows = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in (self.groups.values(), self.groups)
        ]
        return "\n".join([f"{self.kind} ({self.category})", *rows, self.formula])

    def _repr_html_(self) -> str:
        style = "padding:1px 4px;letter-spacing:4px;color:#222;background:"
        fields = [
            Markup(f"<code style='{style}{COLORS[_COLORS[name]]}40'>{digits}</code>")
            for name, digits in self.groups.items()
        ]
        html = table([[self.category, *fields]], [self.kind, *self.groups])
        return card(str(self), html=f"{html}<code>{escape(self.formula)}</code>")


def decode(bits: SupportsIndex | str | Sequence[int], kind: str) -> Bits:
    """The number that a pattern stands for (Appendix B).

    Args:
        bits: an unsigned integer (0x3F80), text ("0 01111111 0000000"; spaces and underscores are
            ignored), or a list of zeros and ones, highest bit first; ValueError otherwise.
        kind: a key of `FORMATS`.

    Example:
        >>> decode("0 10000 1001001000", "fp16")
        fp16 0 10000 1001001000 = 3.140625
    """
    size = _format(kind).bits
    try:
        pattern = operator.index(cast(SupportsIndex, bits))
    except TypeError:
        digits = re.sub(r"[\s_,()\[\]]", "", str(bits))
        if not re.fullmatch(f"[01]{{{size}}}", digits):
            raise ValueError(
                f"bits must be an unsigned integer, or {size} zeros and ones for {kind}, "
                f"such as {'01' * (size // 2)!r}; got {bits!r}"
            ) from None
        pattern = int(digits, 2)
    if not 0 <= pattern < 2**size:
        raise ValueError(
            f"bits must be from 0 to {2**size - 1:#x} for {kind}, not {pattern} (a negative "
            f"number from torch is a signed view: use bits & {2**size - 1:#x})"
        )
    return Bits(pattern, kind)


def encode(number: SupportsFloat, kind: str) -> Bits:
    """The pattern a number is stored as, rounded once, straight from float64 (Appendix B).

    Rounds to nearest, ties to even. Where a number is too large, fp32, bf16, fp16 and fp8_e5m2
    store infinity; fp8_e4m3 (torch's float8_e4m3fn, as of torch 2.12) and fp4_e2m1 their largest
    number. Integer formats cut the fraction off and wrap around, as a whole number does in torch.

    Args:
        number: a single number (TypeError); no NaN where the format has none (ValueError).
        kind: a key of `FORMATS`.

    Example:
        >>> encode(0.1, "fp16")
        fp16 0 01011 1001100110 = 0.0999755859375
    """
    form = _format(kind)
    try:
        exact = float(operator.pos(number))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several
        raise TypeError(
            f"number must be a single number; got {number!r}. For many numbers use "
            "floats.encode_array, for a pattern of bits floats.decode"
        ) from None
    return Bits(int(form.encode(np.asarray(exact))), kind)


# ── many numbers ─────────────────────────────────────────────────────────────────────────
def decode_array(patterns: ArrayLike, kind: str) -> NDArray[np.float64]:
    """`decode` for an array, in the same shape (Appendix B).

    Args:
        patterns: unsigned integers, or ValueError.
        kind: a key of `FORMATS`.

    Example:
        >>> decode_array([0, 1, 15], "fp4_e2m1")
        array([ 0. ,  0.5, -6. ])
    """
    patterns, form = np.asarray(patterns), _format(kind)
    whole = patterns.dtype.kind in "iu"
    if not whole or not ((patterns >= 0) & (patterns < 2**form.bits)).all():
        raise ValueError(
            f"patterns must be integers between 0 and {2**form.bits - 1:#x} for {kind}; "
            f"got {patterns.dtype} from {patterns.min()} to {patterns.max()}"
        )
    return form.decode(patterns.astype(np.int64))


def encode_array(numbers: ArrayLike, kind: str) -> NDArray[np.int64]:
    """`encode` for an array, in the same shape (Appendix B).

    Args:
        numbers: anything that makes a float64 array.
        kind: a key of `FORMATS`.

    Example:
        >>> encode_array([0.5, 100.0], "fp4_e2m1")
        array([1, 7])
    """
    with np.errstate(invalid="ignore"):  # a signaling NaN may come in as well
        exact = np.asarray(numbers, dtype=np.float64)
    return _format(kind).encode(exact)


def values(kind: str) -> NDArray[np.float64]:
    """Every finite number of a format, ascending (Appendix B).

    Args:
        kind: a format of at most 16 bits, or ValueError.

    Example:
        >>> values("fp4_e2m1")[-3:]
        array([3., 4., 6.])
    """
    if _format(kind).bits > 16:
        raise ValueError(f"kind={kind!r} has 2^32 patterns; choose one of at most 16 bits")
    numbers = decode_array(np.arange(2 ** FORMATS[kind].bits), kind)
    return np.unique(numbers[np.isfinite(numbers)]) + 0.0  # of both zeros, the plain one


def _format(kind: str) -> FloatFormat | IntegerFormat:
    one_of("kind", kind, FORMATS)
    return FORMATS[kind]
