"""Attention from scratch (Chapters 1 and 5).

Shapes are those of PyTorch and transformers: queries (batch, heads, queries, head_dim),
keys and values (batch, kv_heads, keys, head_dim). With fewer key-value heads than heads,
each one serves a whole group of queries (grouped-query attention). A mask is True where
a query may look.
"""

import math

import torch
from torch import Tensor, nn


# ── masks ────────────────────────────────────────────────────────────────────────────────
def causal_mask(
    queries: int, keys: int | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """A boolean (queries, keys): nobody looks into the future (Chapter 1).

    With more keys than queries the queries are the last positions, as when a model generates
    from its cache; `is_causal=True` in PyTorch counts from the first ones instead.

    Args:
        queries: how many.
        keys: how many, at least as many as queries; as many unless given.
        device: where to make the mask.

    Example:
        >>> causal_mask(2, 3).tolist()
        [[True, True, False], [True, True, True]]
    """
    keys = queries if keys is None else keys
    if not 0 < queries <= keys:
        raise ValueError(
            f"causal_mask needs 0 < queries <= keys, got queries={queries} and keys={keys}"
        )
    everywhere = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return everywhere.tril(keys - queries)


def padding_mask(attention_mask: Tensor) -> Tensor:
    """A boolean (batch, 1, 1, keys): nobody looks at padding (Chapter 1).

    Args:
        attention_mask: a tokenizer's, (batch, keys) of 1 (real) and 0 (padding).

    Example:
        >>> padding_mask(torch.tensor([[0, 1]])).tolist()
        [[[[False, True]]]]
    """
    if attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must be (batch, keys), not of shape {shape}")
    return attention_mask.bool()[:, None, None, :]


# ── attention ────────────────────────────────────────────────────────────────────────────
def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """How much each query takes from each key: softmax(q·k × scale) (Chapter 1).

    Rows sum to one; a query that may look nowhere (left padding) gets zeros. The softmax runs
    in float32 or wider, as in transformers. Source: "Attention Is All You Need", 3.2.1.

    Args:
        query: (..., heads, queries, head_dim), or (queries, head_dim).
        key: (..., kv_heads, keys, head_dim), or (keys, head_dim).
        mask: boolean, True = may look, broadcast against (batch, heads, queries, keys).
        causal: add the causal mask to it.
        scale: 1/sqrt(head_dim) unless given.

    Example:
        >>> attention_weights(torch.zeros(1, 2), torch.eye(2)).tolist()
        [[0.5, 0.5]]
    """
    key = _one_per_query_head(key, query)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    scores = query @ key.transpose(-2, -1) * scale
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean (True = may look), not {mask.dtype}; for a tokenizer's "
            "attention_mask use mask=padding_mask(attention_mask)"
        )
    if causal:
        future_hidden = causal_mask(*scores.shape[-2:], device=scores.device)
        mask = future_hidden if mask is None else mask & future_hidden
    wide = torch.promote_types(scores.dtype, torch.float32)
    if mask is None:
        return scores.softmax(-1, dtype=wide).to(query.dtype)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=wide)
    weights = weights.masked_fill(~mask, 0)  # rows of nothing but -inf come out NaN
    return weights.to(query.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention: `(output, weights)` (Chapter 1).

    The output equals that of PyTorch's `scaled_dot_product_attention`, which never hands
    out the weights.

    Args:
        query: as in `attention_weights`, like key, mask and causal.
        key: (..., kv_heads, keys, head_dim).
        value: (..., kv_heads, keys, any).
        mask: True = may look.
        causal: nobody looks into the future.

    Example:
        >>> attention(torch.zeros(1, 2), torch.eye(2), torch.tensor([[1.0], [3.0]]))[0]
        tensor([[2.]])
    """
    weights = attention_weights(query, key, mask=mask, causal=causal)
    return weights @ _one_per_query_head(value, query), weights


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, block_size: int = 64
) -> Tensor:
    """The same output, tile by tile, never holding a queries × keys matrix (Chapter 5).

    Per query row it keeps a running maximum, sum and output, and rescales them when a tile
    brings a larger maximum. Sources: FlashAttention (Dao et al., 2022), algorithm 1; online
    softmax: Milakov and Gimelshein, 2018.

    Args:
        query: as in `attention`, like key, value and causal.
        key: (..., kv_heads, keys, head_dim).
        value: (..., kv_heads, keys, any).
        causal: nobody looks into the future.
        block_size: rows and columns of a tile.

    Example:
        >>> query, key, value = torch.randn(3, 5, 8)
        >>> tiled = tiled_attention(query, key, value, block_size=2)
        >>> torch.allclose(tiled, attention(query, key, value)[0], atol=1e-5)
        True
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    key, value = _one_per_query_head(key, query), _one_per_query_head(value, query)
    queries, keys = query.shape[-2], key.shape[-2]
    if causal and queries > keys:
        causal_mask(queries, keys)  # raises
    scale = 1 / math.sqrt(query.shape[-1])
    wide = torch.promote_types(query.dtype, torch.float32)  # what the running sums need
    finished = []
    for top in range(0, queries, block_size):
        rows = query[..., top : top + block_size, :].to(wide) * scale
        position = torch.arange(top, top + rows.shape[-2], device=query.device)
        last_visible = position + keys - queries  # the causal limit of each row
        best = rows.new_full((*rows.shape[:-1], 1), -math.inf)
        total = torch.zeros_like(best)
        output = rows.new_zeros(*rows.shape[:-1], value.shape[-1])
        end = int(last_visible[-1]) + 1 if causal else keys
        for left in range(0, end, block_size):  # tiles wholly in the future never happen
            right = min(left + block_size, end)
            scores = rows @ key[..., left:right, :].to(wide).transpose(-2, -1)
            if causal:
                column = torch.arange(left, right, device=query.device)
                scores = scores.masked_fill(column > last_visible[:, None], -math.inf)
            # Every row sees key 0, so `best` is finite from the first tile on.
            new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
            shrink, part = (best - new_best).exp(), (scores - new_best).exp()
            total = total * shrink + part.sum(-1, keepdim=True)
            output = output * shrink + part @ value[..., left:right, :].to(wide)
            best = new_best
        finished.append((output / total).to(query.dtype))
    return torch.cat(finished, dim=-2)


def _one_per_query_head(other: Tensor, query: Tensor) -> Tensor:
    """Keys or values with each head repeated for the group of query heads it serves."""
    if query.dim() != other.dim() or query.dim() < 2:
        shapes = f"{tuple(query.shape)} and {tuple(other.shape)}"
        raise ValueError(
            f"query, key and value must have the same number of dimensions, not shapes {shapes}"
        )
    if query.dim() == 2 or query.shape[-3] == other.shape[-3]:
        return other
    heads, kv_heads = query.shape[-3], other.shape[-3]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads evenly")
    return other.repeat_interleave(heads // kv_heads, dim=-3)


# ── heads ────────────────────────────────────────────────────────────────────────────────
def split_heads(hidden: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads × head_dim) -> (batch, heads, tokens, head_dim) (Chapter 1).

    Args:
        hidden: the features of each token.
        heads: how many; ValueError if the features do not divide into them.

    Example:
        >>> split_heads(torch.zeros(1, 5, 6), 3).shape
        torch.Size([1, 3, 5, 2])
    """
    if hidden.shape[-1] % heads:
        raise ValueError(f"{hidden.shape[-1]} features do not divide into {heads} heads")
    return hidden.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(hidden: Tensor) -> Tensor:
    """The way back from `split_heads`: heads side by side again (Chapter 1).

    Args:
        hidden: (batch, heads, tokens, head_dim).

    Example:
        >>> merge_heads(torch.zeros(1, 3, 5, 2)).shape
        torch.Size([1, 5, 6])
    """
    return hidden.transpose(-3, -2).flatten(-2)


def rotate(hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features by its position's angle (RoPE; Su et al., 2021).

    Args:
        hidden: (batch, heads, tokens, head_dim).
        cos: (batch, tokens, rotated features), as a transformers model's `rotary_emb`
            makes it; features beyond those stay.
        sin: like cos.

    Example:
        >>> quarter = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)  # 90 degrees
        >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), *quarter).flatten().tolist()
        [0.0, 1.0]
    """
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    turned, still = hidden.split((cos.shape[-1], hidden.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, still], -1)


class MultiHeadAttention(nn.Module):
    """Self-attention with several heads, grouped-query if kv_heads < heads (Chapter 1).

    Parameters have the names of a Llama layer, so the state dict of a real layer loads.

    Args:
        hidden_size: features of a token, a multiple of heads.
        heads: query heads.
        kv_heads: key-value heads; as many as heads unless given.
        bias: give all four projections a bias.

    Example:
        >>> output, weights = MultiHeadAttention(hidden_size=6, heads=3)(torch.randn(1, 5, 6))
        >>> output.shape, weights.shape
        (torch.Size([1, 5, 6]), torch.Size([1, 3, 5, 5]))
    """

    def __init__(
        self, hidden_size: int, heads: int, kv_heads: int | None = None, *, bias: bool = False
    ) -> None:
        super().__init__()
        if hidden_size % heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of {heads=}")
        self.heads, self.kv_heads = heads, kv_heads or heads
        kv_size = hidden_size // heads * self.kv_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(
        self,
        hidden: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The mixed hidden states and the weights.

        Args:
            hidden: (batch, tokens, hidden_size).
            rotary: the `(cos, sin)` of `rotate`.
            mask: as in `attention`.
            causal: as in `attention`.
        """
        query = split_heads(self.q_proj(hidden), self.heads)
        key = split_heads(self.k_proj(hidden), self.kv_heads)
        value = split_heads(self.v_proj(hidden), self.kv_heads)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        output, weights = attention(query, key, value, mask=mask, causal=causal)
        return self.o_proj(merge_heads(output)), weights
