"""The log of a training step: run the model once on tensors without data, and count (Chapter 5)."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any
from unittest import mock

import torch

from helpers.memory import _kernels, _losses, _model, _quantized
from helpers.memory._allocator import rounded
from helpers.memory._configs import CannotPredictError, config_with, irregular
from helpers.memory._model import Choices
from helpers.memory._trace import SHORT, Ledger, Trace
from helpers.memory.cards import cublas_workspace


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
    asks = run.packing and run.attention != "flash_attention_2"  # where the rows of a pack begin
    if run.kernels == "cuda" and run.mixed_precision is None and not asks:
        try:
            return _trace(config, run, meta=True)
        except RuntimeError as error:  # a value was asked for: fakes get further, or tell the same
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
            enter(_model.with_flash_attention(AutoModelForCausalLM._model_mapping[type(config)]))
        with torch.device("meta"):
            model = _model.build(config, run)
        if not run.packing or run.attention == "flash_attention_2":
            find = "find_packed_sequence_indices"
            enter(mock.patch.object(masking_utils, find, lambda *_, **__: None))
        if run.book:
            enter(_losses.book(model))
        if meta:
            enter(torch.device("meta"))
        else:
            enter(FakeTensorMode())
            _model.to_fakes(model)
        batch = _inputs(run)
        enter(_model.kernels_of(run)())
        enter(ledger)
        _run(model, batch, run, ledger)
    end = ledger.marks[-1][0]  # what dies with the model is no part of the step
    return Trace(ledger.events[:end], ledger.marks, _model.adapted(model))


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
