"""What CUDA's kernels allocate where they differ from a CPU's (Chapter 5).

A trace runs on fake CPU tensors. Where CUDA takes another path (dropout masks, fused softmax,
attention kernels, autocast), a stand-in below allocates, keeps and frees what the real kernel
does. Read beside: PyTorch's aten/native/transformers/cuda.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from helpers.memory._allocator import rounded
from helpers.memory._configs import CannotPredictError
from helpers.memory.cards import AMPERE, processors


class _FlashAttention(torch.autograd.Function):
    """Keeps the output and a float32 per row; backward float32 dQ, wide dK/dV of shared heads."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)  # laid out as the queries are
        log_sum_exp = query.new_empty(query.shape[:3], dtype=torch.float32)
        seed = query.new_empty(1, dtype=torch.int64), query.new_empty(1, dtype=torch.int64)
        ctx.save_for_backward(query, key, value, out, log_sum_exp, *seed)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors[:3]
        batch, heads, length, size = query.shape
        grads = [torch.empty_like(x) for x in (query, key, value)]
        rows, width = rounded(length, 128), rounded(size, 32)
        sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
        accumulator = query.new_empty(batch, heads, rows, width, dtype=torch.float32)
        if key.shape[1] != heads:
            wide = [query.new_empty(batch, key.shape[2], heads, size) for _ in range(2)]
            del wide
        del sums, accumulator
        return tuple(grads)


class _EfficientAttention(torch.autograd.Function):
    """Memory-efficient attention; keeps a mask in the queries' dtype, once per layer."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        batch, heads, length, _ = query.shape
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.new_empty(mask.shape, dtype=query.dtype)
        if mask is not None and mask.shape[-1] % 16:
            mask = mask.new_empty(*mask.shape[:-1], rounded(mask.shape[-1], 16))
        out = query.new_empty(batch, length, heads, value.shape[-1])
        log_sum_exp = query.new_empty(batch, heads, rounded(length, 32), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp, mask)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors[:3]
        grads = [torch.empty_like(x) for x in (query, key, value)]
        delta = query.new_empty(query.shape[:3], dtype=torch.float32)
        workspace = None
        if query.dtype != torch.float32:
            workspace = query.new_empty(query.shape, dtype=torch.float32)
        del delta, workspace
        return (*grads, None)


def cuda_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
    enable_gqa=False, capability=AMPERE,
):  # fmt: skip
    """`scaled_dot_product_attention` on a card: flash, memory-efficient, or the plain formula.

    Flash needs compute capability 8.0 and 16 bits, and in torch 2.13 it alone takes grouped
    heads; below 8.0 the efficient kernel takes no bfloat16; the formula keeps scores of length x
    length. cuDNN's kernel, which PyTorch prefers on 9.x and 10.x, is counted as flash (on an H100
    it took 1 to 2 % more while it ran), and with a mask as the efficient one.
    """
    modern, same_heads = capability >= AMPERE, query.shape[1] == key.shape[1] == value.shape[1]
    one_size = query.shape[-1] == value.shape[-1] <= 256
    fits_flash = attn_mask is None and one_size and (same_heads or enable_gqa)
    if fits_flash and modern and query.dtype != torch.float32:
        return _FlashAttention.apply(query, key, value)
    if same_heads and (modern or query.dtype != torch.bfloat16):
        return _EfficientAttention.apply(query, key, value, attn_mask)
    return torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def flash_attention_2(query, key, value, *_, target_dtype=None, **__):
    """transformers' `_flash_attention_forward`: heads beside one another, and no mask at all."""
    if query.shape[-1] > 256:
        raise CannotPredictError(
            "attention='flash_attention_2' takes heads of at most 256 numbers, and this model has "
            f"some of {query.shape[-1]}; attention='sdpa' works"
        )
    rows = [x.transpose(1, 2) for x in (query, key, value)]
    if target_dtype:  # transformers hands it 16 bits, whatever comes in
        rows = [_cast(x, [torch.float32], target_dtype) for x in rows]
    return _FlashAttention.apply(*rows).transpose(1, 2)


_FLOAT32_UNDER_AUTOCAST = {
    F.softmax, F.log_softmax, F.layer_norm, F.cross_entropy, F.nll_loss, F.group_norm,
    torch.softmax, torch.log_softmax, torch.pow, torch.sum, torch.cumsum, torch.exp,
    torch.Tensor.softmax, torch.Tensor.pow, torch.Tensor.sum, torch.Tensor.cumsum,
}  # fmt: skip

_HALF_TO_FLOAT = (torch.float16, torch.float32)


class CudaKernels(TorchFunctionMode):
    """Send the few functions whose CUDA kernels keep other tensors to their stand-ins.

    Dropout keeps one byte per element; softmax of float16 into float32 makes no float32 copy of
    its input; attention is chosen by the compute capability; with `autocast`, what CUDA runs in
    float32 gets float32 inputs.
    """

    def __init__(self, autocast: bool = False, capability: Any = AMPERE):
        super().__init__()
        self.autocast, self.capability = autocast, capability

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mixed = self.autocast and torch.is_autocast_enabled("cpu")
        if func is F.scaled_dot_product_attention:
            if mixed:
                to = torch.get_autocast_dtype("cpu")
                args = [_cast(a, [torch.float32], to) for a in args]
            return cuda_attention(*args, **kwargs, capability=self.capability)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if mixed and func is F.cross_entropy and args[0].dtype == torch.float16:
            kwargs.pop("label_smoothing", None)
            return F.nll_loss(torch._log_softmax(args[0], 1, True), *args[1:], **kwargs)
        if mixed and func in _FLOAT32_UNDER_AUTOCAST:
            args = [_cast(a, [torch.float16, torch.bfloat16], torch.float32) for a in args]
        elif func is F.softmax and (args[0].dtype, kwargs.get("dtype")) == _HALF_TO_FLOAT:
            return torch._softmax(args[0], kwargs.get("dim", -1), True)
        return func(*args, **kwargs)


def _cast(value: Any, dtypes: list[torch.dtype], dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype in dtypes else value


def _dropout(input, p=0.5, training=True, inplace=False):
    if p == 0 or not training or not input.numel():
        return input
    return torch.native_dropout(input, p, True)[0]


def scratch(func: Any, args: Any, capability: tuple = AMPERE) -> int:
    """Bytes that the CUDA kernel of an operator takes while it runs, beside its outputs.

    The way back through softmax first makes the product of gradient and output
    (aten/native/cuda/SoftMax.cu); a bias's gradient is a sum over many rows, whose parts go to
    a buffer. Both were measured on an H100 for one shape each, to the byte.
    """
    if func is torch.ops.aten._softmax_backward_data.default:
        return args[0].numel() * max(args[0].itemsize, args[1].itemsize)
    if func is torch.ops.aten.sum.dim_IntList and args[1] == [0] and args[0].dim() == 2:
        rows, columns = args[0].shape
        return column_sums(rows, columns, capability)
    return 0


def column_sums(rows: int, columns: int, capability: tuple) -> int:
    """Bytes of the buffer in which CUDA's thread blocks meet when they add up rows.

    As aten/native/cuda/Reduce.cuh lays the work out: threads side by side take columns, threads
    above one another share the rows; a card with room to spare gives each column to several
    blocks. The buffer has as many places for a block as it has threads.
    """
    vector = next(size for size in (4, 2, 1) if columns % size == 0)
    most = 512 // vector  # threads of a block
    widest, highest = (
        min(most, 1 << (count.bit_length() - 1)) for count in (columns // vector, rows)
    )
    height = min(highest, most // min(widest, 32))
    width = min(widest, most // height)
    count, threads = processors(capability)
    at_once = count * (threads // (width * height))
    across = -(-columns // vector // width)
    each = -(-rows // height)
    if each < 256 or across > at_once:
        return 0
    blocks = max(min(-(-at_once // across), -(-each // 16)), -(-each // 256))
    return 4 * columns * blocks * width * vector if blocks > 1 else 0
