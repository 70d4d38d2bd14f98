"""Numbers as bits: eight formats taken apart and put together by hand (Appendix B).

Nothing here asks torch for a conversion: a pattern becomes a number by the definition of
its format, and a number becomes a pattern by counting steps. The tests then hold both
directions against torch, bit for bit. The work is done in float64, which holds every
number of every format here exactly.

Sources: IEEE 754 (fp32, fp16), "FP8 Formats for Deep Learning" (Micikevicius et al.,
2022; e4m3 and e5m2), and the OCP Microscaling Formats specification 1.0 (fp4 e2m1).
"""

import itertools
import math
import operator

import numpy as np

from helpers import plots

FIELD_COLORS = {"sign": "purple", "exponent": "orange", "mantissa": "blue", "value": "blue"}


class FloatFormat:
    """A floating-point format: one sign bit, then exponent, then mantissa.

    reserved: how many patterns, counted from all ones down, are not numbers. IEEE 754 gives
    up every pattern whose exponent is all ones (for infinity and NaN), e4m3 a single one
    (for NaN), fp4 none. nan: the pattern written for NaN, None where there is none.
    """

    def __init__(self, name, exponent_bits, mantissa_bits, *, reserved, nan):
        self.name, self.mantissa_bits, self.nan = name, mantissa_bits, nan
        self.fields = {"sign": 1, "exponent": exponent_bits, "mantissa": mantissa_bits}
        self.bits = 1 + exponent_bits + mantissa_bits
        # The stored exponent is never negative; subtracting the bias gives the power.
        self.bias = 2 ** (exponent_bits - 1) - 1
        self.smallest_power = 1 - self.bias  # of the normal numbers and all subnormal ones
        self.largest = 2 ** (self.bits - 1) - 1 - reserved  # pattern of the largest number
        self.infinity = self.largest + 1 if reserved > 1 else None

    def decode(self, patterns):
        """Patterns (int64 array) to numbers (float64 array of the same shape)."""
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

    def encode(self, numbers):
        """Numbers (float64 array) to the nearest patterns (int64 array), ties to even."""
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

    def formula(self, bits):
        """How the three fields make the number, as text."""
        if bits.is_nan and self.infinity is None:
            return "all ones: the one pattern this format spends on NaN"
        if bits.is_nan or bits.is_infinite:
            mantissa = "not zero" if bits.is_nan else "zero"
            return f"exponent all ones, mantissa {mantissa}: {bits.value}"
        hidden = "0" if bits.exponent == 0 else "1"
        power = f"2^({max(bits.exponent, 1)} - {self.bias})"
        fraction = f"({hidden} + {bits.mantissa}/{2**self.mantissa_bits})"
        return f"(-1)^{bits.sign} × {power} × {fraction} = {bits.value}"


class IntegerFormat:
    """An integer format; where it is signed, the top bit counts negative.

    That is two's complement: -128 + 127 = -1, and addition needs no special cases.
    """

    def __init__(self, name, bits, *, signed):
        self.name, self.bits, self.signed = name, bits, signed
        self.fields = {"sign": 1, "value": bits - 1} if signed else {"value": bits}

    def decode(self, patterns):
        """Patterns (int64 array) to whole numbers (float64 array of the same shape)."""
        negative = (patterns >= 2 ** (self.bits - 1)) & self.signed
        return (patterns - np.where(negative, 2**self.bits, 0)).astype(float)

    def encode(self, numbers):
        """Numbers (float64 array) to patterns: fraction cut off, then wrapped around."""
        if not np.isfinite(numbers).all():
            raise ValueError(f"number must be finite for {self.name}: it has no inf or NaN")
        remainder = np.fmod(np.trunc(numbers), 2**self.bits)
        return remainder.astype(np.int64) & (2**self.bits - 1)

    def formula(self, bits):
        """The sum of the powers of two whose bit is set, as text."""
        weights = [2**place for place in reversed(range(self.bits))]
        weights[0] *= -1 if self.signed else 1
        terms = [str(w) for w, bit in zip(weights, bits.bits, strict=True) if bit == "1"]
        return f"{' + '.join(terms) or '0'} = {bits.value}"


FORMATS = {
    "fp32": FloatFormat("fp32", 8, 23, reserved=2**23, nan=0x7FC0_0000),
    "bf16": FloatFormat("bf16", 8, 7, reserved=2**7, nan=0x7FC0),
    "fp16": FloatFormat("fp16", 5, 10, reserved=2**10, nan=0x7E00),
    "fp8_e4m3": FloatFormat("fp8_e4m3", 4, 3, reserved=1, nan=0x7F),  # float8_e4m3fn
    "fp8_e5m2": FloatFormat("fp8_e5m2", 5, 2, reserved=2**2, nan=0x7F),
    "fp4_e2m1": FloatFormat("fp4_e2m1", 2, 1, reserved=0, nan=None),
    "int8": IntegerFormat("int8", 8, signed=True),
    "uint8": IntegerFormat("uint8", 8, signed=False),
}


class Bits(float):
    """One stored number: a float that knows how it is spelled (Appendix B).

    `.value` is the number, `.pattern` the bits as an unsigned integer, `.bits` as text.
    `.sign`, `.exponent` and `.mantissa` are the stored fields, as integers (None where the
    format has no such field). Shows itself in colors in a notebook; `str` is plain text.
    """

    def __new__(cls, pattern, kind):
        """Made by `decode` and `encode`."""
        self = super().__new__(cls, FORMATS[kind].decode(np.int64(pattern)))
        self.pattern, self.kind, self.format = pattern, kind, FORMATS[kind]
        for name in ("sign", "exponent", "mantissa"):
            setattr(self, name, int(self.groups[name], 2) if name in self.groups else None)
        return self

    def __getnewargs__(self):  # what copy and pickle hand to __new__
        return self.pattern, self.kind

    @property
    def value(self):
        """The number: an int for the integer formats, else a float."""
        return int(self) if isinstance(self.format, IntegerFormat) else float(self)

    @property
    def bits(self):
        """The pattern as text, highest bit first."""
        return f"{self.pattern:0{self.format.bits}b}"

    @property
    def category(self):
        """'normal', 'subnormal', 'zero', 'infinity' or 'NaN'; 'integer' for int8, uint8."""
        if self.exponent is None:
            return "integer"
        if not math.isfinite(self):
            return "NaN" if math.isnan(self) else "infinity"
        if self.exponent:
            return "normal"
        return "subnormal" if self.mantissa else "zero"

    is_normal = property(lambda self: self.category == "normal")
    is_subnormal = property(lambda self: self.category == "subnormal")
    is_zero = property(lambda self: self == 0)
    is_infinite = property(math.isinf)
    is_nan = property(math.isnan)

    @property
    def formula(self):
        """How the fields make the number, as text."""
        return self.format.formula(self)

    @property
    def groups(self):
        """The fields in order, as text: `{"sign": "0", "exponent": "10000", ...}`."""
        digits = iter(self.bits)
        return {
            name: "".join(itertools.islice(digits, width))
            for name, width in self.format.fields.items()
        }

    def __repr__(self):
        return f"{self.kind} {' '.join(self.groups.values())} = {self.value}"

    def __str__(self):
        columns = [
            (digits.ljust(len(name)), name.ljust(len(digits)))
            for name, digits in self.groups.items()
        ]
        rows = ("  ".join(row).rstrip() for row in zip(*columns, strict=True))
        return "\n".join([f"{self.kind} ({self.category})", *rows, self.formula])

    def _repr_html_(self):
        names, digits = "", ""
        cell = "<td style='text-align:center;padding:1px 2px;border:1px solid white;"
        for name, text in self.groups.items():
            color = f"background:{plots.COLORS[FIELD_COLORS[name]]}40;color:#222'"
            names += f"{cell}{color} colspan='{len(text)}'>{name}</td>"
            digits += "".join(f"{cell}{color}>{digit}</td>" for digit in text)
        return (
            f"<table style='margin:4px 0;font-family:monospace'>"
            f"<tr><td><b>{self.kind}</b></td>{names}</tr>"
            f"<tr><td>{self.category}</td>{digits}</tr></table>"
            f"<code>{self.formula}</code>"
        )


def decode(bits, kind):
    """The number that a pattern stands for (Appendix B).

    bits: an unsigned integer (0x3F80), text ("0 01111111 0000000"; spaces and underscores
    are ignored), or a list of zeros and ones, highest bit first. kind: a key of `FORMATS`.
    Returns Bits, which is a float. Raises ValueError for a wrong kind or number of bits.
    """
    size = _format(kind).bits
    try:
        pattern = operator.index(bits)
    except TypeError:
        pattern = _from_digits(bits, kind, size)
    if not 0 <= pattern < 2**size:
        raise ValueError(
            f"bits must lie between 0 and {2**size - 1:#x} for {kind}; got {pattern}. "
            f"A negative number from torch is a signed view: use bits & {2**size - 1:#x}"
        )
    return Bits(pattern, kind)


def encode(number, kind):
    """The pattern a number is stored as, rounded to nearest, ties to even (Appendix B).

    Where a number is too large, fp32, bf16, fp16 and fp8_e5m2 store infinity; fp8_e4m3
    (torch's float8_e4m3fn, as of torch 2.12) and fp4_e2m1 saturate at their largest number.
    Integer formats cut the fraction off and wrap around, as `tensor.to(torch.int8)` does.
    The number is rounded once, straight from float64. Returns Bits, which is a float.
    Raises ValueError for a wrong kind or a NaN that the format cannot store, TypeError for
    what is not a single number.
    """
    form = _format(kind)
    try:
        exact = float(operator.pos(number))  # text and lists know no plus sign
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several
        raise TypeError(
            f"number must be a single number; got {number!r}. For many numbers use "
            "floats.encode_array, for a pattern of bits floats.decode"
        ) from None
    return Bits(int(form.encode(np.float64(exact))), kind)


def decode_array(patterns, kind):
    """`decode` for an array of unsigned patterns: float64 numbers of the same shape."""
    patterns, form = np.asarray(patterns), _format(kind)
    whole = patterns.dtype.kind in "iu"
    if not whole or not ((patterns >= 0) & (patterns < 2**form.bits)).all():
        raise ValueError(
            f"patterns must be integers between 0 and {2**form.bits - 1:#x} for {kind}; "
            f"got {patterns.dtype} from {patterns.min()} to {patterns.max()}"
        )
    return form.decode(patterns.astype(np.int64))


def encode_array(numbers, kind):
    """`encode` for an array of numbers: int64 patterns of the same shape."""
    with np.errstate(invalid="ignore"):  # a signaling NaN may come in as well
        numbers = np.asarray(numbers, dtype=np.float64)
    return _format(kind).encode(numbers)


def values(kind):
    """Every finite number of a format of at most 16 bits, ascending, as a float64 array."""
    if _format(kind).bits > 16:
        raise ValueError(f"kind={kind!r} has 2^32 patterns; choose one of at most 16 bits")
    numbers = decode_array(np.arange(2 ** FORMATS[kind].bits), kind)
    return np.unique(numbers[np.isfinite(numbers)]) + 0.0  # of both zeros, the plain one


def draw(*kinds, limit=None):
    """A tick for every number of each format, subnormal ones in orange. Returns a Figure.

    kinds: formats of at most 16 bits. limit: show only what lies between -limit and limit.
    """
    fig, axes = plots.figure(len(kinds), 1, height=0.3 + 0.75 * len(kinds), squeeze=False)
    for ax, kind in zip(axes[:, 0], kinds, strict=True):
        numbers = values(kind)
        reach = limit or abs(numbers).max()
        numbers = numbers[abs(numbers) <= reach]
        smallest = 2.0 ** getattr(FORMATS[kind], "smallest_power", -math.inf)
        for small, color in ((False, "blue"), (True, "orange")):
            shown = numbers[(abs(numbers) < smallest) == small]
            ax.vlines(shown, 0, 1, color=plots.COLORS[color], linewidth=1)
        ax.set(
            yticks=[0.5],
            yticklabels=[kind],
            ylim=(0, 1.1),
            xlim=(-1.02 * reach, 1.02 * reach),
        )
        ax.grid(visible=False)
    axes[-1, 0].set_xlabel("number")
    return fig


def _format(kind):
    if kind not in FORMATS:
        raise ValueError(f"kind must be one of {', '.join(FORMATS)}; got {kind!r}")
    return FORMATS[kind]


def _from_digits(digits, kind, size):
    """Text or a list of zeros and ones as an unsigned integer."""
    try:
        text = "".join(map(str, digits)).replace(" ", "").replace("_", "")
    except TypeError:  # not even a sequence
        text = ""
    if len(text) != size or set(text) - {"0", "1"}:
        raise ValueError(
            f"bits must be an unsigned integer, or {size} zeros and ones for {kind}, "
            f"such as {'01' * (size // 2)!r}; got {digits!r}"
        )
    return int(text, 2)
