"""`floats` against torch, bit for bit, and against tables written down by hand."""

import copy
import math
import pickle
import random
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import floats, plots

TORCH = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
UNSIGNED = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}
SMALL = ["bf16", "fp16", "fp8_e4m3", "fp8_e5m2"]


def to_torch(patterns, kind):
    """The tensor whose memory holds exactly these bits."""
    unsigned = torch.from_numpy(np.asarray(patterns, dtype=np.int64))
    return unsigned.to(UNSIGNED[floats.FORMATS[kind].bits]).view(TORCH[kind])


def from_torch(tensor):
    """The bits a tensor holds, as unsigned integers."""
    return tensor.view(UNSIGNED[8 * tensor.element_size()]).numpy().astype(np.int64)


def assert_same_numbers(ours, theirs):
    """Equal, signs of zeros included; NaN only has to be NaN."""
    np.testing.assert_array_equal(ours, theirs)
    known = ~np.isnan(ours)
    np.testing.assert_array_equal(np.signbit(ours[known]), np.signbit(theirs[known]))


def assert_same_patterns(ours, theirs, kind):
    """Equal bits. torch's own NaN depends on the code path it takes: any will do."""
    nan = np.isnan(floats.decode_array(ours, kind))
    np.testing.assert_array_equal(nan, to_torch(theirs, kind).float().isnan().numpy())
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])


def random_fp32(count=1_000_000, seed=0):
    """Uniform over bit patterns: every size, subnormal numbers, infinities and NaN."""
    patterns = np.random.default_rng(seed).integers(0, 2**32, count)
    patterns[:8] = [0, 2**31, 1, 2**23 - 1, 2**23, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
    return patterns


@pytest.mark.parametrize("kind", SMALL)
def test_every_pattern_both_ways(kind):
    patterns = np.arange(2 ** floats.FORMATS[kind].bits)
    numbers = floats.decode_array(patterns, kind)
    assert_same_numbers(numbers, to_torch(patterns, kind).double().numpy())
    back = floats.encode_array(numbers, kind)
    number = ~np.isnan(numbers)
    np.testing.assert_array_equal(back[number], patterns[number])
    assert_same_patterns(back, from_torch(torch.from_numpy(numbers).to(TORCH[kind])), kind)


def test_a_million_fp32_patterns_both_ways():
    patterns = random_fp32()
    numbers = floats.decode_array(patterns, "fp32")
    assert_same_numbers(numbers, to_torch(patterns, "fp32").double().numpy())
    back = floats.encode_array(numbers, "fp32")
    assert_same_patterns(back, from_torch(torch.from_numpy(numbers).float()), "fp32")
    number = ~np.isnan(numbers)
    np.testing.assert_array_equal(back[number], patterns[number])


def torch_has_saturating_e4m3():
    """From 2.12 on, a too large number becomes 448; before, NaN."""
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return release >= (2, 12)


@pytest.mark.parametrize("kind", SMALL)
def test_rounding_a_million_fp32_numbers(kind):
    # Half of them of any size, half within the format's range, where rounding happens.
    anything = to_torch(random_fp32(500_000), "fp32")
    largest = float(floats.decode(floats.FORMATS[kind].largest, kind))
    near = torch.from_numpy(np.random.default_rng(1).normal(size=500_000))
    near = (near * torch.logspace(-9, 0, 500_000, dtype=torch.float64) * largest).float()
    numbers = torch.cat([anything, near])
    if kind == "fp8_e4m3" and not torch_has_saturating_e4m3():
        numbers = numbers[numbers.isnan() | (numbers.abs() <= 464)]
    ours = floats.encode_array(numbers, kind)
    assert_same_patterns(ours, from_torch(numbers.to(TORCH[kind])), kind)


@pytest.mark.parametrize("kind", SMALL)
def test_every_tie_goes_to_the_even_pattern(kind):
    numbers = floats.values(kind)
    ties = (numbers[1:] + numbers[:-1]) / 2  # exact in float64, and in float32 as well
    ours = floats.encode_array(ties, kind)
    exact_zero = ties == 0
    assert (ours[~exact_zero] % 2 == 0).all()
    ties32 = torch.from_numpy(ties).float()
    assert (ties32.double().numpy() == ties).all()
    assert_same_patterns(ours, from_torch(ties32.to(TORCH[kind])), kind)


def test_fp64_to_fp32_rounds_like_struct():
    numbers = np.random.default_rng(3).normal(size=20_000)
    numbers *= np.logspace(-46, 38, 20_000)
    ours = floats.encode_array(numbers, "fp32")
    theirs = [struct.unpack("<I", struct.pack("<f", number))[0] for number in numbers]
    np.testing.assert_array_equal(ours, theirs)


def test_one_rounding_is_not_two():
    # Just above a tie of bf16; in float32 on the way there, it becomes the tie itself.
    number = 1 + 2**-8 + 2**-40
    assert floats.encode(number, "bf16").value == 1 + 2**-7
    assert torch.tensor(number, dtype=torch.float64).to(torch.bfloat16).item() == 1


def test_fp4_is_the_table_of_the_specification():
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert floats.decode_array(np.arange(16), "fp4_e2m1").tolist() == table + [
        -number for number in table
    ]
    assert math.copysign(1, floats.decode(8, "fp4_e2m1")) == -1
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 6.1: 6, -1e9: -6}
    assert {n: floats.encode(n, "fp4_e2m1").value for n in ties} == ties
    assert floats.encode(math.inf, "fp4_e2m1").value == 6


@pytest.mark.parametrize(("kind", "dtype"), [("int8", torch.int8), ("uint8", torch.uint8)])
def test_integers_are_torchs(kind, dtype):
    patterns = np.arange(256)
    numbers = floats.decode_array(patterns, kind)
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert numbers.tolist() == theirs.tolist()
    np.testing.assert_array_equal(floats.encode_array(numbers, kind), patterns)
    whole = torch.arange(-1000, 1000)  # wraps around
    np.testing.assert_array_equal(floats.encode_array(whole, kind), from_torch(whole.to(dtype)))
    fractions = torch.linspace(-100, 100, 1001) if kind == "int8" else torch.rand(999) * 255
    np.testing.assert_array_equal(
        floats.encode_array(fractions, kind), from_torch(fractions.to(dtype))
    )


@pytest.mark.parametrize("kind", TORCH)
def test_limits_are_finfos(kind):
    form, info = floats.FORMATS[kind], torch.finfo(TORCH[kind])
    assert floats.decode(form.largest, kind) == info.max
    assert floats.decode(1 << form.mantissa_bits, kind) == info.smallest_normal
    one = floats.encode(1, kind)
    assert floats.decode(one.pattern + 1, kind) - 1 == info.eps
    assert form.bits == info.bits


@pytest.mark.parametrize(
    ("number", "kind", "value"),
    [
        (65519.9, "fp16", 65504),
        (65520, "fp16", math.inf),
        (-1e9, "fp16", -math.inf),
        (3.4028236e38, "fp32", math.inf),
        (1e39, "bf16", math.inf),
        (61440, "fp8_e5m2", math.inf),
        (464, "fp8_e4m3", 448),
        (465, "fp8_e4m3", 448),
        (-math.inf, "fp8_e4m3", -448),
        (2**-25, "fp16", 0),
        (2**-25 * 1.001, "fp16", 2**-24),
        (300, "int8", 44),
        (-2.7, "int8", -2),
        (-1, "uint8", 255),
    ],
)
def test_overflow_and_underflow(number, kind, value):
    assert floats.encode(number, kind).value == value


@given(st.floats(allow_nan=False), st.sampled_from([*SMALL, "fp32", "fp4_e2m1"]))
@settings(max_examples=300, deadline=None)
def test_no_other_number_is_nearer(number, kind):
    chosen = floats.encode(number, kind)
    assert math.copysign(1, chosen) == math.copysign(1, number)
    if math.isinf(chosen) or math.isinf(number):
        return
    error = abs(Fraction(float(chosen)) - Fraction(number))
    magnitude = chosen.pattern & (2 ** (chosen.format.bits - 1) - 1)
    for other in (magnitude - 1, magnitude + 1):
        if 0 <= other <= chosen.format.largest:
            distance = abs(Fraction(float(floats.decode(other, kind))) - abs(Fraction(number)))
            assert error < distance or (error == distance and magnitude % 2 == 0)


@given(st.data(), st.sampled_from(list(floats.FORMATS)))
@settings(max_examples=200, deadline=None)
def test_three_spellings_and_a_round_trip(data, kind):
    pattern = data.draw(st.integers(0, 2 ** floats.FORMATS[kind].bits - 1))
    bits = floats.decode(pattern, kind)
    assert bits.pattern == pattern and int(bits.bits, 2) == pattern
    assert floats.decode(" ".join(bits.groups.values()), kind).pattern == pattern
    assert floats.decode([int(digit) for digit in bits.bits], kind).pattern == pattern
    if not math.isnan(bits):
        assert floats.encode(bits, kind).pattern == pattern


@pytest.mark.parametrize(
    ("pattern", "category"),
    [
        ("0 00000 0000000000", "zero"),
        ("1 00000 0000000000", "zero"),
        ("0 00000 0000000001", "subnormal"),
        ("0 00001 0000000000", "normal"),
        ("0 11111 0000000000", "infinity"),
        ("1 11111 0000000001", "NaN"),
    ],
)
def test_categories_and_fields(pattern, category):
    bits = floats.decode(pattern, "fp16")
    assert bits.category == category
    assert list(bits.groups.values()) == pattern.split()
    assert [bits.sign, bits.exponent, bits.mantissa] == [int(p, 2) for p in pattern.split()]


def evaluate(formula):
    """What a printed formula comes to, and what it claims to."""
    left, right = formula.split(" = ")
    return eval(left.replace("×", "*").replace("^", "**")), float(right)


def test_formulas_are_true():
    chooser = random.Random(0)
    for kind, form in floats.FORMATS.items():
        for _ in range(50):
            bits = floats.decode(chooser.randrange(2**form.bits), kind)
            if not math.isfinite(bits):
                assert "all ones" in bits.formula
            else:
                left, right = evaluate(bits.formula)
                assert left == right == bits


def test_text_and_html_show_the_fields():
    bits = floats.encode(3.140625, "fp16")
    lines = str(bits).splitlines()
    assert lines[0] == "fp16 (normal)" and lines[1].split() == ["0", "10000", "1001001000"]
    assert lines[2].split() == ["sign", "exponent", "mantissa"]
    assert [lines[1].index(p) for p in lines[1].split()] == [
        lines[2].index(p) for p in lines[2].split()
    ]
    assert repr(bits) == "fp16 0 10000 1001001000 = 3.140625"
    page = bits._repr_html_()
    for text in ("0", "10000", "1001001000", "sign", "exponent", "mantissa", bits.formula):
        assert f">{text}</" in page
    assert "(1 + 584/1024) = 3.140625" in bits.formula
    assert "value" in str(floats.encode(5, "uint8"))


def test_bits_are_numbers():
    bits = floats.encode(0.1, "fp16")
    assert isinstance(bits, float) and bits + 1 == 1.0999755859375
    assert bits == bits.value == torch.tensor(0.1, dtype=torch.float16).item()
    assert isinstance(floats.encode(3, "int8").value, int)
    for copied in (copy.deepcopy(bits), pickle.loads(pickle.dumps(bits))):
        assert copied.pattern == bits.pattern and copied.kind == "fp16"
    for number in (
        torch.tensor(0.1),
        torch.tensor([0.1]),
        np.float32(0.1),
        Fraction(1, 10),
    ):
        assert floats.encode(number, "fp16").pattern == bits.pattern


def test_nan_keeps_its_pattern_and_its_sign():
    assert floats.decode(0x7FC1, "bf16").pattern == 0x7FC1
    for kind, form in floats.FORMATS.items():
        if getattr(form, "nan", None):
            assert floats.encode(math.nan, kind).pattern == form.nan
            assert floats.encode(math.copysign(math.nan, -1), kind).sign == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: floats.decode(0, "fp64"), ValueError, "kind must be one of 'fp32'.*, not 'fp64'"),
        (lambda: floats.encode(0, None), ValueError, "kind must be one of 'fp32'.*, not None"),
        (lambda: floats.decode(-1, "fp16"), ValueError, "not -1 .*signed view.*0xffff"),
        (lambda: floats.decode(2**16, "fp16"), ValueError, "from 0 to 0xffff for fp16, not 65536"),
        (lambda: floats.decode("0101", "fp16"), ValueError, "16 zeros and ones.*'0101'"),
        (lambda: floats.decode([2] * 8, "int8"), ValueError, "8 zeros and ones"),
        (lambda: floats.decode(1.5, "int8"), ValueError, "unsigned integer.*got 1.5"),
        (lambda: floats.encode("1.5", "fp16"), TypeError, "single number; got '1.5'"),
        (lambda: floats.encode(torch.ones(2), "fp16"), TypeError, "encode_array"),
        (lambda: floats.encode(None, "fp16"), TypeError, "single number; got None"),
        (lambda: floats.encode(math.nan, "fp4_e2m1"), ValueError, "NaN, and fp4_e2m1"),
        (lambda: floats.encode(math.nan, "int8"), ValueError, "finite for int8"),
        (lambda: floats.encode(math.inf, "uint8"), ValueError, "finite for uint8"),
        (lambda: floats.decode_array([256], "int8"), ValueError, "0xff for int8.*256"),
        (lambda: floats.decode_array([0.5], "int8"), ValueError, "must be integers"),
        (lambda: floats.values("fp32"), ValueError, "at most 16 bits"),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_number_lines_have_a_tick_per_number():
    figure = plots.number_lines("fp4_e2m1", "int8")
    lines = [sum(len(c.get_segments()) for c in ax.collections) for ax in figure.axes]
    assert lines == [15, 256]
    normal, subnormal = plots.number_lines("fp8_e5m2", limit=2**-14).axes[0].collections
    assert len(normal.get_segments()) == 2 and len(subnormal.get_segments()) == 7


def explorer():
    """The live panel's parts, as a reader's clicks reach them."""
    from helpers.course import widgets

    panel = widgets._bit_panel(floats.encode(1, "fp16"))
    (kind, number), (buttons, picture) = panel.children[0].children, panel.children[1:]
    return kind, number, buttons, picture


def test_explorer_toggles_bits():
    _, number, buttons, picture = explorer()
    assert "".join(b.description for b in buttons.children) == "0011110000000000"
    buttons.children[0].value = True
    assert number.value == "-1.0" and floats.encode(-1, "fp16").formula in picture.value
    buttons.children[-1].value = True
    assert number.value == str(-1 - 2**-10)


def test_explorer_follows_numbers_and_formats():
    kind, number, buttons, picture = explorer()
    number.value = "0.1"
    assert floats.encode(0.1, "fp16").formula in picture.value
    kind.value = "bf16"
    assert "".join(b.description for b in buttons.children) == floats.encode(0.1, "bf16").bits
    number.value = "nan"
    kind.value = "fp4_e2m1"
    assert "no pattern for it" in picture.value
    number.value = "six"
    assert "six" in picture.value


def test_explorer_leaves_a_still_picture_without_a_kernel(capsys):
    from IPython.utils.capture import capture_output

    from helpers.course import widgets

    with capture_output() as captured:
        widgets.bit_explorer(0.1, "bf16")
    assert "bf16 (normal)" in captured.stdout
