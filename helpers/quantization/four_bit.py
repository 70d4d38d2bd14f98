"""NF4 and FP4: 4 bits in blocks, with double quantization of the scales (Chapter 2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from helpers._checks import one_of
from helpers.quantization._shared import Quantized, check_weights, in_blocks

_BLOCK_SIZES = [2**n for n in range(5, 13)]
_SCALE_BLOCK = 256  # block scales that share a second-level scale, fixed in bitsandbytes


# ── code books ───────────────────────────────────────────────────────────────────────────
def nf4_code_book() -> Tensor:
    """The 16 levels of NF4: quantiles of a normal distribution, scaled to [-1, 1].

    Eight positive and seven negative levels, evenly spaced in probability, and an exact zero
    (Chapter 2; QLoRA, section 3). The outermost probability is half-way between those of 15 and
    of 16 equal slices of a normal distribution, to the published digits.

    Example:
        >>> nf4_code_book()[6:10]
        tensor([-0.0911,  0.0000,  0.0796,  0.1609])
    """
    outermost = round(((1 - 1 / 32) + (1 - 1 / 30)) / 2, 7)

    def quantiles(count: int) -> Tensor:
        # In float32 and from the outside in, as the published table was computed.
        chances = torch.linspace(outermost, 0.5, count + 1)[:-1]
        return torch.special.ndtri(chances.double()).float()

    levels = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8).flip(0)])
    return levels / levels.max()


def fp4_code_book() -> Tensor:
    """The 16 levels of bitsandbytes' FP4 by bit pattern: sign, two exponent bits, one more.

    Not sorted: code 3 stands for 1.0. The last bit adds a half, as in any floating-point
    number, but exponents count down and the one subnormal is 1/192 (Chapter 2).

    Example:
        >>> fp4_code_book()[:4]
        tensor([0.0000, 0.0052, 0.6667, 1.0000])
    """
    positive = [0.0, 2.0**-4]  # exponent field 0: subnormal
    positive += [2.0 ** (4 - e) * (1 + m / 2) for e in (1, 2, 3) for m in (0, 1)]
    levels = torch.tensor(positive) / max(positive)
    return torch.cat([levels, -levels])


def dynamic_code_book() -> Tensor:
    """The 256 levels double quantization uses for block scales: dense near zero.

    Seven decades, each with twice as many levels as the one below it, both signs, 0 and 1:
    the "dynamic tree" data type (Chapter 2; Dettmers, 1511.04561).

    Example:
        >>> (dynamic_code_book().abs() < 0.1).sum()
        tensor(127)
    """
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


CODE_BOOKS = {"nf4": nf4_code_book, "fp4": fp4_code_book}


# ── codes in blocks ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, repr=False, eq=False)
class Quantized4Bit(Quantized):
    """4-bit codes in blocks; the buffers are those of bitsandbytes' quantized layer.

    codes: uint8 (pairs, 1), two codes a byte, the first in the high half. block_scales: float32
    (blocks,), or uint8 codes of them when double-quantized; then nested_absmax (float32, one per
    256 blocks) and offset (their mean) decode them.
    """

    block_scales: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    kind: str
    block_size: int

    @property
    def absmax(self) -> Tensor:
        """Block scales in float32, decoded where necessary."""
        if self.nested_absmax is None or self.offset is None:
            return self.block_scales
        book = dynamic_code_book().to(self.codes.device)
        values = in_blocks(book[self.block_scales.int()], _SCALE_BLOCK)
        values = values * self.nested_absmax[:, None]
        return values.flatten()[: self.block_scales.numel()] + self.offset

    def levels(self) -> Tensor:
        """The code of every weight, 0 to 15, in the weights' shape (uint8)."""
        pairs = torch.cat([self.codes >> 4, self.codes & 15], dim=1)
        return pairs.flatten()[: self.shape.numel()].reshape(self.shape)

    def _values(self) -> Tensor:
        book = CODE_BOOKS[self.kind]().to(self.codes.device)
        return in_blocks(book[self.levels().int()], self.block_size) * self.absmax[:, None]


def quantize_nf4(
    weights: Tensor, *, block_size: int = 64, double_quantize: bool = False
) -> Quantized4Bit:
    """Quantize to NF4 in blocks, as bitsandbytes does (Chapter 2; QLoRA, section 3).

    Args:
        weights: float32, bfloat16 or float16 of any shape, and finite; blocks run over the
            flattened weights and the last may be short.
        block_size: a power of two from 32 to 4096.
        double_quantize: store the block scales in 8 bits, in blocks of 256.

    Example:
        >>> quantize_nf4(torch.tensor([-2.0, 0.0, 2.0])).dequantize()
        tensor([-2.,  0.,  2.])
    """
    return _quantize(weights, "nf4", block_size, double_quantize)


def quantize_fp4(
    weights: Tensor, *, block_size: int = 64, double_quantize: bool = False
) -> Quantized4Bit:
    """Quantize to 4-bit floating point in blocks, as bitsandbytes does (Chapter 2).

    Args:
        weights: as in `quantize_nf4`.
        block_size: as in `quantize_nf4`.
        double_quantize: as in `quantize_nf4`.

    Example:
        >>> quantize_fp4(torch.tensor([-3.0, 0.0, 1.9])).dequantize()
        tensor([-3.,  0.,  2.])
    """
    return _quantize(weights, "fp4", block_size, double_quantize)


def bits_per_weight(
    shape: Sequence[int], *, block_size: int = 64, double_quantize: bool = True
) -> float:
    """Storage cost of one 4-bit matrix, in bits per weight (Chapter 2; QLoRA, section 3).

    Counts codes, block scales and, with `double_quantize`, the second-level scales; not the
    constant 64-byte code book and the like.

    Args:
        shape: (rows, columns).
        block_size: a power of two from 32 to 4096.
        double_quantize: block scales of 8 bits instead of 32.

    Example:
        >>> bits_per_weight((4096, 4096), double_quantize=False)  # 4 + 32/64
        4.5
        >>> round(bits_per_weight((4096, 4096)), 3)  # 4 + 8/64 + 32/(64 * 256)
        4.127
    """
    one_of("block_size", block_size, _BLOCK_SIZES)
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"shape must hold positive whole numbers, not {tuple(shape)}")
    weights = math.prod(shape)
    blocks = math.ceil(weights / block_size)
    scales = 32 * blocks
    if double_quantize:
        scales = 8 * blocks + 32 * math.ceil(blocks / _SCALE_BLOCK)
    return (8 * math.ceil(weights / 2) + scales) / weights


def _quantize(weights: Tensor, kind: str, block_size: int, double_quantize: bool) -> Quantized4Bit:
    check_weights(weights)
    one_of("block_size", block_size, _BLOCK_SIZES)
    blocks = in_blocks(weights.detach().float(), block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    if weights.numel() % block_size:
        _divide_in_the_short_block(blocks, absmax, scaled)
    # Two codes share a byte: an odd number of weights gets a zero for company.
    pairs = functional.pad(scaled.flatten()[: weights.numel()], (0, weights.numel() % 2))
    codes = _nearest(pairs, CODE_BOOKS[kind]()).view(-1, 2)
    codes = (codes[:, :1] << 4) | codes[:, 1:]
    scales, nested_absmax, offset = absmax, None, None
    if double_quantize:
        offset = absmax.mean()
        scales, nested_absmax = _quantize_scales(absmax - offset)
    scaling = (scales, nested_absmax, offset)
    return Quantized4Bit(codes, weights.shape, weights.dtype, *scaling, kind, block_size)


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of centered block scales and the largest magnitude per 256 of them."""
    blocks = in_blocks(scales, _SCALE_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    # An all-zero block (0 * 1/0 is NaN) gets code 0, which is harmless: its scale is 0.
    scaled = (blocks * (1 / absmax)[:, None]).nan_to_num(nan=-1.0)
    if scaled.device.type == "cpu":
        scaled = _on_the_grid(scaled)
    return _nearest(scaled.flatten()[: scales.numel()], dynamic_code_book()), absmax


def _nearest(values: Tensor, book: Tensor) -> Tensor:
    """uint8 index into `book` of the level nearest to each value, whatever its order."""
    # Stable: FP4 has two zeros, and the lower code is for zero and what is just below it.
    levels, order = book.to(values.device).sort(stable=True)
    place = torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return order.to(torch.uint8)[place]


# ── two habits of bitsandbytes, without which some codes would differ ────────────────────
def _divide_in_the_short_block(blocks: Tensor, absmax: Tensor, scaled: Tensor) -> None:
    """It divides in a short last block and multiplies by 1/absmax elsewhere: last bits differ."""
    absmax[-1].clamp_(min=1e-38)
    scaled[-1] = blocks[-1] / absmax[-1]


def _on_the_grid(scaled: Tensor) -> Tensor:
    """On a CPU it looks codes up in a table of 65,536 places; a GPU compares with midpoints."""
    return torch.floor((scaled + 1) * 32767.5 + 0.5) / 32767.5 - 1
