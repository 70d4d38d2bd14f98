"""Our quantizers against bitsandbytes, against definitions, and against bad input."""

import io
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import models, quantization

FOUR_BIT = {"nf4": quantization.quantize_nf4, "fp4": quantization.quantize_fp4}


@pytest.fixture(scope="module")
def bnb():
    import bitsandbytes

    return bitsandbytes


@pytest.fixture(scope="module")
def layer_weights():
    """The query projection of the embedded model's layer 3, (576, 576) in float32."""
    from safetensors import safe_open

    (path,) = models.embedded_folder().glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return file.get_tensor("model.layers.3.self_attn.q_proj.weight").float()


def matrices():
    """Ten matrices of different shapes and scales, with outliers, zeros and ties."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    outliers = normal(96, 192, scale=0.02)
    outliers.view(-1)[::97] *= 60
    zero_blocks = normal(64, 256)
    zero_blocks[::2] = 0
    ties = torch.randint(-24, 25, (128, 64), generator=generator).float()
    return {
        "plain": normal(64, 64),
        "tiny": normal(192, 576, scale=1e-4),
        "large": normal(576, 192, scale=300.0),
        "vanishing": normal(64, 128, scale=1e-30),
        "outliers": outliers,
        "zero blocks": zero_blocks,
        "all zeros": torch.zeros(64, 64),
        "ties": ties,
        "uniform": torch.rand(256, 128, generator=generator) - 0.3,
        "odd": normal(129, 65, scale=0.05),
        "bfloat16": normal(64, 320).bfloat16(),
        "float16": normal(320, 64).half(),
    }


def within_one_ulp(ours, theirs):
    """Whether two tensors of one dtype differ by at most one step of that dtype."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    size = torch.maximum(ours.abs(), theirs.abs()).double()
    step = size * torch.finfo(ours.dtype).eps
    return bool(((ours.double() - theirs.double()).abs() <= step).all())


# ── code books ───────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_code_books_equal_the_library(bnb, kind):
    theirs = bnb.functional.get_4bit_type(kind, device="cpu")
    assert torch.equal(quantization.CODE_BOOKS[kind](), theirs)


def test_dynamic_code_book_equals_the_library(bnb):
    theirs = bnb.functional.create_dynamic_map()
    assert torch.equal(quantization.dynamic_code_book(), theirs)


def test_nf4_levels_are_equally_probable_within_each_half():
    normal = torch.distributions.Normal(0, 1)
    scale = torch.special.ndtri(torch.tensor(0.9677083))
    chances = normal.cdf(quantization.nf4_code_book() * scale)
    for half in (chances[:8], chances[7:]):
        assert half.diff() == pytest.approx(half.diff().mean().item(), abs=1e-4)


# ── NF4 and FP4 against bitsandbytes ─────────────────────────────────────────────────────
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize("name", matrices())
def test_4bit_equals_bitsandbytes(bnb, name, kind, double):
    check_4bit(bnb, matrices()[name], kind, double)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_4bit_equals_bitsandbytes_on_a_real_layer(bnb, layer_weights, kind, double):
    check_4bit(bnb, layer_weights, kind, double)


def check_4bit(bnb, weights, kind, double):
    ours = FOUR_BIT[kind](weights, double_quantize=double)
    codes, state = bnb.functional.quantize_4bit(
        weights, blocksize=64, quant_type=kind, compress_statistics=double
    )
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.block_scales, state.absmax)
    scales = state.absmax
    if double:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
        scales += state.offset
    assert within_one_ulp(ours.absmax, scales)
    theirs = bnb.functional.dequantize_4bit(codes, state)
    assert within_one_ulp(ours.dequantize(), theirs)


@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5), (63,), (65,), (2, 3, 5, 7)])
def test_odd_sizes(bnb, kind, shape):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for double in (False, True):
        ours = FOUR_BIT[kind](weights, double_quantize=double)
        codes, state = bnb.functional.quantize_4bit(
            weights, blocksize=64, quant_type=kind, compress_statistics=double
        )
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.block_scales, state.absmax)
        restored = ours.dequantize()
        assert restored.shape == weights.shape
        assert ours.levels().shape == weights.shape
        if not double:  # the largest weight of a block is its scale: restored exactly
            assert restored.abs().max() == weights.abs().max()


@pytest.mark.parametrize("block_size", [32, 128, 1024, 4096])
def test_other_block_sizes(bnb, block_size):
    weights = torch.randn(48, 100, generator=torch.Generator().manual_seed(2))
    ours = quantization.quantize_nf4(weights, block_size=block_size)
    codes, state = bnb.functional.quantize_4bit(weights, blocksize=block_size, quant_type="nf4")
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, state.absmax)
    # Not compared with the library's dequantize_4bit: on the CPU, 0.50 restarts its blocks
    # at every row, which is wrong when a row is not a multiple of the block.
    book = quantization.nf4_code_book()
    blocks = torch.arange(weights.numel()) // block_size
    expected = book[ours.levels().flatten().int()] * ours.absmax[blocks]
    assert torch.equal(ours.dequantize().flatten(), expected)


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_non_contiguous_input(kind):
    weights = torch.randn(70, 66, generator=torch.Generator().manual_seed(3))
    view = weights.t()[1:, ::2]
    assert not view.is_contiguous()
    ours, plain = FOUR_BIT[kind](view), FOUR_BIT[kind](view.contiguous())
    assert torch.equal(ours.codes, plain.codes)
    assert torch.equal(ours.dequantize(), plain.dequantize())


def test_parameters_are_left_alone():
    weights = torch.nn.Parameter(torch.randn(8, 64))
    before = weights.detach().clone()
    quantizers = (
        quantization.quantize_nf4,
        quantization.quantize_int8,
        quantization.quantize_linear,
    )
    for quantize in quantizers:
        assert not quantize(weights).dequantize().requires_grad
    assert torch.equal(weights, before)


def test_half_precision_comes_back_in_its_own_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        weights = torch.randn(64, 64).to(dtype)
        assert quantization.quantize_nf4(weights).dequantize().dtype == dtype
        assert quantization.quantize_linear(weights).dequantize().dtype == dtype
        assert quantization.quantize_nf4(weights).dequantize(torch.float32).dtype.itemsize == 4


# ── int8 against Linear8bitLt ────────────────────────────────────────────────────────────
def real_int8_layer(bnb, weights):
    rows, columns = weights.shape
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weights})
    return layer.to("cpu")


@pytest.mark.parametrize("name", matrices())
def test_int8_equals_the_real_layer(bnb, name):
    weights = matrices()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its own 0 / 0 on zero rows
        layer = real_int8_layer(bnb, weights.float())
    ours = quantization.quantize_int8(weights)
    assert torch.equal(ours.codes, layer.weight.data)
    assert torch.equal(ours.absmax, layer.weight.SCB)


def test_int8_equals_the_real_layer_on_real_weights(bnb, layer_weights):
    layer = real_int8_layer(bnb, layer_weights)
    ours = quantization.quantize_int8(layer_weights)
    assert torch.equal(ours.codes, layer.weight.data)
    assert torch.equal(ours.absmax, layer.weight.SCB)
    theirs = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert within_one_ulp(ours.dequantize(), theirs)


def test_int8_outlier_columns_equal_the_library(bnb):
    activations = torch.randn(32, 128, generator=torch.Generator().manual_seed(4))
    activations[:, 17] *= 20
    activations[3, 90] = -7.0
    ours = quantization.quantize_int8(activations, threshold=6.0)
    codes, absmax, columns = bnb.functional.int8_vectorwise_quant(activations.half(), threshold=6.0)
    assert {17, 90} <= set(ours.outlier_columns.tolist())
    assert torch.equal(ours.outlier_columns, columns)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    restored = ours.dequantize()
    assert torch.equal(restored[:, 17], activations[:, 17].half().float())


def test_int8_outliers_rescue_the_other_columns():
    activations = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    activations[:, 5] = 60.0
    rest = torch.arange(64) != 5
    rmse = {}
    for threshold in (0.0, 6.0):
        restored = quantization.quantize_int8(activations, threshold=threshold).dequantize()
        rmse[threshold] = (restored - activations)[:, rest].square().mean().sqrt().item()
    assert rmse[6.0] < rmse[0.0] / 10


def test_int8_of_zeros_and_of_one_element():
    assert not quantization.quantize_int8(torch.zeros(3, 4)).dequantize().any()
    one = quantization.quantize_int8(torch.tensor([[-0.5]]))
    assert one.codes.item() == -127 and one.dequantize().item() == pytest.approx(-0.5)


# ── evenly spaced levels ─────────────────────────────────────────────────────────────────
def test_minmax_by_hand():
    weights = torch.tensor([-1.0, -0.4, 0.1, 2.0])
    ours = quantization.quantize_linear(weights, 2, scheme="minmax")
    assert ours.codes.tolist() == [0, 1, 1, 3]  # steps of 1.0 from -1.0
    assert ours.dequantize().tolist() == [-1.0, 0.0, 0.0, 2.0]


def test_absmax_by_hand():
    ours = quantization.quantize_linear(torch.tensor([-1.0, 0.2, 0.6, 3.0]), 3)
    assert ours.codes.tolist() == [-1, 0, 1, 3]
    assert ours.dequantize().tolist() == [-1.0, 0.0, 1.0, 3.0]


@pytest.mark.parametrize("low", [-0.013, -5.0, 0.2])
def test_zero_point_keeps_zero_exact(low):
    weights = torch.cat([torch.zeros(1), torch.linspace(low, 1.7, 99)])
    ours = quantization.quantize_linear(weights, 4, scheme="zero_point")
    assert ours.dequantize()[0] == 0.0
    assert ours.codes[0] == ours.zero_point.item()


def test_the_smallest_weight_has_code_zero():
    """The book's helper gives it bin -1."""
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(6))
    for bits in range(2, 9):
        for scheme in ("minmax", "zero_point"):
            codes = quantization.quantize_linear(weights, bits, scheme=scheme).codes
            assert codes[weights.argmin()] == 0
            assert codes[weights.argmax()] == 2**bits - 1
            assert codes.dtype == torch.uint8


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=200),
    bits=st.integers(2, 8),
    scheme=st.sampled_from(quantization.SCHEMES),
    per=st.sampled_from(quantization.GROUPS),
)
def test_linear_error_is_at_most_half_a_step(values, bits, scheme, per):
    weights = torch.tensor(values)
    ours = quantization.quantize_linear(weights, bits, scheme=scheme, per=per, block_size=16)
    assert ours.codes.shape == weights.shape
    error = (ours.dequantize() - weights).abs()
    step = ours.scale.repeat_interleave(math.ceil(len(values) / len(ours.scale)))
    if per == "block":
        step = ours.scale.repeat_interleave(16)[: len(values)]
    # Half a step, plus float32's own rounding of numbers this large; the zero point is
    # itself rounded, which can push the outermost weight another half step away.
    slack = 1.01 if scheme == "zero_point" else 0.51
    assert (error <= slack * step[: len(values)] + 1e-6 * weights.abs().max()).all()


def test_smaller_groups_mean_smaller_errors():
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(8)) * 0.02
    weights[5, 7] = 1.0
    rmse = [
        quantization.error_report(weights, quantization.quantize_linear(weights, 4, per=per)).rmse
        for per in ("tensor", "row", "block")
    ]
    assert rmse == sorted(rmse, reverse=True) and rmse[0] > 2 * rmse[2]


def test_constant_tensors_survive():
    for value in (0.0, 3.25, -3.25):
        weights = torch.full((5, 3), value)
        for scheme in quantization.SCHEMES:
            restored = quantization.quantize_linear(weights, 4, scheme=scheme).dequantize()
            assert torch.allclose(restored, weights)


class PeakBytes(TorchDispatchMode):
    """Follow the bytes of the tensors operators return, for as long as each lives."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        import weakref

        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("scheme", quantization.SCHEMES)
@pytest.mark.parametrize("per", quantization.GROUPS)
def test_linear_memory_is_a_few_times_the_input(scheme, per):
    """The book's helper needs 1.5 GB for a million weights at 8 bits."""
    weights = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(9))
    with PeakBytes() as memory:
        quantization.quantize_linear(weights, 8, scheme=scheme, per=per)
    assert weights.nbytes / 4 <= memory.peak <= 4 * weights.nbytes


def test_peak_bytes_sees_a_blow_up():
    """The measuring stick itself: comparing with every bin costs hundreds of times more."""
    weights = torch.randn(10_000)
    with PeakBytes() as memory:
        (weights[:, None] > torch.linspace(-1, 1, 256)).sum(dim=1)
    assert memory.peak > 60 * weights.nbytes


# ── storage ──────────────────────────────────────────────────────────────────────────────
def test_bits_per_weight_of_large_matrices():
    bits = quantization.bits_per_weight
    assert bits((4096, 4096)) == pytest.approx(4.127, abs=5e-4)
    assert bits((4096, 4096), double_quantize=False) == 4.5
    assert bits((4096, 4096), block_size=32, double_quantize=False) == 5.0
    assert bits((1, 1), double_quantize=False) == 8 + 32


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (7, 9), (1, 1)])
def test_bits_per_weight_equals_the_buffers(bnb, shape, double):
    weights = torch.randn(shape)
    formula = quantization.bits_per_weight(shape, double_quantize=double)
    ours = quantization.quantize_nf4(weights, double_quantize=double)
    assert ours.bits_per_weight == pytest.approx(formula, rel=1e-12)
    codes, state = bnb.functional.quantize_4bit(
        weights, quant_type="nf4", compress_statistics=double
    )
    measured = codes.nbytes + state.absmax.nbytes
    measured += state.state2.absmax.nbytes if double else 0
    assert 8 * measured / weights.numel() == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192, 64.5, "64", None])
def test_bits_per_weight_refuses_odd_block_sizes(block_size):
    with pytest.raises(ValueError, match=r"block_size must be one of 32, 64, .*, 4096, not"):
        quantization.bits_per_weight((64, 64), block_size=block_size)


@pytest.mark.parametrize("shape", [(), (0, 4), (2.5, 4), (-1, 4)])
def test_bits_per_weight_refuses_odd_shapes(shape):
    with pytest.raises(ValueError, match="shape must hold positive whole numbers"):
        quantization.bits_per_weight(shape)


# ── reports ──────────────────────────────────────────────────────────────────────────────
def test_error_report_by_hand():
    weights = torch.tensor([3.0, -4.0])
    report = quantization.error_report(weights, torch.tensor([3.0, -3.0]))
    assert report.worst == 1.0
    assert report.rmse == pytest.approx(math.sqrt(0.5))
    assert report.snr == pytest.approx(10 * math.log10(25))
    assert report.bits_per_weight == 32
    assert "SNR 14.0 dB" in str(report)


def test_error_report_of_a_perfect_copy():
    weights = torch.ones(4)
    assert quantization.error_report(weights, weights).snr == math.inf


def test_error_report_plots_itself():
    weights = torch.randn(32, 64)
    fig = quantization.error_report(weights, quantization.quantize_nf4(weights)).plot()
    left, right = fig.axes
    assert left.get_xlabel() and right.get_xlabel() and "SNR" in right.get_title(loc="left")
    assert left.get_title(loc="left") == f"4.5 bits per weight: {left_count(weights)} values"


def left_count(weights):
    return len(quantization.quantize_nf4(weights).dequantize().unique())


@pytest.mark.parametrize(("spread", "per"), [(0.02, "tensor"), (1e-6, "row"), (30.0, "block")])
def test_error_report_says_how_and_its_tick_labels_do_not_collide(spread, per):
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * spread
    quantized = quantization.quantize_linear(weights, 4, scheme="minmax", per=per)
    fig = quantization.error_report(weights, quantized).plot()
    assert fig.axes[0].get_title(loc="left").startswith(f"4 bits, minmax, per {per}: ")
    fig.savefig(io.BytesIO())
    for ax in fig.axes:
        low, high = ax.get_xlim()
        ticks = [t for t in ax.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        boxes = [t.label1.get_window_extent() for t in ticks]
        assert len(boxes) >= 3
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_compare_errors_ranks_the_formats():
    weights = torch.randn(128, 256, generator=torch.Generator().manual_seed(10)) * 0.02
    table = quantization.compare_errors(
        weights,
        {
            "bf16": weights.bfloat16(),
            "int8": quantization.quantize_int8(weights),
            "nf4": quantization.quantize_nf4(weights),
            "fp4": quantization.quantize_fp4(weights),
        },
    )
    assert list(table["snr"]) == sorted(table["snr"], reverse=True)
    assert table.loc["nf4", "bits_per_weight"] == 4.5
    assert table.loc["bf16", "bits_per_weight"] == 16


def test_error_report_refuses_other_shapes():
    with pytest.raises(ValueError, match="quantized has shape"):
        quantization.error_report(torch.ones(4), torch.ones(5))


def test_the_explorer_draws_every_choice(monkeypatch):
    from helpers.course import _explorer, widgets

    shown = {}
    monkeypatch.setattr(widgets, "explore", lambda draw, **c: shown.update(draw=draw, **c))
    widgets.explore_quantization(torch.randn(8, 64))
    low, high, _, start = shown["bits"]
    assert low <= start <= high
    for scheme in shown["scheme"]:
        for per in shown["per"]:
            still, told = _explorer.still(shown["draw"](start, scheme, per))
            assert still["image/png"] and len(told["image/png"]["alt"]) > 20


def test_results_say_what_they_are():
    weights = torch.ones(4, 64)
    assert str(quantization.quantize_nf4(weights)) == (
        "Quantized4Bit: 4 × 64 weights, 4.500 bits each"
    )
    assert "8.125 bits" in repr(quantization.quantize_linear(weights))
    assert "8.500 bits" in quantization.quantize_int8(weights)._repr_html_()


# ── refusals ─────────────────────────────────────────────────────────────────────────────
QUANTIZERS = {
    **FOUR_BIT,
    "int8": quantization.quantize_int8,
    "linear": quantization.quantize_linear,
}


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_infinities_and_nan_are_refused(name, dtype, bad):
    weights = torch.ones(3, 64, dtype=dtype)
    weights[1, 5] = bad
    with pytest.raises(ValueError, match="holds 1 infinite or NaN value"):
        QUANTIZERS[name](weights)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_wrong_types_are_refused(name):
    for bad in (torch.ones(2, 2).double(), torch.ones(2, 2).int()):
        with pytest.raises(TypeError, match="must be float32, bfloat16 or float16"):
            QUANTIZERS[name](bad)
    with pytest.raises(TypeError, match="must be a torch tensor, not list"):
        QUANTIZERS[name]([[1.0, 2.0]])
    with pytest.raises(ValueError, match="is empty"):
        QUANTIZERS[name](torch.empty(0, 4))


def test_wrong_settings_are_refused():
    weights = torch.ones(2, 64)
    with pytest.raises(ValueError, match=r"block_size must be one of 32, 64, .*, 4096, not"):
        quantization.quantize_nf4(weights, block_size=60)
    with pytest.raises(ValueError, match="bits must be from 2 to 8, not 16"):
        quantization.quantize_linear(weights, 16)
    with pytest.raises(TypeError, match=r"bits must be a whole number, not 4\.0"):
        quantization.quantize_linear(weights, 4.0)
    with pytest.raises(ValueError, match="scheme must be one of"):
        quantization.quantize_linear(weights, scheme="symmetric")
    with pytest.raises(ValueError, match="per must be one of"):
        quantization.quantize_linear(weights, per="column")
    with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
        quantization.quantize_linear(weights, per="block", block_size=0)
    with pytest.raises(ValueError, match="two dimensions"):
        quantization.quantize_int8(torch.ones(4))
    with pytest.raises(ValueError, match="threshold must be"):
        quantization.quantize_int8(weights, threshold=-1)
    with pytest.raises(ValueError, match="beyond float16's 65504"):
        quantization.quantize_int8(weights * 1e6)
