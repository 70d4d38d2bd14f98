"""Stand-ins for bitsandbytes' layers and optimizers, which do not survive fakes (Chapter 5).

They allocate, keep and free what the real ones do on CUDA. `stack="book"` is bitsandbytes 0.44,
else 0.50; read beside their `autograd/_functions.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from helpers.memory._allocator import rounded


def quantized_sizes(rows: int, columns: int, kind: str, double: bool = True) -> dict[str, int]:
    """Bytes of every buffer bitsandbytes keeps for one matrix (Chapter 2).

    kind: 'int8' (one float32 per row), 'nf4' or 'fp4' (blocks of 64; `double` quantizes their
    scales in blocks of 256).
    """
    numbers = rows * columns
    if kind == "int8":
        return {"weight": numbers, "scales": 4 * rows}
    blocks = -(-numbers // 64)
    sizes = {"weight": -(-numbers // 2), "code": 64}
    if not double:
        return sizes | {"scales": 4 * blocks}
    second = {"second_scales": 4 * -(-blocks // 256), "offset": 4, "second_code": 1024}
    return sizes | {"scales": blocks} | second


class FakeQuantizedLinear(torch.nn.Linear):
    """A stand-in for Linear8bitLt and Linear4bit that survives fake tensors and meta devices."""

    scales: torch.Tensor
    offset: torch.Tensor

    def __init__(self, base: Any, kind: str, double: bool, dtype: torch.dtype, stack: str) -> None:
        torch.nn.Module.__init__(self)
        rows, columns = base.weight.shape
        if not isinstance(base, torch.nn.Linear):  # a Conv1D stores its matrix transposed
            rows, columns = columns, rows
        self.in_features, self.out_features = columns, rows
        self.kind, self.compute_dtype, self.book = kind, dtype, stack == "book"
        self.source_dtype: torch.dtype = base.weight.dtype
        self.compute_type_is_set = False
        sizes, device = quantized_sizes(rows, columns, kind, double), base.weight.device
        stored = torch.empty(
            sizes.pop("weight"), 1, device=device,
            dtype=torch.int8 if kind == "int8" else torch.uint8,
        )  # fmt: skip
        self.weight = torch.nn.Parameter(stored, requires_grad=False)
        self.bias = base.bias
        for name, size in sizes.items():
            bytes_each = name == "scales" and kind != "int8" and double
            count, width = (size, torch.uint8) if bytes_each else (size // 4, torch.float32)
            self.register_buffer(name, torch.empty(count, dtype=width, device=device))

    @property
    def W_q(self) -> torch.Tensor:
        """By this name PEFT knows a layer that it asks to dequantize itself (DoRA's norms)."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None, fused: bool = False) -> torch.Tensor:
        """The matrix in `dtype`, written directly (`fused`) or through the one it came from."""
        if self.kind == "int8":  # int8_vectorwise_dequant, in float32
            codes = self.weight.view(self.out_features, self.in_features)
            return codes * self.scales.view(-1, 1) * (1 / 127)
        dtype = dtype or self.source_dtype
        if hasattr(self, "second_scales"):
            scales = self.scales.new_empty(self.scales.shape, dtype=torch.float32)
            if fused:
                scales = scales + self.offset
        source = dtype if fused else self.source_dtype
        return self.weight.new_empty(self.out_features, self.in_features, dtype=source).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, leaving in memory what bitsandbytes' layer would."""
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        if self.kind == "int8":
            return _MatMul8bit.apply(x, self, self.bias)
        if not self.compute_type_is_set:
            if x.dtype in (torch.float32, torch.bfloat16):
                self.compute_dtype = x.dtype
            self.compute_type_is_set = True
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return _MatMul4bit.apply(x.to(self.compute_dtype), self, bias).to(x.dtype)


class _MatMul4bit(torch.autograd.Function):
    """Dequantize, multiply, forget; dequantize again for the way back.

    For few tokens (at most 1,536, by card and shape) bitsandbytes 0.50 multiplies the 4-bit
    matrix as it lies: the forward pass of such a batch is predicted slightly high.
    """

    @staticmethod
    def forward(ctx, x, layer, bias):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype, fused=not layer.book), bias)

    @staticmethod
    def backward(ctx, grad):
        return torch.matmul(grad, ctx.layer.dequantize(grad.dtype)), None, None


class _MatMul8bit(torch.autograd.Function):
    """MatMul8bitLt with outlier threshold 6: keeps its input (0.44: a quantized copy too)."""

    @staticmethod
    def forward(ctx, x, layer, bias):
        flat = x.reshape(-1, x.shape[-1])
        tokens, inputs = flat.shape
        half = flat.to(torch.float16)
        row_stats = x.new_empty(tokens, dtype=torch.float32)
        if layer.book:  # a row- and a column-wise copy; one counter per tile to find outliers
            column_stats = x.new_empty(inputs, dtype=torch.float32)
            tiles = rounded(tokens, 16) * -(-inputs // 256) + 1
            outliers = x.new_empty(tiles, dtype=torch.int32)
            ctx.kept = half.new_empty(half.shape, dtype=torch.int8), column_stats
        else:
            outliers = half.abs() >= 6.0
        codes = half.new_empty(half.shape, dtype=torch.int8)
        del half, outliers
        tiled = codes.new_empty(tokens, rounded(inputs, 32)) if layer.book else None
        product = x.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.int32)
        output = x.new_empty(product.shape, dtype=torch.float16)
        output = output.to(x.dtype)
        ctx.layer, ctx.input = layer, flat
        if not layer.book:
            del product
        output = output.clone() if layer.book and x.dim() == 3 else output
        del codes, tiled, row_stats  # 0.44 holds these, and the int32 product, until here
        return output

    @staticmethod
    def backward(ctx, grad):
        layer, held = ctx.layer, None
        dtype, shape = ctx.input.dtype, (*grad.shape[:-1], layer.in_features)
        grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        codes = layer.weight
        if layer.book:  # quantizes the gradient, used or not; undoes the Ampere tiling
            half = grad.to(torch.float16)
            held = [half.new_empty(half.shape, dtype=torch.int8) for _ in range(2)]
            del half
            codes = torch.empty_like(codes).clone()
        weight = codes.to(dtype, copy=True).view(layer.out_features, layer.in_features)
        del codes
        weight.mul_(layer.scales.unsqueeze(1).mul(1 / 127))
        result = torch.matmul(grad.to(dtype), weight).view(shape)
        del held
        return result, None, None


def quantized_lora_forward(self, x, *args, **kwargs):
    """The forward pass of PEFT's Linear8bitLt and Linear4bit (peft.tuners.lora.bnb)."""
    result = self.base_layer(x)
    if self.base_layer.kind != "int8" and not self.base_layer.book:
        result = result.clone()
    for name in self.active_adapters:
        if name not in self.lora_A:
            continue
        convert, dtype = not torch.is_autocast_enabled("cpu"), result.dtype
        if convert:
            x = x.to(self.lora_A[name].weight.dtype)
        if variant := self.lora_variant.get(name):  # DoRA
            result = variant.forward(self, active_adapter=name, x=x, result=result)
            result = result.to(dtype) if convert else result
            continue
        output = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
        output = output * self.scaling[name]
        result = result + (output.to(dtype) if convert else output)
    return result


def quantize_linears(
    model: torch.nn.Module, kind: str, double: bool, dtype: torch.dtype, stack: str
) -> None:
    """Replace the layers that transformers hands to bitsandbytes: not the head, nor tied ones."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    skipped = tuple(f"{key}." for key in get_keys_to_not_convert(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear | Conv1D) and not f"{name}.".startswith(skipped):
            model.set_submodule(name, FakeQuantizedLinear(module, kind, double, dtype, stack))


OPTIMIZERS = (
    "adamw_8bit", "adamw_bnb_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit",
    "paged_adamw_8bit", "sgd",
)  # fmt: skip
CODE_BOOKS = [1024, 1024]  # of an 8-bit optimizer, once, when it has a large enough matrix


def optimizer_bytes(name: str, numbers: int, width: int) -> tuple[list[int], int]:
    """(sizes of one parameter's states, bytes of a copy at the step) on the card.

    Fused AdamW keeps its step counters on the card and needs nothing else; the foreach loop needs
    a copy of the parameters at the step; 8-bit states are one byte per number and two float32 per
    256 (matrices under 4,096 numbers stay float32); paged states of 100,000 numbers and more live
    in unified memory, where the allocator's counters do not see them.
    """
    size = numbers * width
    if name in ("adamw_torch_fused", "adamw_torch"):
        return ([size, size, 4], 0) if name.endswith("fused") else ([size, size], size)
    if name == "sgd":
        return [], 0
    small = numbers < 4096 or name.endswith("32bit")
    paged = name.startswith("paged") and numbers >= 100_000
    states = [] if paged else [4 * numbers if small else numbers] * 2
    return states if small else states + [4 * -(-numbers // 256)] * 2, 0
