"""A run's choices, and from them the model as it is trained, without data (Chapter 5)."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils.checkpoint import checkpoint

from helpers.memory import _kernels, _quantized
from helpers.memory._configs import CannotPredictError, positions, told
from helpers.memory.cards import AMPERE, Capability, half_dtype


@dataclass(frozen=True)
class Same:
    """A config (or LoraConfig) that equals another of the same text, so that caches know it."""

    text: str
    value: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class Choices:
    """The choices of a run, checked; see `memory.estimate_training` for their meaning."""

    quantization: str | None = None
    double_quant: bool = True
    dtype: torch.dtype = torch.bfloat16
    lora: int | Same | None = None
    optimizer: str = "adamw_torch_fused"
    batch_size: int = 1
    sequence_length: int = 512
    gradient_checkpointing: bool | str = True
    attention: str = "sdpa"
    mixed_precision: torch.dtype | None = None
    gradient_accumulation: bool = False
    packing: bool = False
    padded: bool = False
    stack: str = "current"
    capability: Capability = AMPERE  # of the card
    loss: str = "fused"  # trl's head; 'logits': the model's own loss over all logits
    kernels: str = "cuda"  # 'cpu': what this machine's kernels keep, to compare with a real run

    @property
    def book(self) -> bool:
        """Whether it is the older stack, in a plain loop: the first step, without a past."""
        return self.stack == "book"


def build(config: Any, run: Choices) -> Any:
    """The model as it is trained (stand-ins, adapters, checkpointing), on the current device."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config._attn_implementation = run.attention
    model: Any = AutoModelForCausalLM.from_config(config, dtype=run.dtype)
    _check_positions(model, run)
    for module in (config, *model.modules()):
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0  # skipping layers at random has no peak to predict
    if run.quantization:
        options = run.quantization, run.double_quant, run.dtype, run.stack
        _quantized.quantize_linears(model, *options)
        model.config._is_quantized = True  # transformers' flash attention asks
        model.requires_grad_(False)
        if run.book:  # prepare_model_for_kbit_training, which today's trl leaves out
            for parameter in model.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
    if run.lora is not None:
        model = _with_adapters(model, run)
    if run.gradient_checkpointing:
        # backward() runs without function modes, so the recomputation brings its own
        again = kernels_of(run)
        switch = getattr(model, "activation_checkpointing_enable", None)
        switch = switch or model.gradient_checkpointing_enable  # its older name
        contexts = lambda: (contextlib.nullcontext(), again())  # noqa: E731
        switch({"use_reentrant": False, "context_fn": contexts})
        # the k-bit preparation of the book's time switched it on in its older form
        if run.gradient_checkpointing == "reentrant" or (run.book and run.quantization):
            again = functools.partial(_reentrant, again)
            model._set_gradient_checkpointing(gradient_checkpointing_func=again)
        if run.lora is not None:
            model.enable_input_require_grads()
    return model.train()


def _reentrant(kernels: Callable, function: Callable, *args: Any) -> Any:
    """`use_reentrant=True`: a forward pass without a graph, so that nothing outlives it.

    Else only what is saved for backward goes; 8-bit layers hang their inputs on their ctx.
    """

    def layer(*args: Any) -> Any:
        with kernels() if torch.is_grad_enabled() else contextlib.nullcontext():
            return function(*args)

    return checkpoint(layer, *args, use_reentrant=True)


def kernels_of(run: Choices) -> Callable[[], contextlib.AbstractContextManager]:
    """A function that makes the context in which the run's operators run."""
    if run.kernels == "cpu":
        return contextlib.nullcontext
    return lambda: _kernels.CudaKernels(run.mixed_precision is not None, run.capability)


def _check_positions(model: Any, run: Choices) -> None:
    """Refuse a sequence beyond a table with a row for each position, which a trace won't miss."""
    most, words = positions(model.config), model.get_input_embeddings()
    if most is None or run.sequence_length <= most:
        return
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    tables += [buffer for buffer in model.buffers() if buffer.dim() == 2]
    if any(most <= len(x) <= most + 2 for x in tables if x is not words.weight):
        raise CannotPredictError(
            f"sequence_length={run.sequence_length} is more than this model's {most} positions"
        )


@contextlib.contextmanager
def with_flash_attention(model_class: Any) -> Iterator[None]:
    """transformers as if the package flash-attn were here: its masks, and our kernel."""
    from transformers import PreTrainedModel
    from transformers.integrations import flash_attention

    def offered(self: Any, name: str, *_: Any, **__: Any) -> str:
        known = getattr(self, "_compatible_flash_implementations", None) or [name]
        if not self._supports_flash_attn or name not in known:
            raise ValueError(f"{type(self).__name__} does not support flash_attention_2")
        return name

    kernel, name = _kernels.flash_attention_2, "_flash_attention_forward"
    with contextlib.ExitStack() as stack:
        where = PreTrainedModel, "_check_and_adjust_attn_implementation"
        stack.enter_context(mock.patch.object(*where, offered))
        # Falcon, GPT-J and GPT-Neo call it by themselves
        for module in (flash_attention, sys.modules[model_class.__module__]):
            stack.enter_context(mock.patch.object(module, name, kernel, create=True))
        yield


def _with_adapters(model: Any, run: Choices) -> Any:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    lora: Any = copy.deepcopy(getattr(run.lora, "value", run.lora))
    if isinstance(lora, int):
        targets = None if model.config.model_type in KNOWN else "all-linear"
        # The book's adapters drop 5 % of their inputs: a dropout mask is a byte per number.
        dropout = 0.05 if run.book else 0.0
        lora = LoraConfig(r=lora, lora_dropout=dropout, target_modules=targets)
    kind = model.config.model_type
    try:
        model = get_peft_model(model, lora)
    except Exception as error:
        raise CannotPredictError(f"lora: PEFT refuses it for {kind!r} ({told(error)})") from error
    if isinstance(model.get_output_embeddings(), BaseTunerLayer) and not run.book:
        raise CannotPredictError(
            "lora: its target_modules name the head, which SFTTrainer refuses, since its loss "
            "reads the head's weight past an adapter; modules_to_save works"
        )
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, _quantized.FakeQuantizedLinear):
            module.forward = types.MethodType(_quantized.quantized_lora_forward, module)
    # trl 1.16 makes them bfloat16. Where a card has none, training.LeanSFTTrainer leaves
    # them float32, the only type that float16's gradient scaler takes.
    if run.quantization and not run.book and half_dtype(run.capability) == "bfloat16":
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def adapted(model: Any) -> tuple[str, ...]:
    """The names of the kinds of layers that carry adapters."""
    named = (n for n, m in model.named_modules() if hasattr(m, "lora_A"))
    return tuple(sorted({name.rpartition(".")[2] for name in named}))


def to_fakes(model: torch.nn.Module) -> None:
    """Make meta tensors fakes on the CPU, under a FakeTensorMode; what was shared stays so."""
    memo: dict[int, tuple] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = (new, tensor)
        return memo[id(tensor)][0]

    for module in model.modules():
        stores: tuple[dict, ...] = (module._parameters, module._buffers, module.__dict__)
        for store in stores:
            for name, value in list(store.items()):
                if isinstance(value, torch.Tensor):
                    store[name] = fake(value)
