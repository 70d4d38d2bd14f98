"""How the loss is computed: trl's fused head, and what transformers 4.46 did (Chapter 5).

Read beside: trl 1.16 `kernels/chunked_logprob.py`, transformers 4.46 `modeling_opt.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F


class FusedHead(torch.autograd.Function):
    """trl's ChunkedLogProbFunction on CUDA: a tile of logits at a time, float32 gradients."""

    TOKENS, WORDS = 4096, 32768

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, compute_dtype):
        n, rows = hidden.shape[0], min(hidden.shape[0], FusedHead.TOKENS)
        state = [hidden.new_empty(n, dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty(rows, FusedHead.WORDS, dtype=compute_dtype)
        chunk = hidden[: FusedHead.TOKENS].to(compute_dtype)
        words = weight[: FusedHead.WORDS].to(compute_dtype)
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
        pairs = zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        wanted = [x if need else None for x, need in pairs]
        sums: list[Any] = [
            None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in wanted
        ]
        rows = min(hidden.shape[0], FusedHead.TOKENS)
        tile = hidden.new_empty(rows, FusedHead.WORDS, dtype=ctx.compute_dtype)
        grad = grad.float().contiguous()
        chunk = hidden[: FusedHead.TOKENS].to(ctx.compute_dtype)
        words = weight[: FusedHead.WORDS].to(ctx.compute_dtype)
        out = [None if x is None else s.to(x.dtype) for s, x in zip(sums, wanted, strict=True)]
        del tile, chunk, words
        return (*out, None, None)


def fused_loss(
    model: Any, batch: dict, autocast_dtype: torch.dtype | None, on_head: Callable[[], object]
) -> tuple[torch.Tensor, Any]:
    """trl 1.16's loss: the backbone, then a fused head over the trained positions (here all)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    on_head()
    mask = labels != -100
    # hidden[mask] with every position trained: the same gather, by a mask's two index vectors
    rows = torch.arange(labels.numel(), device=labels.device) // labels.shape[1]
    columns = torch.arange(labels.numel(), device=labels.device) % labels.shape[1]
    head = base.get_output_embeddings()
    bias = getattr(head, "bias", None)  # PEFT's wrapper of a head with trained rows has none
    picked, targets = hidden[rows, columns], labels[rows, columns]
    logprobs, entropy, top = FusedHead.apply(
        picked, head.weight, bias, targets, autocast_dtype or picked.dtype
    )
    per_token = [x.new_zeros(mask.shape).view(-1).copy_(x.detach()) for x in (entropy, top)]
    return -logprobs.sum() / mask.sum().clamp(min=1), per_token


# The models of transformers 4.46 that computed the loss in the logits' own dtype; the others
# made a float32 copy.
_NATIVE_LOSS = {"opt", "falcon", "gpt2", "gpt_neox", "gptj", "bloom", "mpt"}


@contextlib.contextmanager
def book(model: Any) -> Iterator[None]:
    """What transformers 4.46 did otherwise: the loss over all logits, OPT's eager attention."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = base.config.model_type

    def loss(logits, labels, vocab_size, **kwargs):
        logits = logits if kind in _NATIVE_LOSS else logits.float()
        shifted = logits[..., :-1, :].contiguous().view(-1, vocab_size)
        return F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))

    base.loss_function = loss
    if kind != "opt" or base.config._attn_implementation == "flash_attention_2":
        yield
        return
    from transformers.models.opt.modeling_opt import OPTAttention

    with mock.patch.object(OPTAttention, "forward", _book_opt_attention):
        yield


def _book_opt_attention(self, hidden_states, attention_mask=None, past_key_values=None, **_):
    """Heads laid out anew, for SDPA too; eager: bmm, a mask, a floor, softmax in float32."""
    shape, mask = (*hidden_states.shape[:2], self.num_heads, self.head_dim), attention_mask

    def heads(x):
        return x.view(shape).transpose(1, 2).contiguous()

    query = self.q_proj(hidden_states) * self.scaling
    key, value = heads(self.k_proj(hidden_states)), heads(self.v_proj(hidden_states))
    query = heads(query)
    if past_key_values is not None:  # a tuple then, which the output carries away
        vars(past_key_values).setdefault("held", []).append((key, value))
    if self.config._attn_implementation == "sdpa":
        out = F.scaled_dot_product_attention(query, key, value, mask, 0.0, mask is None)
    else:
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        scores = torch.bmm(query, key.transpose(1, 2)).unflatten(0, (shape[0], self.num_heads))
        if mask is None:
            mask = scores.new_empty(shape[0], 1, *scores.shape[2:])
        scores = scores + mask
        scores = torch.max(scores, scores.new_empty(())).flatten(0, 1)
        half = scores.dtype == torch.float16
        scores = F.softmax(scores, dim=-1, dtype=torch.float32 if half else None)
        scores = F.dropout(scores.half() if half else scores, p=self.dropout)
        out = torch.bmm(scores, value).unflatten(0, (shape[0], self.num_heads))
    return self.out_proj(out.transpose(1, 2).flatten(2)), None
