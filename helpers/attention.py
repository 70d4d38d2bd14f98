"""Attention from scratch, and the heads of a real model as pictures (Chapters 1 and 5).

Shapes are those of PyTorch and transformers: queries (batch, heads, queries, head_dim),
keys and values (batch, kv_heads, keys, head_dim). With fewer key-value heads than heads,
each one serves a whole group of queries (grouped-query attention). A mask is True where
a query may look.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

# Families whose attention `read_heads` rebuilds; the tests compare each with transformers.
FAMILIES = ("llama", "mistral", "opt", "phi3", "qwen2", "qwen3")


# ── masks ────────────────────────────────────────────────────────────────────────────────
def causal_mask(queries, keys=None, *, device=None):
    """Which key each query may look at when nobody sees the future (Chapter 1).

    Returns a boolean (queries, keys). With more keys than queries the queries are the last
    positions, as when a model generates from its cache; `is_causal=True` in PyTorch counts
    from the first ones instead. Raises ValueError when some query would see nothing.
    """
    keys = queries if keys is None else keys
    if not 0 < queries <= keys:
        raise ValueError(
            "causal_mask needs 0 < queries <= keys (the queries are the last positions), "
            f"got queries={queries} and keys={keys}"
        )
    everywhere = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return everywhere.tril(keys - queries)


def padding_mask(attention_mask):
    """A tokenizer's attention_mask as a mask for attention: no query sees padding.

    attention_mask: (batch, keys) of 1 (real) and 0 (padding); returns (batch, 1, 1, keys).
    """
    if attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must be (batch, keys), not of shape {shape}")
    return attention_mask.bool()[:, None, None, :]


# ── attention ────────────────────────────────────────────────────────────────────────────
def attention_weights(query, key, *, mask=None, causal=False, scale=None):
    """How much each query takes from each key: softmax(q·k × scale), rows that sum to one.

    mask: boolean, True = may look, broadcast against (batch, heads, queries, keys);
    `causal` adds the causal mask to it. scale: 1/sqrt(head_dim) unless given. A query that
    may look nowhere (left padding) gets zeros. The softmax runs in float32 or wider, like
    that of transformers. Chapter 1; "Attention Is All You Need", section 3.2.1.
    """
    key = _one_per_query_head(key, query)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    scores = query @ key.transpose(-2, -1) * scale
    allowed = _allowed(scores, mask, causal)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0)  # rows of nothing but -inf come out NaN
    return weights.to(query.dtype)


def attention(query, key, value, *, mask=None, causal=False, scale=None):
    """Scaled dot-product attention: `(output, weights)`; see `attention_weights`.

    The output (batch, heads, queries, head_dim) equals that of PyTorch's
    `scaled_dot_product_attention`, which never hands out the weights (Chapter 1).
    """
    weights = attention_weights(query, key, mask=mask, causal=causal, scale=scale)
    return weights @ _one_per_query_head(value, query), weights


def tiled_attention(query, key, value, *, causal=False, block_size=64, scale=None):
    """The same output, tile by tile, never holding a queries × keys matrix (Chapter 5).

    block_size: rows and columns of a tile. Per query row it keeps a running maximum, sum
    and output, and rescales them when a tile brings a larger maximum. FlashAttention (Dao
    et al., 2022), algorithm 1; online softmax: Milakov and Gimelshein, 2018.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    key, value = _one_per_query_head(key, query), _one_per_query_head(value, query)
    queries, keys = query.shape[-2], key.shape[-2]
    if causal and queries > keys:
        causal_mask(queries, keys)  # raises
    if scale is None:
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


def _one_per_query_head(other, query):
    """Keys or values with each head repeated for the group of query heads it serves."""
    if query.dim() != other.dim() or query.dim() < 2:
        raise ValueError(
            "query, key and value must have the same number of dimensions, at least "
            f"(tokens, head_dim); got shapes {tuple(query.shape)} and {tuple(other.shape)}"
        )
    if query.dim() == 2 or query.shape[-3] == other.shape[-3]:
        return other
    heads, kv_heads = query.shape[-3], other.shape[-3]
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} key-value heads evenly: the "
            "number of heads must be a multiple of the number of key-value heads"
        )
    return other.repeat_interleave(heads // kv_heads, dim=-3)


def _allowed(scores, mask, causal):
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean (True = may look), not {mask.dtype}; for a tokenizer's "
            "attention_mask use mask=padding_mask(attention_mask)"
        )
    if not causal:
        return mask
    future_hidden = causal_mask(*scores.shape[-2:], device=scores.device)
    return future_hidden if mask is None else mask & future_hidden


# ── heads ────────────────────────────────────────────────────────────────────────────────
def split_heads(hidden, heads):
    """(batch, tokens, heads × head_dim) -> (batch, heads, tokens, head_dim) (Chapter 1)."""
    if hidden.shape[-1] % heads:
        raise ValueError(f"{hidden.shape[-1]} features do not divide into {heads} heads")
    return hidden.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(hidden):
    """The way back from `split_heads`: heads side by side again."""
    return hidden.transpose(-3, -2).flatten(-2)


def rotate(hidden, cos, sin):
    """Turn each pair of features by its position's angle (RoPE; Su et al., 2021).

    hidden: (batch, heads, tokens, head_dim); cos, sin: (batch, tokens, rotated features),
    as a transformers model's `rotary_emb` makes them; features beyond those stay.
    """
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    turned, still = hidden.split((cos.shape[-1], hidden.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, still], -1)


class MultiHeadAttention(nn.Module):
    """Self-attention with several heads, grouped-query if kv_heads < heads (Chapter 1).

    Parameters have the names of a Llama layer, so the state dict of a real layer loads.
    Calling it with hidden states (batch, tokens, hidden_size) gives `(output, weights)`;
    `rotary` is the `(cos, sin)` of `rotate`, `mask` and `causal` are those of `attention`.
    """

    def __init__(self, hidden_size, heads, kv_heads=None, *, head_dim=None, bias=False):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        if head_dim is None:
            if hidden_size % heads:
                raise ValueError(f"hidden_size={hidden_size} is not a multiple of {heads=}")
            head_dim = hidden_size // heads
        self.q_proj = nn.Linear(hidden_size, self.heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * head_dim, hidden_size, bias=bias)

    def forward(self, hidden, *, rotary=None, mask=None, causal=True):
        """The mixed hidden states (batch, tokens, hidden_size) and the weights."""
        query = split_heads(self.q_proj(hidden), self.heads)
        key = split_heads(self.k_proj(hidden), self.kv_heads)
        value = split_heads(self.v_proj(hidden), self.kv_heads)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        output, weights = attention(query, key, value, mask=mask, causal=causal)
        return self.o_proj(merge_heads(output)), weights


# ── a real model's heads ─────────────────────────────────────────────────────────────────
@dataclass
class Heads:
    """What every head of a model looked at: `weights` (layers, heads, tokens, tokens)."""

    tokens: list
    weights: torch.Tensor

    def plot(self, layer, head):
        """One head as a heat map: a row per query, a column per key."""
        return self.gallery({(layer, head): f"layer {layer}, head {head}"})

    def gallery(self, titles, *, columns=3):
        """Several heads side by side; titles: `{(layer, head): title}`."""
        from helpers import plots

        layers, heads = self.weights.shape[:2]
        for layer, head in titles:
            if not (0 <= layer < layers and 0 <= head < heads):
                raise ValueError(
                    f"there is no layer {layer}, head {head}: layers run from 0 to "
                    f"{layers - 1} and heads from 0 to {heads - 1}"
                )
        columns = min(columns, len(titles))
        rows = math.ceil(len(titles) / columns)
        side = 4.6 if columns == 1 else 10.0 / columns
        size = {"width": side * columns + 0.8, "height": side * rows}
        fig, axes = plots.figure(rows, columns, squeeze=False, **size)
        words = [token.strip() or repr(token)[1:-1] for token in self.tokens]
        for ax in axes.flat:
            ax.axis("off")
        for ax, ((layer, head), title) in zip(axes.flat, titles.items(), strict=False):
            weights = self.weights[layer, head].float().cpu()
            future = torch.ones_like(weights, dtype=torch.bool).triu(1)
            shown = weights.masked_fill(future, math.nan).numpy()
            picture = ax.imshow(shown, vmin=0, vmax=1)
            ax.axis("on")
            ax.grid(False)
            ax.set(title=title, xlabel="looked at (key)", ylabel="looking (query)")
            if len(words) <= 24:  # more would not be readable
                ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
                ax.set_yticks(range(len(words)), words, fontsize=8)
        fig.colorbar(picture, ax=axes, shrink=0.7, label="attention weight")
        return fig


@torch.no_grad()
def read_heads(model, tokenizer, text):
    """Rebuild every head's attention weights from the inside of a real model (Chapter 1).

    Takes the hidden states that enter each attention layer, that layer's own query and key
    projections and the model's rotary angles; the softmax is ours. Equal to the model's own
    weights (`attn_implementation="eager"`, `output_attentions=True`), but it works with any
    attention kernel. Returns `Heads`. Raises ValueError for a family it does not know.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"read_heads knows the attention of {', '.join(FAMILIES)}, not of "
            f"{config.model_type!r}. Load the model with attention='eager' and call it "
            "with output_attentions=True to get its own weights"
        )
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    input_ids = inputs["input_ids"]
    longest = getattr(config, "sliding_window", None) or config.max_position_embeddings
    if not 0 < input_ids.shape[1] <= longest:
        raise ValueError(
            f"text must have 1 to {longest} tokens (the model's window), not {input_ids.shape[1]}"
        )
    found = []

    def look(module, arguments, keywords):
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        rotary = keywords.get("position_embeddings")
        found.append(_layer_weights(module, hidden, rotary, config))

    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in layers]
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = [tokenizer.decode([token]) for token in input_ids[0].tolist()]
    return Heads(tokens, torch.stack(found))


def _layer_weights(layer, hidden, rotary, config):
    if hasattr(layer, "qkv_proj"):  # Phi-3: the three projections in one matrix
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sizes = [n * layer.head_dim for n in (heads, kv_heads, kv_heads)]
        query, key, _ = layer.qkv_proj(hidden).split(sizes, dim=-1)
    else:
        query, key = layer.q_proj(hidden), layer.k_proj(hidden)
    query, key = (split_heads(x, x.shape[-1] // layer.head_dim) for x in (query, key))
    if hasattr(layer, "q_norm"):  # Qwen 3
        query, key = layer.q_norm(query), layer.k_norm(key)
    if rotary is not None:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    return attention_weights(query, key, causal=True, scale=layer.scaling)[0]


# ── attention in two dimensions ──────────────────────────────────────────────────────────
def plot_lookup(query, keys, values, labels, *, unit=""):
    """A soft look-up in the plane: the query among the keys, and what it takes from each.

    query: two numbers; keys: (n, 2); values: n numbers; labels: n names (Chapter 1).
    """
    from helpers import plots

    query, keys = torch.as_tensor(query).float(), torch.as_tensor(keys).float()
    values = torch.as_tensor(values).float()
    n = len(labels)
    if query.shape != (2,) or keys.shape != (n, 2) or values.shape != (n,):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, keys, values))
        raise ValueError(
            f"for {n} labels plot_lookup needs a query, keys and values of shapes (2,), "
            f"({n}, 2) and ({n},), not {shapes}"
        )
    weights = attention_weights(query[None], keys)[0]
    fig, (plane, bars) = plots.figure(1, 2, width=8.5, height=3.4, width_ratios=(1, 1.3))
    limit = 1.3 * max(1.0, keys.abs().max().item(), query.abs().max().item())
    for key, label in zip(keys, labels, strict=True):
        _arrow(plane, *key.tolist(), plots.COLORS["gray"])
        beyond = key + 0.14 * limit * key / key.norm().clamp(min=1e-6)
        plane.annotate(label, beyond.tolist(), ha="center", va="center")
    _arrow(plane, *query.tolist(), plots.COLORS["blue"])
    plane.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    plane.set(xlabel="feature 1", ylabel="feature 2", title="query (blue) and keys (gray)")
    bars.barh(range(n), weights.tolist(), color=plots.COLORS["blue"])
    named = [
        f"{name}: {value:g}{unit}" for name, value in zip(labels, values.tolist(), strict=True)
    ]
    bars.set_yticks(range(n), named)
    bars.invert_yaxis()
    answer = (weights @ values).item()
    bars.set(xlim=(0, 1), xlabel="attention weight", title=f"answer: {answer:.1f}{unit}")
    return fig


def _arrow(ax, x, y, color):
    ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2.5})
