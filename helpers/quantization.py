"""Numbers in fewer bits, from evenly spaced bins to NF4 with double quantization.

Introduced in Chapter 2. Everything here is plain tensor arithmetic in a handful of
vectorized lines, and the codes equal those of bitsandbytes 0.50's CPU kernels bit for bit
(on an H100: NF4's too, though 2 in 1,000 of its double-quantized scales differ; FP4's but
for its two zeros, which change places, and in bfloat16 one byte in nine hundred; int8's but
for one in ten thousand, because CUDA divides less exactly).

Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2110.02861),
"LLM.int8()" (2208.07339) and "QLoRA" (2305.14314).
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

SCHEMES = ("minmax", "absmax", "zero_point")
GROUPS = ("tensor", "row", "block")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE_BLOCK = 256  # second-level block size of double quantization, fixed in bitsandbytes


# ── evenly spaced levels ─────────────────────────────────────────────────────────────────
@dataclass(frozen=True, repr=False, eq=False)
class QuantizedLinear:
    """Evenly spaced levels: value = code * scale + offset, one pair for each group.

    codes: uint8 (int8 for 'absmax'), in the shape of the weights, one byte each whatever
    `bits` is. scale, offset: float32, one per group. zero_point: the code that stands for
    0.0 (int32, one per group) where the scheme has one, else None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    scheme: str
    per: str
    block_size: int
    dtype: torch.dtype

    def dequantize(self, dtype=None):
        """The values the codes stand for, in the weights' shape and (by default) dtype."""
        codes = _groups(self.codes, self.per, self.block_size).float()
        values = codes.mul_(self.scale[:, None]).add_(self.offset[:, None])
        values = values.flatten()[: self.codes.numel()].reshape(self.codes.shape)
        return values.to(dtype or self.dtype)

    @property
    def bits_per_weight(self):
        """Bits per weight with the codes packed tightly, scales and offsets included."""
        extra = {"absmax": 32, "minmax": 64, "zero_point": 32 + self.bits}[self.scheme]
        return self.bits + extra * self.scale.numel() / self.codes.numel()


def quantize_linear(weights, bits=8, *, scheme="absmax", per="tensor", block_size=64):
    """Round weights to 2**bits evenly spaced levels, with a direct formula (Chapter 2).

    weights: float tensor of any shape. bits: 2 to 8.
    scheme: 'absmax' (levels symmetric around zero), 'minmax' (from the smallest to the
        largest weight) or 'zero_point' (likewise, shifted so that 0.0 is a level).
    per: one scale for the whole 'tensor', for every 'row' (last dimension) or for every
        'block' of `block_size` consecutive weights.
    Temporary memory is about one float32 copy of the weights; the first draft that
    compares each weight with each bin needs 2**bits times as much.
    Raises TypeError or ValueError naming the argument; infinities and NaN are refused.
    """
    _check_weights(weights)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, not {scheme!r}")
    if per not in GROUPS:
        raise ValueError(f"per must be one of {GROUPS}, not {per!r}")
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be a whole number from 2 to 8, not {bits!r}")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive whole number, not {block_size!r}")

    groups = _groups(weights.detach(), per, block_size).float()
    low, high = groups.aminmax(dim=1)
    first, last = 0, 2**bits - 1
    zero_point = None
    if scheme == "absmax":
        last = 2 ** (bits - 1) - 1
        first = -last
        scale = _or_one(torch.maximum(-low, high) / last)
        offset = torch.zeros_like(scale)
    elif scheme == "minmax":
        scale, offset = _or_one((high - low) / last), low
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _or_one((high - low) / last)
        zero_point = torch.round(-low / scale)
        offset = -zero_point * scale
        zero_point = zero_point.int()

    codes = (groups - offset[:, None]).div_(scale[:, None]).round_().clamp_(first, last)
    codes = codes.to(torch.int8 if scheme == "absmax" else torch.uint8)
    codes = codes.flatten()[: weights.numel()].reshape(weights.shape)
    return QuantizedLinear(
        codes, scale, offset, zero_point, bits, scheme, per, block_size, weights.dtype
    )


# ── LLM.int8(): rows, and columns that stay out ──────────────────────────────────────────
@dataclass(frozen=True, repr=False, eq=False)
class QuantizedInt8:
    """Row-wise int8 codes of a matrix, and the outlier columns kept out of them.

    codes: int8 (rows, columns). absmax: float32 (rows,); value = code * absmax / 127.
    outlier_columns: indices; outliers: those columns in float16, (rows, outliers).
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    outlier_columns: torch.Tensor
    outliers: torch.Tensor
    dtype: torch.dtype

    def dequantize(self, dtype=None):
        """The matrix again, in its own dtype unless another is given."""
        values = self.codes * self.absmax[:, None] * (1 / 127)
        values[:, self.outlier_columns] = self.outliers.float()
        return values.to(dtype or self.dtype)

    @property
    def bits_per_weight(self):
        """Measured: codes, scales and outlier columns, in bits per weight."""
        parts = (self.codes, self.absmax, self.outlier_columns, self.outliers)
        return 8 * sum(part.nbytes for part in parts) / self.codes.numel()


def quantize_int8(matrix, *, threshold=0.0):
    """Quantize a matrix to int8 with one scale per row, as LLM.int8() does (Chapter 2).

    matrix: weights (out, in) or activations (tokens, features). It passes through float16
    first, as in bitsandbytes' `Linear8bitLt`, whose codes on a CPU these equal.
    threshold: columns holding a magnitude of at least this much are kept in float16; the
    library's default for activations is 6.0, and 0.0 means no outliers.
    Raises ValueError for anything but a finite matrix within float16's range.
    """
    _check_weights(matrix, "matrix")
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have two dimensions, not shape {tuple(matrix.shape)}")
    if not isinstance(threshold, int | float) or not threshold >= 0:
        raise ValueError(f"threshold must be 0.0 (off) or positive, not {threshold!r}")
    half = matrix.detach().to(torch.float16)
    if not math.isfinite(half.abs().max()):
        raise ValueError(
            f"matrix holds values up to {matrix.abs().max():.4g}, beyond float16's 65504, "
            "and LLM.int8() passes through float16: rescale it or use quantize_linear"
        )
    is_outlier = half.abs() >= threshold if threshold else torch.zeros_like(half).bool()
    columns = is_outlier.any(dim=0).nonzero().flatten()
    inliers = half.masked_fill(is_outlier, 0)
    absmax = inliers.abs().amax(dim=1).float()
    # An all-zero row has no scale of its own; any will do for codes that are all 0.
    codes = torch.round(inliers * (127.0 / _or_one(absmax))[:, None]).to(torch.int8)
    codes[:, columns] = 0
    return QuantizedInt8(codes, absmax, columns, half[:, columns], matrix.dtype)


# ── 4 bits in blocks ─────────────────────────────────────────────────────────────────────
def nf4_code_book():
    """The 16 levels of NF4: quantiles of a normal distribution, scaled to [-1, 1].

    Eight positive and seven negative levels, evenly spaced in probability, and an exact
    zero (Chapter 2; QLoRA, section 3). The outermost probability is half-way between
    those of 15 and of 16 equal slices of a normal distribution, to the published digits.
    """
    outermost = round(((1 - 1 / 32) + (1 - 1 / 30)) / 2, 7)

    def quantiles(count):
        # In float32 and from the outside in, as the published table was computed.
        chances = torch.linspace(outermost, 0.5, count + 1)[:-1]
        return torch.special.ndtri(chances.double()).float()

    levels = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8).flip(0)])
    return levels / levels.max()


def fp4_code_book():
    """The 16 levels of bitsandbytes' FP4 by bit pattern: sign, two exponent bits, one more.

    Not sorted: code 3 stands for 1.0. The last bit adds a half, as in any floating-point
    number, but exponents count down and the one subnormal is 1/192 (Chapter 2).
    """
    positive = [0.0, 2.0**-4]  # exponent field 0: subnormal
    positive += [2.0 ** (4 - e) * (1 + m / 2) for e in (1, 2, 3) for m in (0, 1)]
    levels = torch.tensor(positive) / max(positive)
    return torch.cat([levels, -levels])


def dynamic_code_book():
    """The 256 levels double quantization uses for block scales: dense near zero.

    Seven decades, each with twice as many levels as the one below it, both signs, 0 and 1:
    the "dynamic tree" data type (Dettmers, 1511.04561).
    """
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


CODE_BOOKS = {"nf4": nf4_code_book, "fp4": fp4_code_book}


@dataclass(frozen=True, repr=False, eq=False)
class Quantized4Bit:
    """4-bit codes in blocks; the buffers are those of bitsandbytes' quantized layer.

    codes: uint8 (pairs, 1), two codes a byte, the first in the high half. block_scales:
    float32 (blocks,), or uint8 codes of them when double-quantized; then nested_absmax
    (float32, one per 256 blocks) and offset (their mean) decode them.
    """

    codes: torch.Tensor
    block_scales: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    kind: str
    block_size: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def absmax(self):
        """Block scales in float32 as `dequantize` uses them, decoded where necessary."""
        if self.nested_absmax is None:
            return self.block_scales
        book = dynamic_code_book().to(self.codes.device)
        values = _blocks(book[self.block_scales.int()], SCALE_BLOCK)
        values = values * self.nested_absmax[:, None]
        return values.flatten()[: self.block_scales.numel()] + self.offset

    def levels(self):
        """The code of every weight, 0 to 15, unpacked into the weights' shape (uint8)."""
        pairs = torch.cat([self.codes >> 4, self.codes & 15], dim=1)
        return pairs.flatten()[: self.shape.numel()].reshape(self.shape)

    def dequantize(self, dtype=None):
        """The matrix again: code book times block scale, in its own dtype by default."""
        book = CODE_BOOKS[self.kind]().to(self.codes.device)
        values = _blocks(book[self.levels().int()].flatten(), self.block_size)
        values = values * self.absmax[:, None]
        values = values.flatten()[: self.shape.numel()].reshape(self.shape)
        return values.to(dtype or self.dtype)

    @property
    def bits_per_weight(self):
        """Measured from the stored codes and both levels of scales."""
        parts = (self.codes, self.block_scales, self.nested_absmax)
        bytes_ = sum(part.nbytes for part in parts if part is not None)
        return 8 * bytes_ / self.shape.numel()


def quantize_nf4(weights, *, block_size=64, double_quantize=False):
    """Quantize to NF4 in blocks, codes and scales as bitsandbytes has them (Chapter 2).

    weights: float32, bfloat16 or float16 of any shape; blocks run over the flattened
    weights and the last may be short. block_size: a power of two from 32 to 4096.
    double_quantize: store the block scales in 8 bits, in blocks of 256.
    Returns a `Quantized4Bit`. Raises TypeError for other dtypes, ValueError for a wrong
    block size, nothing to quantize, infinities or NaN. Source: QLoRA, section 3.
    """
    return _quantize_4bit(weights, "nf4", block_size, double_quantize)


def quantize_fp4(weights, *, block_size=64, double_quantize=False):
    """Quantize to 4-bit floating point in blocks; see `quantize_nf4` (Chapter 2)."""
    return _quantize_4bit(weights, "fp4", block_size, double_quantize)


def _quantize_4bit(weights, kind, block_size, double_quantize):
    _check_weights(weights)
    _check_block_size(block_size)
    weights = weights.detach()
    count, shape, dtype = weights.numel(), weights.shape, weights.dtype
    blocks = _blocks(weights.flatten().float(), block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    if count % block_size:
        # The library divides in a short last block and multiplies by 1/absmax in all
        # others; on a tie between two levels the last bit of that decides.
        absmax[-1].clamp_(min=1e-38)
        scaled[-1] = blocks[-1] / absmax[-1]
    pairs = functional.pad(scaled.flatten()[:count], (0, count % 2))
    codes = _nearest(pairs, CODE_BOOKS[kind]()).view(-1, 2)
    packed = (codes[:, :1] << 4) | codes[:, 1:]
    scales, nested_absmax, offset = absmax, None, None
    if double_quantize:
        offset = absmax.mean()
        scales, nested_absmax = _quantize_scales(absmax - offset)
    return Quantized4Bit(packed, scales, nested_absmax, offset, kind, block_size, shape, dtype)


def _quantize_scales(scales):
    """8-bit codes of centered block scales and the largest magnitude per 256 of them."""
    blocks = _blocks(scales, SCALE_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    # An all-zero block (0 * 1/0 is NaN) gets code 0, which is harmless: its scale is 0.
    scaled = (blocks * (1 / absmax)[:, None]).nan_to_num(nan=-1.0)
    if scaled.device.type == "cpu":
        # Where a GPU compares with exact midpoints, the library's CPU kernel looks the
        # code up in a table of 65,536 entries: round to its grid first, to agree.
        scaled = torch.floor((scaled + 1) * 32767.5 + 0.5) / 32767.5 - 1
    codes = _nearest(scaled.flatten()[: scales.numel()], dynamic_code_book())
    return codes, absmax


def _nearest(values, book):
    """uint8 index into `book` of the level nearest to each value, whatever its order."""
    # Stable: FP4 has two zeros, and the lower code is for zero and what is just below it.
    levels, order = book.to(values.device).sort(stable=True)
    place = torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return order.to(torch.uint8)[place]


def bits_per_weight(shape, *, block_size=64, double_quantize=True):
    """Storage cost of one 4-bit matrix, in bits per weight (Chapter 2; QLoRA, section 3).

    shape: (rows, columns). Counts codes, block scales and, with `double_quantize`, the
    second-level scales; not the constant 64-byte code book and the like. For a large
    matrix: 4 + 32/64 = 4.5, and 4 + 8/64 + 32/(64 * 256) = 4.127 double-quantized.
    Raises ValueError if `block_size` is not a power of two between 32 and 4096.
    """
    _check_block_size(block_size)
    shape = tuple(shape)
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"shape must hold positive whole numbers, not {shape}")
    weights = math.prod(shape)
    blocks = math.ceil(weights / block_size)
    scales = 32 * blocks
    if double_quantize:
        scales = 8 * blocks + 32 * math.ceil(blocks / SCALE_BLOCK)
    return (8 * math.ceil(weights / 2) + scales) / weights


# ── how wrong is it? ─────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, repr=False, eq=False)
class ErrorReport:
    """What quantization did to one tensor; prints itself and plots itself.

    rmse: root of the mean squared error, and worst: the largest error, both in the unit
    of the weights. snr: signal to noise in decibels (each bit is worth about 6).
    bits_per_weight: storage, scales included.
    """

    name: str
    bits_per_weight: float
    rmse: float
    worst: float
    snr: float
    weights: torch.Tensor
    restored: torch.Tensor

    def __repr__(self):
        return (
            f"{self.name}: {self.bits_per_weight:.3f} bits per weight, "
            f"RMSE {self.rmse:.3g}, worst {self.worst:.3g}, SNR {self.snr:.1f} dB"
        )

    def plot(self):
        """The weights and the values they were rounded to, beside the errors; a Figure."""
        from helpers import plots

        fig, (left, right) = plots.figure(1, 2, width=9, height=3)
        weights, restored = self.weights.flatten(), self.restored.flatten()
        left.hist(weights.numpy(), bins=120, color=plots.COLORS["sky"])
        levels = restored.unique()
        if len(levels) <= 256:
            bottom = left.get_xaxis_transform()  # x in weights, y in heights of the plot
            left.vlines(levels, 0, 0.12, color="black", lw=0.8, transform=bottom)
        title = f"{len(levels):,} distinct value{'s' * (len(levels) > 1)} remain"
        left.set(title=title, xlabel="weight", ylabel="count", yscale="log")
        right.hist((restored - weights).numpy(), bins=120, color=plots.COLORS["orange"])
        title = f"RMSE {self.rmse:.3g}, SNR {self.snr:.1f} dB"
        right.set(title=title, xlabel="error", ylabel="count")
        return fig


def error_report(weights, quantized, name=None):
    """Compare weights with their quantized form: RMSE, worst case, SNR, bits (Chapter 2).

    quantized: what a function of this module returned, or a tensor of the same shape (of
    another dtype, say). Returns an `ErrorReport`; raises ValueError if the shapes differ.
    """
    if isinstance(quantized, torch.Tensor):
        restored, bits = quantized, 8.0 * quantized.element_size()
        name = name or str(quantized.dtype).removeprefix("torch.")
    else:
        restored, bits = quantized.dequantize(torch.float32), quantized.bits_per_weight
    if restored.shape != weights.shape:
        raise ValueError(
            f"quantized has shape {tuple(restored.shape)}, weights {tuple(weights.shape)}; "
            "both must describe the same tensor"
        )
    weights, restored = weights.detach().float().cpu(), restored.detach().float().cpu()
    error = (restored - weights).double()
    noise, signal = error.square().mean().item(), weights.double().square().mean().item()
    snr = 10 * math.log10(signal / noise) if noise and signal else math.inf
    name = name or getattr(quantized, "kind", type(quantized).__name__)
    worst = error.abs().max().item()
    return ErrorReport(name, bits, math.sqrt(noise), worst, snr, weights, restored)


def compare_errors(weights, candidates):
    """Error reports of several quantized forms of the same weights in a table (Chapter 2).

    candidates: `{name: quantized}`, each as in `error_report`. Returns a pandas DataFrame
    with one row for each and the columns bits_per_weight, rmse, worst and snr.
    """
    import pandas

    reports = [error_report(weights, quantized, n) for n, quantized in candidates.items()]
    columns = ("bits_per_weight", "rmse", "worst", "snr")
    rows = [[getattr(report, column) for column in columns] for report in reports]
    return pandas.DataFrame(rows, index=list(candidates), columns=list(columns))


# ── shared small pieces ──────────────────────────────────────────────────────────────────
def _groups(values, per, block_size):
    """A 2-D view or copy with one row for each group that shares a scale."""
    if per == "tensor":
        return values.reshape(1, -1)
    if per == "row":
        return values.reshape(-1, values.shape[-1] if values.ndim else 1)
    return _blocks(values.flatten(), block_size)


def _blocks(flat, block_size):
    """(blocks, block_size); a short last block repeats its last value, so that neither
    its smallest nor its largest value changes.
    """
    if missing := -flat.numel() % block_size:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.reshape(-1, block_size)


def _or_one(scale):
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _check_weights(weights, name="weights"):
    if not isinstance(weights, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, not {type(weights).__name__}")
    if weights.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, not {weights.dtype}; "
            f"convert with {name}.float()"
        )
    if not weights.numel():
        raise ValueError(f"{name} is empty (shape {tuple(weights.shape)})")
    # The extremes of a tensor with a NaN are NaN: no mask as large as the tensor needed.
    if not all(math.isfinite(extreme) for extreme in weights.detach().aminmax()):
        bad = int((~torch.isfinite(weights)).sum())
        raise ValueError(
            f"{name} holds {bad} infinite or NaN value(s) of {weights.numel():,}; "
            "one would spoil the scale of everything that shares it. Find them with "
            f"torch.isfinite({name})"
        )


def _check_block_size(block_size):
    if block_size not in {2**n for n in range(5, 13)}:
        raise ValueError(
            f"block_size must be a power of two between 32 and 4096, not {block_size!r}"
        )
