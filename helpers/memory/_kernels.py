"""What the libraries and CUDA kernels really allocate, as small stand-ins (Chapter 5).

A trace runs on fake CPU tensors. Where CUDA takes another path (dropout masks, fused
softmax, attention kernels, autocast), where bitsandbytes' classes do not survive fakes
(quantized layers), or where an older library did something else (`stack="book"`), the
stand-in below allocates, keeps and frees what the real code does. Read beside: PyTorch's
aten/native/transformers/cuda, bitsandbytes 0.44 and 0.50 `autograd/_functions.py`, trl 1.16
`kernels/chunked_logprob.py`, transformers 4.46 `modeling_opt.py`.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from helpers.memory._trace import rounded
from helpers.memory.cards import AMPERE, attention_kernels, processors


# ---------------------------------------------------------------- attention kernels
class _FlashAttention(torch.autograd.Function):
    """Flash attention: output and one float32 per row forward.

    Float32 dQ and, for shared heads, wide dK/dV backward.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        batch, heads, length, size = query.shape
        out = query.new_empty(batch, length, heads, size)
        log_sum_exp = query.new_empty(batch, heads, length, dtype=torch.float32)
        seed = query.new_empty(1, dtype=torch.int64), query.new_empty(1, dtype=torch.int64)
        ctx.save_for_backward(query, key, value, out, log_sum_exp, *seed)
        return out.transpose(1, 2)

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
    """Memory-efficient attention, which takes a mask.

    Keeps the mask in the queries' dtype, once per layer.
    """

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
    query,
    key,
    value,
    mask=None,
    dropout=0.0,
    causal=False,
    scale=None,
    gqa=False,
    capability=AMPERE,
):
    """Allocate what the kernel that CUDA would choose allocates.

    Flash, memory-efficient, or the plain formula, whose scores take length x length. In
    torch 2.13 only flash takes grouped heads as they are.
    """
    kernels = attention_kernels(capability, str(query.dtype).removeprefix("torch."))
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    fits_flash = mask is None and query.shape[-1] <= 256 and (same_heads or gqa)
    if "flash" in kernels and fits_flash:
        return _FlashAttention.apply(query, key, value)
    if "efficient" in kernels and same_heads:
        return _EfficientAttention.apply(query, key, value, mask)
    return torch._scaled_dot_product_attention_math(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=gqa
    )[0]


# ---------------------------------------------------------------- CUDA's choices
_FLOAT32_UNDER_AUTOCAST = {
    F.softmax, F.log_softmax, F.layer_norm, F.cross_entropy, F.nll_loss, F.group_norm,
    torch.softmax, torch.log_softmax, torch.pow, torch.sum, torch.cumsum, torch.exp,
    torch.Tensor.softmax, torch.Tensor.pow, torch.Tensor.sum, torch.Tensor.cumsum,
}  # fmt: skip


class CudaKernels(TorchFunctionMode):
    """Send the few functions whose CUDA kernels keep other tensors than the CPU's to
    stand-ins that match CUDA.

    Dropout keeps one byte per element; softmax of float16 into float32 makes no float32
    copy of its input; attention is chosen as on a card of that compute capability; with
    `autocast`, the functions CUDA runs in float32 get float32 inputs.
    """

    def __init__(self, autocast=False, flash_dtype=None, capability=AMPERE):
        super().__init__()
        self.autocast, self.flash_dtype = autocast, flash_dtype
        self.capability = capability

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if (
                self.flash_dtype
            ):  # transformers hands flash attention half precision, whatever comes in
                args = [_narrow(a, self.flash_dtype) for a in args[:3]] + list(args[3:])
            return cuda_attention(
                *args[:3],
                mask=kwargs.get("attn_mask", args[3] if len(args) > 3 else None),
                dropout=kwargs.get("dropout_p", 0.0),
                causal=kwargs.get("is_causal", False),
                scale=kwargs.get("scale"),
                gqa=kwargs.get("enable_gqa", False),
                capability=self.capability,
            )
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if self.autocast and func in _FLOAT32_UNDER_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args = [_widen(a) for a in args]
        elif (
            func is F.softmax
            and kwargs.get("dtype") == torch.float32
            and args[0].dtype == torch.float16
        ):
            return torch._softmax(args[0], kwargs.get("dim", -1), True)
        return func(*args, **kwargs)


def scratch(func, args, capability=AMPERE):
    """Bytes that the CUDA kernel of an operator takes while it runs, beside its outputs.

    The way back through softmax first makes the product of gradient and output
    (aten/native/cuda/SoftMax.cu); a bias's gradient is a sum over many rows, whose parts
    go to a buffer. Both were measured on an H100 for one
    shape each, to the byte.
    """
    if func is torch.ops.aten._softmax_backward_data.default:
        return args[0].numel() * max(args[0].itemsize, args[1].itemsize)
    if func is torch.ops.aten.sum.dim_IntList and args[1] == [0] and args[0].dim() == 2:
        return _column_sums(*args[0].shape, capability)
    return 0


def _column_sums(rows, columns, capability):
    """Bytes of the buffer in which CUDA's thread blocks meet when they add up rows.

    As aten/native/cuda/Reduce.cuh lays the work out: threads side by side take columns,
    threads above one another share the rows; a card with room to spare gives each column
    to several blocks. The buffer has as many places for a block as it has threads.
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


def _widen(value):
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def _narrow(tensor, dtype):
    return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor


def _dropout(input, p=0.5, training=True, inplace=False):
    if p == 0 or not training or not input.numel():
        return input
    return torch.native_dropout(input, p, True)[0]


# ---------------------------------------------------------------- quantized linear layers
def quantized_sizes(rows, columns, kind, double=True):
    """Bytes of every buffer bitsandbytes keeps for one matrix (Chapter 2).

    {'weight': …, 'scales': …, …}.

    kind: 'int8' (one float32 per row), 'nf4' or 'fp4' (blocks of 64; `double` quantizes
    their scales in blocks of 256).
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


class _MatMul4bit(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit.

    Dequantize, multiply, forget; dequantize again for the way back. For few tokens (at most
    1,536, by card and shape) bitsandbytes 0.50 multiplies the 4-bit matrix as it lies: the
    forward pass of such a batch is predicted slightly high.
    """

    @staticmethod
    def forward(ctx, x, layer, bias):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype, fused=layer.stack == "current"), bias)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.layer.dequantize(grad.dtype)
        return torch.matmul(grad, weight), None, None


class _MatMul8bit(torch.autograd.Function):
    """bitsandbytes' MatMul8bitLt on CUDA with outlier threshold 6.

    Keeps its input (0.44: a quantized copy too).
    """

    @staticmethod
    def forward(ctx, x, layer, bias):
        flat = x.reshape(-1, x.shape[-1])
        tokens, inputs = flat.shape
        book = layer.stack == "book"
        half = flat.to(torch.float16)
        row_stats = x.new_empty(tokens, dtype=torch.float32)
        if book:  # a row-wise and a column-wise copy; one counter per tile to find outliers
            column_stats = x.new_empty(inputs, dtype=torch.float32)
            tiles = rounded(tokens, 16) * -(-inputs // 256) + 1
            outliers = x.new_empty(tiles, dtype=torch.int32)
            ctx.kept = half.new_empty(half.shape, dtype=torch.int8), column_stats
        else:
            outliers = half.abs() >= 6.0
        codes = half.new_empty(half.shape, dtype=torch.int8)
        del half, outliers
        tiled = codes.new_empty(tokens, rounded(inputs, 32)) if book else None
        product = x.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.int32)
        output = x.new_empty(product.shape, dtype=torch.float16)
        output = output.to(x.dtype)
        ctx.layer, ctx.input = layer, flat
        if not book:
            del product
        output = output.clone() if book and x.dim() == 3 else output
        del codes, tiled, row_stats  # 0.44 holds these, and the int32 product, until here
        return output

    @staticmethod
    def backward(ctx, grad):
        layer, held = ctx.layer, None
        dtype, shape = ctx.input.dtype, (*grad.shape[:-1], layer.in_features)
        grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        codes = layer.weight
        if layer.stack == "book":  # quantizes the gradient, used or not; undoes the Ampere tiling
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


class QuantizedLinear(torch.nn.Linear):
    """A stand-in for bitsandbytes' Linear8bitLt and Linear4bit that survives fake tensors
    and meta devices.
    """

    def __init__(self, base, kind, double, compute_dtype, stack):
        torch.nn.Module.__init__(self)
        rows, columns = base.weight.shape
        if not isinstance(
            base, torch.nn.Linear
        ):  # transformers' Conv1D stores its matrix transposed
            rows, columns = columns, rows
        self.in_features, self.out_features = columns, rows
        self.kind, self.compute_dtype, self.stack = kind, compute_dtype, stack
        self.source_dtype, self.compute_type_is_set = base.weight.dtype, False
        sizes = quantized_sizes(rows, columns, kind, double)
        device = base.weight.device
        size = sizes.pop("weight")
        dtype = torch.int8 if kind == "int8" else torch.uint8
        self.weight = torch.nn.Parameter(
            torch.empty(size, 1, dtype=dtype, device=device), requires_grad=False
        )
        self.bias = base.bias
        for name, size in sizes.items():
            byte_scales = name == "scales" and kind != "int8" and double
            count, dtype = (size, torch.uint8) if byte_scales else (size // 4, torch.float32)
            self.register_buffer(name, torch.empty(count, dtype=dtype, device=device))

    def dequantize(self, dtype, fused=False):
        """The matrix in `dtype`.

        `fused` writes it there directly, else through the dtype it was quantized from.
        """
        if hasattr(self, "second_scales"):
            scales = self.scales.new_empty(self.scales.shape, dtype=torch.float32)
            if fused:
                scales = scales + self.offset
        source = dtype if fused else self.source_dtype
        weight = self.weight.new_empty(self.out_features, self.in_features, dtype=source)
        return weight.to(dtype)

    def forward(self, x):
        """The layer's output, leaving in memory what bitsandbytes' layer would."""
        if self.kind == "int8":
            if self.bias is not None and self.bias.dtype != x.dtype:
                self.bias.data = self.bias.data.to(x.dtype)
            return _MatMul8bit.apply(x, self, self.bias)
        if not self.compute_type_is_set:
            if x.dtype in (torch.float32, torch.bfloat16):
                self.compute_dtype = x.dtype
            self.compute_type_is_set = True
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias.data = bias.data.to(x.dtype)
        bias = None if bias is None else bias.to(self.compute_dtype)
        return _MatMul4bit.apply(x.to(self.compute_dtype), self, bias).to(x.dtype)


def quantized_lora_forward(self, x, *args, **kwargs):
    """The forward pass of PEFT's Linear8bitLt and Linear4bit adapters
    (peft.tuners.lora.bnb), for plain LoRA.
    """
    result = self.base_layer(x)
    if self.base_layer.kind != "int8" and self.base_layer.stack == "current":
        result = result.clone()
    for name in self.active_adapters:
        if name not in self.lora_A:
            continue
        convert = not torch.is_autocast_enabled("cpu")
        dtype = result.dtype
        if convert:
            x = x.to(self.lora_A[name].weight.dtype)
        output = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
        output = output * self.scaling[name]
        result = result + (output.to(dtype) if convert else output)
    return result


def quantize_linears(model, kind, double, compute_dtype, stack):
    """Replace the linear layers that transformers would hand to bitsandbytes.

    The head and tied layers stay.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    skipped = set(get_keys_to_not_convert(model))
    for name, module in list(model.named_modules()):
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        if any(name == key or name.startswith(key + ".") for key in skipped):
            continue
        parent, _, last = name.rpartition(".")
        surrogate = QuantizedLinear(module, kind, double, compute_dtype, stack)
        setattr(model.get_submodule(parent), last, surrogate)


# ---------------------------------------------------------------- losses
class _FusedHead(torch.autograd.Function):
    """trl's ChunkedLogProbFunction on CUDA.

    One tile of logits at a time, float32 gradients, nothing of size N x V.
    """

    TOKENS, WORDS = 4096, 32768

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, compute_dtype):
        n = hidden.shape[0]
        state = [hidden.new_empty(n, dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty(min(n, _FusedHead.TOKENS), _FusedHead.WORDS, dtype=compute_dtype)
        chunk = hidden[: _FusedHead.TOKENS].to(compute_dtype)
        words = weight[: _FusedHead.WORDS].to(compute_dtype)
        del words
        log_z = state[0] + torch.log(state[1])
        logprobs = state[6] - log_z
        entropy = log_z - state[2] / state[1]
        is_top1 = (state[6] >= state[0]) & (state[6] > state[5])
        del state, tile, chunk
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.compute_dtype = compute_dtype
        ctx.mark_non_differentiable(is_top1)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, is_top1

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, bias = ctx.saved_tensors[:3]
        wanted = [
            x if need else None
            for x, need in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        sums = [None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in wanted]
        rows = min(hidden.shape[0], _FusedHead.TOKENS)
        tile = hidden.new_empty(rows, _FusedHead.WORDS, dtype=ctx.compute_dtype)
        grad = grad.float().contiguous()
        chunk = hidden[: _FusedHead.TOKENS].to(ctx.compute_dtype)
        words = weight[: _FusedHead.WORDS].to(ctx.compute_dtype)
        out = [None if s is None else s.to(x.dtype) for s, x in zip(sums, wanted, strict=True)]
        del tile, chunk, words
        return (*out, None, None)


def fused_loss(model, batch, autocast_dtype=None, on_head=lambda: None):
    """trl 1.16's loss: backbone, then a fused head over the trained positions, with its
    metrics (all trained here).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    on_head()
    mask = labels != -100
    # hidden[mask] with every position trained: the same gather, by the two index vectors a
    # mask becomes
    rows = torch.arange(labels.numel(), device=labels.device) // labels.shape[1]
    columns = torch.arange(labels.numel(), device=labels.device) % labels.shape[1]
    head = base.get_output_embeddings()
    picked, targets = hidden[rows, columns], labels[rows, columns]
    logprobs, entropy, top = _FusedHead.apply(
        picked, head.weight, head.bias, targets, autocast_dtype or picked.dtype
    )
    per_token = [x.new_zeros(mask.shape).view(-1).copy_(x.detach()) for x in (entropy, top)]
    loss = -logprobs.sum() / mask.sum().clamp(min=1)
    return loss, per_token


# The models of transformers 4.46 that computed the loss in the logits' own dtype; the
# others made a float32 copy.
NATIVE_LOSS = {"opt", "falcon", "gpt2", "gpt_neox", "gptj", "bloom", "mpt"}


def book_loss(model_type):
    """The loss of transformers 4.46.

    All logits, a float32 copy for most models, then a shifted contiguous copy.
    """

    def loss(logits, labels, vocab_size, **kwargs):
        if model_type not in NATIVE_LOSS:
            logits = logits.float()
        shifted = logits[..., :-1, :].contiguous().view(-1, vocab_size)
        return F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))

    return loss


def book_opt_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    """Eager attention of transformers 4.46's OPT.

    Bmm, a mask, a floor at the smallest number, softmax in float32.
    """
    batch, heads, length, size = query.shape
    query, key, value = (x.reshape(batch * heads, -1, size) for x in (query, key, value))
    scores = torch.bmm(query, key.transpose(1, 2)).view(batch, heads, length, -1)
    if mask is None:
        mask = scores.new_empty(batch, 1, length, length)
    scores = scores + mask
    scores = torch.max(scores, scores.new_empty(())).view(batch * heads, length, -1)
    if scores.dtype == torch.float16:
        scores = F.softmax(scores, dim=-1, dtype=torch.float32).to(torch.float16)
    else:
        scores = F.softmax(scores, dim=-1)
    scores = F.dropout(scores, p=dropout, training=module.training)
    out = torch.bmm(scores, value).view(batch, heads, length, size).transpose(1, 2)
    return out.contiguous(), None


# ---------------------------------------------------------------- optimizers
def _adam(sizes, itemsize, step_bytes):
    return [x for n in sizes for x in (itemsize * n, itemsize * n, step_bytes)]


def optimizer_bytes(name, parameters):
    """(state buffer sizes, temporary buffer sizes) on the card.

    Parameters: list of (numel, itemsize).

    Fused AdamW keeps its step counters on the card and needs nothing else; the foreach loop
    needs one more copy of the parameters at the step; 8-bit states are one byte per number
    and two float32 per 256 (matrices under 4,096 numbers stay float32); paged states of
    100,000 numbers and more live in unified memory, where the allocator's counters do not
    see them.
    """
    if name in ("adamw_torch_fused", "adamw_torch"):
        fused = name == "adamw_torch_fused"
        states = [s for n, i in parameters for s in [n * i, n * i] + [4] * fused]
        return states, [] if fused else [n * i for n, i in parameters]
    if name == "sgd":
        return [], []
    states = []
    if any(n >= 4096 for n, _ in parameters):
        states += [1024, 1024]  # the two code books
    for n, _ in parameters:
        small, paged = n < 4096 or name.endswith("32bit"), name.startswith("paged")
        if not paged or n < 100_000:
            states += [4 * n if small else n] * 2
        if not small:
            states += [4 * -(-n // 256)] * 2
    return states, []


OPTIMIZERS = {
    "adamw_torch_fused", "adamw_torch", "sgd", "adamw_8bit", "adamw_bnb_8bit",
    "paged_adamw_8bit", "paged_adamw_32bit",
}  # fmt: skip
