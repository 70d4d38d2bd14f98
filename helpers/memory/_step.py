"""From a run's choices to the log of its training step (Chapter 5).

Build the model on fakes (tensors with shapes and dtypes, without data), run one step, count.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from unittest import mock

import torch

from helpers.memory import _kernels, _losses, _quantized
from helpers.memory._allocator import rounded
from helpers.memory._configs import (
    CannotPredictError,
    config_with,
    irregular,
    positions,
    told,
)
from helpers.memory._trace import SHORT, Ledger, Trace
from helpers.memory.cards import AMPERE, Capability, cublas_workspace, half_dtype


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
    gradient_checkpointing: bool = True
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


# ------------------------------------------------------------------ the model
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
        again = _kernels_of(run)
        switch = getattr(model, "activation_checkpointing_enable", None)
        switch = switch or model.gradient_checkpointing_enable  # its older name
        contexts = lambda: (contextlib.nullcontext(), again())  # noqa: E731
        switch({"use_reentrant": False, "context_fn": contexts})
        if run.lora is not None:
            model.enable_input_require_grads()
    return model.train()


def _kernels_of(run: Choices) -> Callable[[], contextlib.AbstractContextManager]:
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
def _flash_attention_2(model_class: Any) -> Iterator[None]:
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


def _to_fakes(model: torch.nn.Module) -> None:
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


# ------------------------------------------------------------------ the step
def step_log(config: Any, run: Choices) -> tuple[Trace, int]:
    """(Trace with the sizes of a card's blocks, bytes its allocator reserves) of one step."""
    layers, log = config.num_hidden_layers, None
    if layers > SHORT and not irregular(config, run.lora):
        log = trace(config_with(config, SHORT), run).extrapolate(layers)
    return (log or trace(config, run)).with_allocator()


def trace(config: Any, run: Choices) -> Trace:
    """Run one step of all the config's layers, on tensors without data.

    On the meta device, three times as quick, where that can be: autocast knows no such device,
    a CPU's kernels are not its own, and some models ask for a value. Else on fakes of the CPU.
    """
    if run.kernels == "cuda" and run.mixed_precision is None:
        try:
            return _trace(config, run, meta=True)
        except CannotPredictError:
            raise
        except Exception as error:  # fakes get further, or tell the same
            logging.getLogger(__name__).debug("not on the meta device: %s", error)
    return _trace(config, run, meta=False)


def _trace(config: Any, run: Choices, meta: bool) -> Trace:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, masking_utils

    scratch = functools.partial(_kernels.scratch, capability=run.capability)
    ledger = Ledger(scratch=scratch if run.kernels == "cuda" else None)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(_quiet())
        enter(torch.random.fork_rng(devices=[]))
        enter(torch.enable_grad())
        if run.attention == "flash_attention_2":
            enter(_flash_attention_2(AutoModelForCausalLM._model_mapping[type(config)]))
        with torch.device("meta"):
            model = build(config, run)
        if not run.packing or run.attention == "flash_attention_2":
            find = "find_packed_sequence_indices"
            enter(mock.patch.object(masking_utils, find, lambda *_, **__: None))
        if run.book:
            enter(_losses.book(model))
        if meta:
            enter(torch.device("meta"))
        else:
            enter(FakeTensorMode())
            _to_fakes(model)
        batch = _inputs(run)
        enter(_kernels_of(run)())
        enter(ledger)
        _run(model, batch, run, ledger)
    end = ledger.marks[-1][0]  # what dies with the model is no part of the step
    return Trace(ledger.events[:end], ledger.marks)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no log lines about a model that exists only for a moment."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _inputs(run: Choices) -> dict[str, torch.Tensor]:
    # trl's packing is padding-free: one long row
    flat = run.packing and not run.book
    rows, length = run.batch_size, run.sequence_length
    shape = (1, rows * length) if flat else (rows, length)
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "labels")}
    # transformers drops a mask without padding; its bytes are in the batch all the same
    last = "position_ids" if flat else "attention_mask"
    return batch | {last: torch.ones(shape, dtype=torch.long)}


def _run(model: Any, batch: dict[str, torch.Tensor], run: Choices, ledger: Ledger) -> None:
    """One step. Unless it is the book's, optimizer states and accumulated gradients exist."""
    layers = _decoder_layers(model)
    home = {id(t): i for i, x in enumerate(layers) for t in (*x.parameters(), *x.buffers())}

    def by_layer(phase: str, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The tensors, with a mark in the log where another layer's begin."""
        for layer, group in groupby(tensors, key=lambda tensor: home.get(id(tensor))):
            ledger.mark(phase if layer is None else (phase, layer))
            yield from group

    ledger.phase("weights", "activations")
    kept = ("lora_", "modules_to_save")
    named = {id(p): any(k in n for k in kept) for n, p in model.named_parameters()}
    for tensors in (model.parameters(), model.buffers()):
        for tensor in by_layer("weights", tensors):
            ledger.register(tensor, "adapters" if named.get(id(tensor)) else "weights")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not run.book:
        _optimizer_states(run, ledger, trained, by_layer("weights", trained))
        if run.gradient_accumulation:
            ledger.category = "gradients"
            for parameter in by_layer("weights", trained):
                parameter.grad = torch.zeros_like(parameter)
    ledger.mark("weights")
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.register(p.grad, "gradients"))
    for tensor in batch.values():
        ledger.register(tensor, "activations")
    _watch_layers(layers, ledger)
    if run.loss != "fused":
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda *_: ledger.phase("loss", "logits"))

    ledger.phase("forward", "activations")
    # cuBLAS keeps one workspace per (handle, stream): the forward thread's and autograd's, which
    # the book's first step makes at its first product
    workspaces = 2 * [cublas_workspace(run.capability)] if run.kernels == "cuda" else []
    for size in workspaces[run.book :]:
        ledger.allocate(size, "workspace")
    loss, alive = _loss(model, batch, run, ledger)
    if not run.book:
        alive = None  # the trainer's compute_loss has returned; the book's loop holds on
    ledger.phase("backward", "temporaries")
    for size in workspaces[: run.book]:
        ledger.allocate(size, "workspace")
    loss.backward()
    if not run.book:
        del loss
    if not run.book or not run.gradient_accumulation:
        ledger.phase("optimizer", "temporaries")
        if run.book:
            _optimizer_states(run, ledger, trained, by_layer("optimizer", trained))
        for parameter in by_layer("optimizer", trained):
            if size := _state_of(run, parameter)[1]:
                ledger.allocate(rounded(size), "temporaries")
    ledger.mark("end")
    del alive


def _decoder_layers(model: Any) -> torch.nn.ModuleList:
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise CannotPredictError(
        f"model: no list of its {count} layers found in {type(model).__name__}"
    )


def _state_of(run: Choices, parameter: torch.Tensor) -> tuple[list[int], int]:
    return _quantized.optimizer_bytes(run.optimizer, parameter.numel(), parameter.element_size())


def _optimizer_states(run: Choices, ledger: Ledger, trained: list, marked: Iterable) -> None:
    books = run.optimizer not in ("sgd", "adamw_torch", "adamw_torch_fused")
    if books and any(p.numel() >= 4096 for p in trained):
        for size in _quantized.CODE_BOOKS:
            ledger.allocate(rounded(size), "optimizer")
    for parameter in marked:
        # on a CPU run the step counters of the loop over lists are CPU tensors too
        counter = [4] * (run.kernels == "cpu" and run.optimizer == "adamw_torch")
        for size in _state_of(run, parameter)[0] + counter:
            ledger.allocate(rounded(size), "optimizer")


def _watch_layers(layers: torch.nn.ModuleList, ledger: Ledger) -> None:
    """Mark where a layer's forward and backward begin, outside of its checkpointed part."""

    def after(index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: ledger.mark(("backward", index)))

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=index: ledger.mark(("forward", i)))
        layer.register_forward_hook(lambda *args, i=index: after(i, args[2]))


def _loss(model: Any, batch: dict, run: Choices, ledger: Ledger) -> tuple[Any, Any]:
    """The stack's forward pass and loss; whatever else is returned stays alive for the step."""
    dropped = {"attention_mask"} if not run.padded else set()
    if run.attention == "flash_attention_2":
        dropped.add("position_ids")  # variable-length kernels need no mask
    batch = {name: tensor for name, tensor in batch.items() if name not in dropped}
    mixed = run.mixed_precision
    with torch.autocast("cpu", dtype=mixed) if mixed else contextlib.nullcontext():
        if run.loss == "fused":
            on_head = functools.partial(ledger.phase, "loss", "logits")
            return _losses.fused_loss(model, batch, mixed, on_head)
        keep_cache = run.book and not run.gradient_checkpointing
        output = model(**batch, use_cache=keep_cache)
    if mixed:  # accelerate's convert_outputs_to_fp32
        output["logits"] = output["logits"].float()
    return output["loss"], output
