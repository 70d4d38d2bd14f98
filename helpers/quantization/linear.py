"""Evenly spaced levels (Chapter 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers._checks import one_of, whole_number
from helpers.quantization._shared import Quantized, check_weights, in_blocks, or_one

SCHEMES = ("minmax", "absmax", "zero_point")
GROUPS = ("tensor", "row", "block")


@dataclass(frozen=True, repr=False, eq=False)
class QuantizedUniform(Quantized):
    """Evenly spaced levels: value = code × scale + offset, one pair for each group.

    codes: uint8 (int8 for 'absmax') in the shape of the weights, one byte each whatever
    `bits` is. scale, offset: float32, one per group. zero_point: the code that stands for
    0.0 (int32, one per group) where the scheme has one, else None.
    """

    scale: Tensor
    offset: Tensor
    zero_point: Tensor | None
    bits: int
    scheme: str
    per: str
    block_size: int

    def _values(self) -> Tensor:
        codes = _groups(self.codes, self.per, self.block_size).float()
        return codes.mul_(self.scale[:, None]).add_(self.offset[:, None])

    @property
    def bits_per_weight(self) -> float:
        """With the codes packed tightly, scales and offsets included."""
        extra = {"absmax": 32, "minmax": 64, "zero_point": 32 + self.bits}[self.scheme]
        return self.bits + extra * self.scale.numel() / self.codes.numel()

    @property
    def how(self) -> str:
        """Such as '4 bits, absmax, per block'."""
        return f"{self.bits} bits, {self.scheme.replace('_', ' ')}, per {self.per}"


def quantize_linear(
    weights: Tensor,
    bits: int = 8,
    *,
    scheme: str = "absmax",
    per: str = "tensor",
    block_size: int = 64,
) -> QuantizedUniform:
    """Round weights to 2**bits evenly spaced levels, with a direct formula (Chapter 2).

    Temporary memory is about one float32 copy of the weights; a first draft that compares
    each weight with each level needs 2**bits times as much.

    Args:
        weights: float32, bfloat16 or float16 of any shape, and finite.
        bits: 2 to 8.
        scheme: 'absmax' (levels symmetric around zero), 'minmax' (from the smallest to the
            largest weight) or 'zero_point' (likewise, shifted so that 0.0 is a level).
        per: one scale for the whole 'tensor', for every 'row' (last dimension) or for every
            'block' of consecutive weights.
        block_size: weights in a block.

    Example:
        >>> quantize_linear(torch.tensor([-1.0, 0.2, 0.6, 3.0]), bits=3).dequantize()
        tensor([-1.,  0.,  1.,  3.])
    """
    check_weights(weights)
    one_of("scheme", scheme, SCHEMES)
    one_of("per", per, GROUPS)
    whole_number("bits", bits, 2, 8)
    whole_number("block_size", block_size)

    groups = _groups(weights.detach(), per, block_size).float()
    low, high = groups.aminmax(dim=1)
    first, last = 0, 2**bits - 1
    zero_point = None
    if scheme == "absmax":
        last = 2 ** (bits - 1) - 1
        first = -last
        scale = or_one(torch.maximum(-low, high) / last)
        offset = torch.zeros_like(scale)
    elif scheme == "minmax":
        scale, offset = or_one((high - low) / last), low
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = or_one((high - low) / last)
        zero_point = torch.round(-low / scale)
        offset = -zero_point * scale
        zero_point = zero_point.int()

    codes = (groups - offset[:, None]).div_(scale[:, None]).round_().clamp_(first, last)
    codes = codes.to(torch.int8 if scheme == "absmax" else torch.uint8)
    codes = codes.flatten()[: weights.numel()].reshape(weights.shape)
    settings = (bits, scheme, per, block_size)
    return QuantizedUniform(
        codes, weights.shape, weights.dtype, scale, offset, zero_point, *settings
    )


def _groups(values: Tensor, per: str, block_size: int) -> Tensor:
    """One row for each group that shares a scale."""
    if per == "tensor":
        return values.reshape(1, -1)
    if per == "row":
        return values.reshape(-1, values.shape[-1] if values.ndim else 1)
    return in_blocks(values, block_size)
