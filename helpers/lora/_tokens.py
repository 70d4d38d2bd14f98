"""Rows of new tokens, and whether anything will train them (Chapter 3)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def untrained_rows(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Rows of the embedding or the head that belong to new tokens and that nothing trains."""
    names = {id(module): name for name, module in model.named_modules()}
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    pad, eos = (getattr(tokenizer or config, f"{name}_token_id", None) for name in ("pad", "eos"))
    pad = None if pad in (eos if isinstance(eos, list) else [eos]) else pad  # an end is learned
    used: Collection[int] | None = tokenizer and tokenizer.get_vocab().values()
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        side = None
        with contextlib.suppress(NotImplementedError):  # which is how transformers says "none"
            side = getattr(model, get, lambda: None)()
        table = _innermost(side)
        if used is None:  # the embedding comes first, and may carry `prepare_model`'s note
            used = getattr(side, "new_tokens", getattr(table, "new_tokens", None))
        rows = _as_made(getattr(table, "weight", None))
        known = _surely_used(rows, pad) if used is None else used
        for row in sorted(set(rows).intersection(known) - {pad} - _trained(side, rows)):
            token = tokenizer.convert_ids_to_tokens(row) if tokenizer else f"row {row}"
            found.append(f"{token} of {names.get(id(side), 'the embedding')}")
    return found


def _innermost(module: Any) -> Any:
    """The table under the wrappers of PEFT, or under a `LoRALinear`."""
    for name in ("token_adapter", "original_module", "base_layer", "base"):
        module = getattr(module, name, None) or module
    return module


def _trained(side: Any, rows: range) -> set[int]:
    if side is None or not any(parameter.requires_grad for parameter in side.parameters()):
        return set()
    if (tokens := getattr(side, "token_adapter", None)) is None:
        return set(rows)  # the whole table, or a low-rank pair with a part for every row
    return {row for adapter in tokens.active_adapters for row in tokens.token_indices[adapter]}


def _as_made(weight: Any) -> range:
    """Trailing rows that are what resizing makes of them: the mean of all, but for 1 in 30,000.

    Trained rows of real models are 0.7 times as far from the mean as usual, or farther.
    """
    if not isinstance(weight, torch.Tensor) or weight.is_meta or not weight.is_floating_point():
        return range(0)
    table, count = weight.detach(), len(weight)
    mean = table.mean(0, dtype=torch.float32)
    usual = (table[:: count // 1024 + 1].float() - mean).norm(dim=1).median()
    limit = 1e-3 * usual + torch.finfo(table.dtype).eps * mean.norm()  # 16 bits round the mean
    tail = (table[-4096:].float() - mean).norm(dim=1)
    others = (tail >= min(limit, usual / 2)).nonzero()
    return range(count - len(tail) + (int(others[-1]) + 1 if len(others) else 0), count)


def _surely_used(rows: range, pad: int | None) -> range:
    """Of rows that were added, those that must have a token, whoever rounded their number up."""
    if pad is not None and pad in rows:  # `prepare_tokenizer` adds it after all others
        return range(rows.start, pad)
    return range(rows.start, rows.stop - math.gcd(rows.stop, 64) + 1)
