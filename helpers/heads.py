"""What the heads of a real model look at, and a look-up in the plane (Chapter 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helpers import plots
from helpers._checks import whole_number
from helpers.attention import attention_weights, rotate, split_heads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Families whose attention `read_heads` rebuilds; the tests compare each with transformers.
FAMILIES = ("llama", "mistral", "opt", "phi3", "qwen2", "qwen3")


@dataclass
class Heads:
    """What every head of a model looked at."""

    tokens: list[str]
    weights: Tensor  # (layers, heads, tokens, tokens)

    def plot(self, layer: int, head: int) -> Figure:
        """One head as a heat map, a row per query, a column per key."""
        return self.plot_gallery({(layer, head): f"layer {layer}, head {head}"})

    def plot_gallery(self, titles: Mapping[tuple[int, int], str], *, columns: int = 3) -> Figure:
        """Several heads side by side.

        Args:
            titles: `{(layer, head): title}`.
            columns: pictures in a row.
        """
        if not titles:
            raise ValueError("titles must name at least one (layer, head)")
        for layer, head in titles:
            whole_number("layer", layer, 0, self.weights.shape[0] - 1)
            whole_number("head", head, 0, self.weights.shape[1] - 1)
        columns = min(columns, len(titles))
        rows = math.ceil(len(titles) / columns)
        side = 4.6 if columns == 1 else 10.0 / columns
        width, height = side * columns + 0.8, side * rows
        fig, axes = plots.figure(rows, columns, width=width, height=height, squeeze=False)
        words = [token.strip() or repr(token)[1:-1] for token in self.tokens]
        look: dict[str, Any] = {"limits": (0, 1), "aspect": "equal"}
        look |= {"xlabel": "looked at (key)", "ylabel": "looking (query)"}
        if len(words) <= 24:  # more would not be readable
            look["names"] = words
        for ax, ((layer, head), title) in zip(axes.flat, titles.items(), strict=False):
            weights = self.weights[layer, head].float().cpu()
            future = torch.ones_like(weights, dtype=torch.bool).triu(1)
            shown = weights.masked_fill(future, math.nan).numpy()
            plots.heatmap(shown, ax=ax, title=title, **look)
        for ax in axes.flat[len(titles) :]:
            ax.axis("off")
        fig.colorbar(axes.flat[0].images[0], ax=axes, shrink=0.7, label="attention weight")
        return fig


@torch.no_grad()
def read_heads(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Heads:
    """Rebuild every head's attention weights from the inside of a real model (Chapter 1).

    Takes the hidden states that enter each attention layer, that layer's own query and key
    projections and the model's rotary angles; the softmax is ours. Equal to the model's own
    weights (`output_attentions=True`), but it works with any attention kernel.

    Args:
        model: of one of `FAMILIES`, or ValueError.
        tokenizer: the model's.
        text: from one token to as many as the model's window holds, or ValueError.

    Example:
        >>> heads = read_heads(model, tokenizer, "The birch canoe")  # doctest: +SKIP
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"read_heads knows {', '.join(FAMILIES)}, not {config.model_type!r}: load the model "
            "with attention='eager' and call it with output_attentions=True instead"
        )
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    count = inputs["input_ids"].shape[1]
    longest = getattr(config, "sliding_window", None) or config.max_position_embeddings
    if not 0 < count <= longest:
        raise ValueError(f"text must have 1 to {longest} tokens (the model's window), not {count}")
    found = []

    def look(module: Any, arguments: tuple, keywords: dict) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        found.append(_layer_weights(module, hidden, keywords.get("position_embeddings"), config))

    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in layers]
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = [str(tokenizer.decode([token])) for token in inputs["input_ids"][0].tolist()]
    return Heads(tokens, torch.stack(found))


def _layer_weights(layer: Any, hidden: Tensor, rotary: Any, config: Any) -> Tensor:
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


def plot_lookup(
    query: Sequence[float],
    keys: Sequence[Sequence[float]],
    values: Sequence[float],
    labels: Sequence[str],
    *,
    unit: str = "",
) -> Figure:
    """A soft look-up in the plane: the query among the keys, and what it takes (Chapter 1).

    Args:
        query: two numbers.
        keys: two numbers each.
        values: a number for each key.
        labels: a name for each key; ValueError if the numbers of things differ.
        unit: of the values.

    Example:
        >>> fig = plot_lookup([1, 0], [[0, 1], [1, 0]], [5, 12], ["north", "east"])
        >>> fig.axes[1].get_title(loc="left")
        'answer: 9.7'
    """
    arrow, n = torch.as_tensor(query).float(), len(labels)
    points, numbers = torch.as_tensor(keys).float(), torch.as_tensor(values).float()
    if (arrow.shape, points.shape, numbers.shape) != ((2,), (n, 2), (n,)):
        raise ValueError(
            f"for {n} labels query, keys and values must have the shapes (2,), ({n}, 2) and "
            f"({n},), not {tuple(arrow.shape)}, {tuple(points.shape)} and {tuple(numbers.shape)}"
        )
    weights = attention_weights(arrow[None], points)[0]
    _, (plane, bars) = plots.figure(1, 2, width=8.5, height=3.4, width_ratios=(1, 1.3))
    limit = 1.3 * max(1.0, points.abs().max().item(), arrow.abs().max().item())
    for point, label in zip(points, labels, strict=True):
        beyond = point + 0.14 * limit * point / point.norm().clamp(min=1e-6)
        plane.annotate(label, beyond.tolist(), ha="center", va="center")
    for point, color in [*((point, "gray") for point in points), (arrow, "blue")]:
        style = {"arrowstyle": "-|>", "color": plots.COLORS[color], "lw": 2.5}
        plane.annotate("", point.tolist(), (0, 0), arrowprops=style)
    plane.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    plane.set(xlabel="feature 1", ylabel="feature 2", title="query (blue) and keys (gray)")
    pairs = zip(labels, numbers.tolist(), weights.tolist(), strict=True)
    shares = {f"{label}: {value:g}{unit}": weight for label, value, weight in pairs}
    title = f"answer: {weights @ numbers:.1f}{unit}"
    return plots.bars(
        shares, horizontal=True, ax=bars, xlim=(0, 1), xlabel="attention weight", title=title
    )
