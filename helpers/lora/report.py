"""What a model holds, what of it trains, and what an adapter will add (Chapter 3)."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from helpers._report import Shown
from helpers.lora._modules import adapter_parts, inside_attention, is_norm, named_modules

if TYPE_CHECKING:
    import pandas as pd
    from peft import LoraConfig

_MOST_ROWS = 20  # of a report; what does not fit is summed up in the last row


def count_trainable(model: nn.Module, config: LoraConfig) -> int:
    """How many parameters `get_peft_model(model, config)` will train, before it exists.

    Each adapted layer costs r (in + out), an embedding r (rows + width); DoRA adds out,
    `modules_to_save` count whole. PEFT itself adapts a copy of the shapes, without memory.

    Args:
        model: before adapters are attached, quantized or on the meta device too.
        config: of the adapter; neither is changed.

    Raises:
        ValueError: what PEFT refuses, such as targets that match nothing.

    Example:
        >>> from peft import LoraConfig
        >>> model = nn.ModuleDict({"up": nn.Linear(6, 4)})
        >>> count_trainable(model, LoraConfig(r=2, target_modules=["up"]))  # 2 (6 + 4)
        20
    """
    from peft import get_peft_model

    with warnings.catch_warnings(action="ignore"):  # advice for whoever attaches it
        shapes: Any = _without_memory(model)
        adapted: Any = get_peft_model(shapes, copy.deepcopy(config), low_cpu_mem_usage=True)
    return adapted.get_nb_trainable_parameters()[0]


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy on the meta device, where quantized layers are linear ones of their shape."""
    made: dict[int, Any] = {}
    for module in named_modules(model).values():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            shape = (module.in_features, module.out_features, module.bias is not None)
            made[id(module)] = nn.Linear(*shape, device="meta")
    for parameter in model.parameters():
        made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
    for buffer in model.buffers():
        made[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, made)


@dataclass(frozen=True, repr=False)
class ParameterReport(Shown):
    """Parameters by kind of module: prints as a table of at most 20 rows and a headline."""

    _frame: pd.DataFrame

    @property
    def parameters(self) -> int:
        """How many there are."""
        return int(self._frame["parameters"].sum())

    @property
    def trainable(self) -> int:
        """How many of them require a gradient."""
        return int(self._frame["trainable"].sum())

    @property
    def bytes(self) -> int:
        """What all of them take in memory."""
        return int(self._frame["bytes"].sum())

    def table(self) -> pd.DataFrame:
        """A row per kind: tensors, parameters, trainable, dtypes and bytes."""
        return self._frame.copy()

    @property
    def headline(self) -> str:
        """One sentence: trainable of all, the share, and the storage in MB (1e6 bytes)."""
        return (
            f"{self.trainable:,} of {self.parameters:,} parameters are trainable "
            f"({self.trainable / max(1, self.parameters):.2%}); {self.bytes / 1e6:,.1f} MB"
        )

    def _in_words(self) -> pd.DataFrame:
        words = self._frame.reset_index().rename(columns={"bytes": "MB"})
        for column in ("parameters", "trainable"):
            words[column] = words[column].map("{:,}".format)
        words["MB"] = words["MB"].map(lambda size: f"{size / 1e6:,.2f}")
        return words

    def __str__(self) -> str:
        return f"{self._in_words().to_string(index=False)}\n{self.headline}"

    def _repr_html_(self) -> str:
        return f"{self._in_words().to_html(index=False, border=0)}<p>{self.headline}</p>"


def parameter_report(model: nn.Module) -> ParameterReport:
    """What a model holds and what of it trains, by kind of module (Chapter 3).

    Counts every parameter once, 4-bit ones by what they stand for rather than by the bytes
    they are packed in. `trainable` is requires_grad, nothing more: `check_training` says
    whether it makes sense.

    Args:
        model: with or without adapters; TypeError when it is no torch module.

    Example:
        >>> print(parameter_report(nn.ModuleDict({"mlp": nn.Linear(6, 4)})))
                kind  tensors parameters trainable  dtypes   MB
        feed-forward        2         28        28 float32 0.00
        28 of 28 parameters are trainable (100.00%); 0.0 MB
    """
    import pandas as pd

    named_modules(model)  # for its TypeError
    adapters = {id(p): adapter for _, _, adapter, ps in adapter_parts(model) for p in ps}
    rows = []
    for name, parameter in model.named_parameters():
        kind = _kind(name, model.get_submodule(name.rpartition(".")[0]))
        if id(parameter) in adapters:
            kind = f"adapter {adapters[id(parameter)]!r}: {kind}"
        dtype, count = str(parameter.dtype).removeprefix("torch."), parameter.numel()
        if state := getattr(parameter, "quant_state", None):  # two weights in a byte
            dtype, count = f"{state.quant_type} (in {dtype})", math.prod(state.shape)
        rows.append((kind, 1, count, count * parameter.requires_grad, dtype, parameter.nbytes))
    columns = ["kind", "tensors", "parameters", "trainable", "dtypes", "bytes"]
    frame = pd.DataFrame(rows, columns=columns)
    if frame["kind"].nunique() > _MOST_ROWS:
        kept = list(frame["kind"].unique()[: _MOST_ROWS - 1])
        frame.loc[~frame["kind"].isin(kept), "kind"] = "all other kinds"
    sums: dict[str, Any] = dict.fromkeys(columns[1:], "sum")
    sums["dtypes"] = lambda names: ", ".join(dict.fromkeys(names))
    return ParameterReport(frame.groupby("kind", sort=False).agg(sums))


def _kind(name: str, module: nn.Module) -> str:
    parts = name.split(".")
    feed_forward = ("mlp", "ffn", "feed_forward", "fc", "dense_", "expert")
    tests = {
        "output head": not {"lm_head", "embed_out"}.isdisjoint(parts),  # GPT-NeoX has the latter
        "embedding": isinstance(module, nn.Embedding) or "embed" in name or "token_adapter" in name,
        "norm": is_norm(module),
        "attention": inside_attention(name),
        "feed-forward": any(part.startswith(feed_forward) for part in parts),
    }
    return next((kind for kind, fits in tests.items() if fits), "other")
