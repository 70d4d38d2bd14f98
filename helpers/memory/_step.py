"""From a recipe to the log of its training step.

Build the model on fakes, run one step, count (Chapter 5).
"""

import contextlib
import copy
import functools
import logging
import types
import warnings
from dataclasses import dataclass

import torch

from helpers.memory import _kernels as profiles
from helpers.memory._trace import Ledger, Trace, patched, rounded
from helpers.memory.cards import AMPERE, cublas_workspace, half_dtype

SHORT = 4  # layers in a short trace: first, two to compare, last


@dataclass(frozen=True)
class Recipe:
    """The choices of a run, checked; see `memory.estimate_training` for their meaning."""

    quantization: str | None = None
    double_quantization: bool = True
    dtype: torch.dtype = torch.bfloat16
    lora: object = None
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
    prepare_kbit: bool = False
    capability: tuple = AMPERE  # of the card
    loss: str = "fused"  # 'fused': trl's head; 'logits': the model's own loss over all logits
    kernels: str = (
        "cuda"  # 'cpu': what this machine's kernels keep, for comparing with a real CPU run
    )


def refuse(config):
    """Raise ValueError for what this module cannot model honestly.

    Better no number than a wrong one.
    """
    from transformers import AutoModelForCausalLM

    kind = getattr(config, "model_type", type(config).__name__)
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder; only decoder-only language models are traced"
    elif type(config) not in AutoModelForCausalLM._model_mapping:
        reason = "transformers has no causal language model for it"
    elif any(
        (getattr(config, name, None) or 0) > 1
        for name in (
            "num_local_experts",
            "num_experts",
            "n_routed_experts",
            "moe_num_experts",
        )
    ):
        reason = "it is a mixture of experts, whose buffers depend on where tokens are routed"
    elif (
        hasattr(config, "state_size")
        or hasattr(config, "mamba_d_state")
        or any(
            name in ("linear_attention", "mamba", "conv")
            for name in getattr(config, "layer_types", None) or ()
        )
    ):
        reason = "its recurrent layers run CUDA kernels that have no CPU twin to trace"
    elif kind in ("bert", "roberta", "electra") and not getattr(config, "is_decoder", False):
        reason = "it is an encoder"
    if reason:
        raise ValueError(
            f"model: cannot predict {kind!r}: {reason}. Dense causal models work: Llama, "
            "Mistral, Phi, Qwen, Gemma, "
            "OPT, Falcon, GPT-2, SmolLM and their kin."
        )


@contextlib.contextmanager
def _quiet():
    """No warnings and no log lines about a model that exists only for a moment."""
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "bitsandbytes")]
    disabled = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
            for logger, was in zip(loggers, disabled, strict=True):
                logger.disabled = was


def build(config, recipe):
    """The model of `config` as the recipe trains it (quantized stand-ins, adapters,
    checkpointing), on torch's current device.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config._attn_implementation = "eager" if recipe.attention == "eager" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=recipe.dtype)
    if hasattr(config, "layerdrop"):
        config.layerdrop = 0.0
        for module in model.modules():
            if hasattr(module, "layerdrop"):
                module.layerdrop = 0.0  # skipping layers at random has no peak to predict
    if recipe.quantization:
        profiles.quantize_linears(
            model,
            recipe.quantization,
            recipe.double_quantization,
            recipe.dtype,
            recipe.stack,
        )
        model.requires_grad_(False)
        if recipe.prepare_kbit:
            for parameter in model.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
    if recipe.lora is not None:
        model = _with_adapters(model, recipe)
    if recipe.gradient_checkpointing:
        # backward() runs without function modes, so the recomputation brings its own
        again = kernels_of(recipe)
        options = {
            "use_reentrant": False,
            "context_fn": lambda: (contextlib.nullcontext(), again()),
        }
        switch = getattr(model, "activation_checkpointing_enable", None)
        (switch or model.gradient_checkpointing_enable)(options)  # by its older name
        if recipe.lora is not None:
            model.enable_input_require_grads()
    return model.train()


def kernels_of(recipe):
    """A function that makes the context in which the recipe's operators run."""
    if recipe.kernels == "cpu":
        return contextlib.nullcontext
    flash_dtype = recipe.dtype if recipe.attention == "flash_attention_2" else None
    autocast = recipe.mixed_precision is not None
    return lambda: profiles.CudaKernels(autocast, flash_dtype, recipe.capability)


def _with_adapters(model, recipe):
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    lora = copy.deepcopy(recipe.lora)
    if isinstance(lora, int):
        known = model.config.model_type in KNOWN
        # The book's adapters drop 5 % of their inputs, and a dropout mask is a byte per
        # number.
        dropout = 0.05 if recipe.stack == "book" else 0.0
        targets = None if known else "all-linear"
        lora = LoraConfig(r=lora, lora_dropout=dropout, target_modules=targets)
    model = get_peft_model(model, lora)
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, profiles.QuantizedLinear) and not getattr(module, "lora_variant", {}):
            module.forward = types.MethodType(profiles.quantized_lora_forward, module)
    # trl 1.16 makes them bfloat16. Where a card has none, training.LeanSFTTrainer leaves
    # them float32, the only type that float16's gradient scaler takes.
    narrow = recipe.stack == "current" and half_dtype(recipe.capability) == "bfloat16"
    if recipe.quantization and narrow:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _to_fakes(model):
    """Replace every meta tensor by a fake one on the CPU.

    Tensors that were shared stay shared. Call under a FakeTensorMode.
    """
    memo = {}

    def fake(tensor):
        if id(tensor) not in memo:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = (new, tensor)
        return memo[id(tensor)][0]

    for module in model.modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            for name, value in list(store.items()):
                if isinstance(value, torch.Tensor):
                    store[name] = fake(value)
    return model


def decoder_layers(model, count):
    """The ModuleList of the decoder's layers."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"no list of {count} layers found in {type(model).__name__}")


def _watch_layers(layers, ledger):
    """Mark where each layer's forward and backward begin.

    Hooks stay outside the checkpointed part.
    """

    def hook(index):
        def before(module, inputs):
            ledger.mark(("forward", index))

        def after(module, inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: ledger.mark(("backward", index)))

        return before, after

    for index, layer in enumerate(layers):
        before, after = hook(index)
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)


def _repeated(tensors, template, extra):
    """(tensor, whether real) in order, with the run of `template` tensors repeated `extra`
    times behind itself.
    """
    out, run = [], []
    for tensor in [*tensors, None]:
        if run and id(tensor) not in template:
            out += [(t, False) for _ in range(extra) for t in run]
            run = []
        if tensor is not None:
            out.append((tensor, True))
            if id(tensor) in template:
                run.append(tensor)
    return out


def _inputs(model, recipe):
    rows, length = recipe.batch_size, recipe.sequence_length
    flat = (
        recipe.packing and recipe.stack == "current"
    )  # trl's packing is padding-free: one long row
    shape = (1, rows * length) if flat else (rows, length)
    ids = torch.zeros(shape, dtype=torch.long)
    batch = {"input_ids": ids, "labels": torch.zeros(shape, dtype=torch.long)}
    if flat:
        batch["position_ids"] = torch.zeros(shape, dtype=torch.long)
    else:
        # transformers drops a mask without padding; its bytes are in the batch all the same
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    return batch


def _loss(model, batch, recipe, ledger):
    """Forward pass and loss as the recipe's stack computes it.

    Whatever else is returned stays alive for the step.
    """
    if not recipe.padded:
        batch = {k: v for k, v in batch.items() if k != "attention_mask"}
    if recipe.attention == "flash_attention_2":
        batch.pop("position_ids", None)  # variable-length kernels need no mask
    autocast = contextlib.nullcontext()
    if recipe.mixed_precision:
        autocast = torch.autocast("cpu", dtype=recipe.mixed_precision)
    with autocast:
        if recipe.loss == "fused":
            return profiles.fused_loss(
                model, batch, recipe.mixed_precision, lambda: ledger.phase("loss", "logits")
            )
        keep_cache = recipe.stack == "book" and not recipe.gradient_checkpointing
        output = model(**batch, use_cache=keep_cache)
    if recipe.mixed_precision:  # accelerate's convert_outputs_to_fp32
        output["logits"] = output["logits"].float()
    return output["loss"], output


def trace(config, recipe, layers=None):
    """Run one step of `recipe` on fakes and return its Trace (Chapter 5).

    layers: trace only this many decoder layers and stretch the log to the config's own
    number; None traces all. A short trace whose middle layers differ is thrown away for a
    full one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import masking_utils

    total = config.num_hidden_layers
    short = layers is not None and layers < total
    full, config = config, config_with(config, layers) if short else config
    scratch = functools.partial(profiles.scratch, capability=recipe.capability)
    ledger = Ledger(scratch=scratch if recipe.kernels == "cuda" else None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.enable_grad())
        with torch.device("meta"):
            model = build(config, recipe)
        if not recipe.packing or recipe.attention == "flash_attention_2":
            stack.enter_context(
                patched(masking_utils, "find_packed_sequence_indices", lambda *a, **k: None)
            )
        if recipe.stack == "book":
            stack.enter_context(_book(model))
        stack.enter_context(FakeTensorMode())
        _to_fakes(model)
        batch = _inputs(model, recipe)
        stack.enter_context(kernels_of(recipe)())
        stack.enter_context(ledger)
        _run(model, batch, recipe, ledger, layers if short else None, total)
    end = ledger.marks[-1][0]  # what dies with the model is no part of the step
    result = Trace(ledger.events[:end], ledger.marks)
    if short:
        return result.stretch(layers, total) or trace(full, recipe)
    return result


def config_with(config, layers):
    """A copy of a config with another number of decoder layers.

    Lists of one entry per layer are cut or repeated.
    """
    config, old = copy.deepcopy(config), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == old:
            setattr(config, name, [value[i % old] for i in range(layers)])
    config.num_hidden_layers = layers
    return config


@contextlib.contextmanager
def _book(model):
    """What transformers 4.46 did otherwise: the loss, and OPT's eager attention."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.loss_function = profiles.book_loss(base.config.model_type)
    with contextlib.ExitStack() as stack:
        if base.config.model_type == "opt":
            from transformers.models.opt import modeling_opt

            stack.enter_context(
                patched(modeling_opt, "eager_attention_forward", profiles.book_opt_attention)
            )
        yield


def _run(model, batch, recipe, ledger, layers, total):
    """One step. Steady state for `current`.

    Optimizer states (and accumulated gradients) exist when it begins.
    """
    count = layers or total
    blocks, extra = decoder_layers(model, count), total - count
    third = [*blocks[2].parameters(), *blocks[2].buffers()] if extra else []
    template = {id(t) for t in third}
    adapters = {
        id(p) for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n
    }
    ledger.phase("weights", "activations")
    for tensors in (model.parameters(), model.buffers()):
        for tensor, real in _repeated(tensors, template, extra):
            category = "adapters" if id(tensor) in adapters else "weights"
            if real:
                ledger.adopt(tensor, category)
            else:
                ledger.enter(rounded(tensor.untyped_storage().nbytes()), category)
    trained = [p for p in model.parameters() if p.requires_grad]
    all_trained = _repeated(trained, template, extra)
    sizes = [(p.numel(), p.element_size()) for p, _ in all_trained]
    states, temporaries = profiles.optimizer_bytes(recipe.optimizer, sizes)
    if recipe.kernels == "cpu" and recipe.optimizer == "adamw_torch":
        states += [4] * len(sizes)  # on a CPU run its step counters are CPU tensors too
    steady = recipe.stack == "current"
    if steady:
        for size in states:
            ledger.enter(rounded(size), "optimizer")
    if steady and recipe.gradient_accumulation:
        ledger.category = "gradients"
        for parameter, real in all_trained:
            if real:
                parameter.grad = torch.zeros_like(parameter)
            else:
                ledger.enter(rounded(parameter.untyped_storage().nbytes()), "gradients")
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.adopt(p.grad, "gradients"))
    for tensor in batch.values():
        ledger.adopt(tensor, "activations")
    _watch_layers(blocks, ledger)
    if recipe.loss != "fused":
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda *_: ledger.phase("loss", "logits"))

    ledger.phase("forward", "activations")
    on_card = recipe.kernels == "cuda"
    # cuBLAS keeps one workspace per (handle, stream): the forward thread's and autograd's
    workspace = cublas_workspace(recipe.capability)
    for _ in range(on_card + (on_card and steady)):
        ledger.enter(workspace, "workspace")
    loss, alive = _loss(model, batch, recipe, ledger)
    if steady:
        alive = None  # the trainer's compute_loss has returned; the book's loop holds on
    ledger.phase("backward", "temporaries")
    if on_card and not steady:  # the autograd thread's, made at its first product
        ledger.enter(workspace, "workspace")
    loss.backward()
    if steady:
        del loss
    if steady or not recipe.gradient_accumulation:
        ledger.phase("optimizer", "temporaries")
        if not steady:
            for size in states:
                ledger.enter(rounded(size), "optimizer")
        for size in temporaries:
            ledger.enter(rounded(size), "temporaries")
    ledger.mark("end")
    del alive


def step_log(config, recipe, layers=None):
    """(Trace with the card's block sizes, bytes its allocator reserves) of one step.

    See `trace` for `layers`.
    """
    return trace(config, recipe, layers).on_card()
