"""The peak-memory predictor against real steps, real bitsandbytes buffers, and published
GPU measurements.
"""

import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from torch.nn import functional as F

from helpers import memory
from helpers.memory import (
    _cli,
    _configs,
    _formulas,
    _kernels,
    _losses,
    _quantized,
    _step,
    _trace,
    cards,
)
from helpers.memory._allocator import CachingAllocator, rounded
from helpers.memory._trace import Ledger

MIB = 2**20
SMALL = dict(num_hidden_layers=3, num_attention_heads=4, vocab_size=128)
WIDTHS = dict(hidden_size=32, intermediate_size=64, **SMALL)
GROUPED = dict(num_key_value_heads=2, **WIDTHS)
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
TINY = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "opt": transformers.OPTConfig(
        hidden_size=32, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False,
        dropout=0.0, **SMALL
    ),
    "phi3": transformers.Phi3Config(**GROUPED, **ENDS),
    "qwen3": transformers.Qwen3Config(head_dim=8, **GROUPED),
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=128, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    ),
    "falcon": transformers.FalconConfig(hidden_size=32, **SMALL),
}  # fmt: skip
SHAPES = ("llama", "opt", "phi3", "gpt2")  # four kinds of layers; the rest have Llama's
LLAMA_8B = "meta-llama/Llama-3.1-8B"


def real_peak(config, run, steps=2):
    """Peak live bytes of a real model, real adapters, a real optimizer, written as anyone
    would write the loop.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=run.dtype, attn_implementation=run.attention
        )
        if run.lora:
            import peft

            targets = "all-linear" if config.model_type == "phi3" else None  # PEFT knows the others
            lora = peft.LoraConfig(r=run.lora, target_modules=targets)
            model = peft.get_peft_model(model, lora)
            if run.gradient_checkpointing:
                model.enable_input_require_grads()
        if run.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if run.mixed_precision:  # as the trainer does it: accelerate's own wrapping
        model = accelerated(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds = {"adamw_torch": {"foreach": True}, "adamw_torch_fused": {"fused": True}}
    optimizer = torch.optim.AdamW(trained, **kinds[run.optimizer])
    shape = (run.batch_size, run.sequence_length)
    ids, labels = torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
    mask = torch.ones(shape, dtype=torch.long)
    ledger = Ledger()
    for tensor in [*model.parameters(), *model.buffers(), ids, labels, mask]:
        ledger.register(tensor, "held")
    with ledger:
        for _ in range(steps):
            for _ in range(1 + run.gradient_accumulation):
                model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger.peak


def accelerated(model):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    # The state is one per process, and the trainers of other tests live in it: put it back.
    kept = [
        (state, dict(state))
        for state in (AcceleratorState._shared_state, PartialState._shared_state)
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    finally:
        for state, content in kept:
            state.clear()
            state.update(content)


def cpu_choices(**choices):
    defaults = dict(batch_size=2, sequence_length=24, loss="logits", kernels="cpu")
    return _step.Choices(**defaults | choices)


GRID = list(
    itertools.product([False, True], [None, 4], [torch.float32, torch.bfloat16], [False, True])
)


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", TINY)
def test_fake_equals_real_to_the_byte(kind, attention, part):
    """A third of eager's grid is fast, the rest slow; on the meta device, and on fakes too."""
    config = _configs.config_with(TINY[kind], 2)
    for number, (checkpointing, lora, dtype, accumulation) in enumerate(GRID):
        if number % 3 != part:
            continue
        run = cpu_choices(
            gradient_checkpointing=checkpointing, lora=lora, dtype=dtype,
            gradient_accumulation=accumulation, attention=attention,
        )  # fmt: skip
        real = real_peak(config, run)
        if attention == "eager":  # as every prediction for a card is made; SDPA is CUDA's there
            assert _step._trace(config, run, meta=True).peak()[0] == real, run
        if attention == "sdpa" or part:
            assert _step.trace(config, run).peak()[0] == real, run


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mixed_precision_equals_accelerates_to_the_byte(kind, checkpointing, lora):
    run = cpu_choices(
        dtype=torch.float32, mixed_precision=torch.bfloat16, lora=lora,
        gradient_checkpointing=checkpointing, attention="eager",
    )  # fmt: skip
    real = real_peak(TINY[kind], run)
    assert _step.trace(TINY[kind], run).peak()[0] == real
    plain = cpu_choices(
        dtype=torch.float32, lora=lora,
        gradient_checkpointing=checkpointing, attention="eager",
    )  # fmt: skip
    assert real != real_peak(TINY[kind], plain), "autocast did something"


OTHERS = [pytest.param(k, marks=pytest.mark.slow) for k in TINY if k not in SHAPES]


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*SHAPES, *OTHERS])
def test_an_extrapolated_short_trace_equals_the_full_one(kind, checkpointing):
    """Event by event: the same sizes in the same order, hence the same blocks."""
    layers = 7
    config = _configs.config_with(TINY[kind], layers)
    for lora, quantization in [(None, None), (4, "nf4"), (4, "int8")]:
        run = cpu_choices(
            gradient_checkpointing=checkpointing, lora=lora, quantization=quantization,
            kernels="cuda", gradient_accumulation=checkpointing,
        )  # fmt: skip
        full = _step.trace(config, run)
        short = _step.trace(_configs.config_with(config, _trace.SHORT), run).extrapolate(layers)
        assert sorted(e[1:] for e in short.events) == sorted(e[1:] for e in full.events)
        # int8's inputs die with the graph, in any order, when all is over
        if quantization != "int8":
            assert [e[1:] for e in short.events] == [e[1:] for e in full.events]
        # same blocks, hence the same reserved bytes
        assert short.with_allocator()[1] == full.with_allocator()[1]
        assert short.peak() == full.peak()


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["current", "book"])
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "opt-350m", "openai-community/gpt2"])
def test_a_real_models_prediction_equals_its_full_trace(name, stack):
    config = memory.load_config(name)
    for lora, quantization in [(None, None), (16, None), (16, "nf4"), (16, "int8")]:
        choices = dict(lora=lora, quantization=quantization, attention="eager", stack=stack)
        choices["gradient_checkpointing"] = "reentrant" if quantization == "int8" else lora is None
        found = memory.estimate_training(name, **choices)
        full, reserved = _step.trace(config, found.choices).with_allocator()
        assert len(full.marks) == len(found.trace.marks)
        assert (found.peak_bytes, found.parts, found.peak_instant) == full.peak()[:3]
        assert found.reserved_bytes == reserved


def test_foreach_optimizer_needs_one_more_copy_and_equals_the_real_one():
    for optimizer in ("adamw_torch", "adamw_torch_fused"):
        # a batch so small that the optimizer step is the peak
        run = cpu_choices(optimizer=optimizer, dtype=torch.float32, batch_size=1, sequence_length=2)
        predicted, _, instant, _ = _step.trace(TINY["llama"], run).peak()
        assert predicted == real_peak(TINY["llama"], run)
        assert instant == ("optimizer" if optimizer == "adamw_torch" else "backward")


def test_irregular_layers_are_traced_in_full():
    smol = transformers.SmolLM3Config(
        **GROUPED | {"num_hidden_layers": 5}, no_rope_layer_interval=4, **ENDS
    )
    assert _configs.irregular(smol, None)
    assert not _configs.irregular(TINY["llama"], None)
    run = cpu_choices(dtype=torch.float32)
    assert _step.trace(smol, run).peak()[0] == real_peak(smol, run)
    # two kinds of layers side by side: a short trace notices by itself
    gemma = transformers.Gemma2Config(
        **GROUPED | {"num_hidden_layers": 6}, head_dim=8, sliding_window=8, **ENDS
    )
    run = cpu_choices(attention="eager", dtype=torch.float32)
    assert _step.trace(_configs.config_with(gemma, _trace.SHORT), run).extrapolate(6) is None
    assert _step.trace(gemma, run).peak()[0] == real_peak(gemma, run)
    whole = memory.estimate_training(gemma, attention="eager", dtype="float32").trace
    assert sum(("forward", i) in (name for _, name in whole.marks) for i in range(9)) == 6


# ------------------------------------------------------------------ bitsandbytes
def real_buffers(kind, double, rows=96, columns=160):
    import bitsandbytes as bnb

    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(
            columns, rows, bias=False, has_fp16_weights=False, threshold=6.0
        )
        layer = layer.to("cpu")
        return [layer.weight.data, layer.weight.SCB]
    layer = bnb.nn.Linear4bit(
        columns,
        rows,
        bias=False,
        quant_type=kind,
        compress_statistics=double,
        compute_dtype=torch.float32,
    ).to("cpu")
    state = layer.weight.quant_state
    tensors = [layer.weight.data, state.absmax, state.code]
    if double:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


@pytest.mark.parametrize(
    ("kind", "double"),
    [("int8", False), ("fp4", False), ("fp4", True), ("nf4", False), ("nf4", True)],
)
def test_quantized_storage_equals_bitsandbytes(kind, double):
    real = sorted(t.untyped_storage().nbytes() for t in real_buffers(kind, double))
    assert sorted(_quantized.quantized_sizes(96, 160, kind, double).values()) == real
    surrogate = _quantized.FakeQuantizedLinear(
        torch.nn.Linear(160, 96, bias=False), kind, double, torch.float32, "current"
    )
    tensors = [*surrogate.parameters(), *surrogate.buffers()]
    assert sorted(t.untyped_storage().nbytes() for t in tensors) == real


def test_bits_per_weight_of_a_large_matrix():
    def bits(double):
        sizes = _quantized.quantized_sizes(4096, 4096, "nf4", double).values()
        return 8 * sum(sizes) / 4096**2

    assert bits(False) == pytest.approx(4.500030, abs=6e-7)
    assert bits(True) == pytest.approx(4.127474, abs=6e-7)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_a_quantized_layer_keeps_for_backward_equals_bitsandbytes(kind):
    """4-bit: the CPU path keeps what CUDA's keeps.

    (8-bit: bitsandbytes trains by another function on the CPU.)
    """
    import bitsandbytes as bnb

    def kept(layer):
        x = torch.randn(8, 160, requires_grad=True)
        ledger = Ledger()
        for tensor in [x, *layer.parameters(), *layer.buffers(), *real_state(layer)]:
            ledger.register(tensor, "held")
        with ledger:
            y = layer(x)
            after_forward = ledger.current
            grad = torch.ones_like(y)
            y.backward(grad)
            del y, grad
        return after_forward - ledger.events[0][1], ledger.current - after_forward

    def real_state(layer):
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            return []
        return [
            state.absmax,
            state.code,
            state.offset,
            state.state2.absmax,
            state.state2.code,
        ]

    real = bnb.nn.Linear4bit(
        160,
        96,
        bias=False,
        quant_type=kind,
        compress_statistics=True,
        compute_dtype=torch.float32,
    ).to("cpu")
    fake = _quantized.FakeQuantizedLinear(
        torch.nn.Linear(160, 96, bias=False), kind, True, torch.float32, "current"
    )
    assert kept(fake) == kept(real)


def kept_for_backward(checkpointing):
    """(What a real model of 8-bit layers holds between forward and backward, our prediction)."""
    import bitsandbytes as bnb
    import peft

    config, real = TINY["llama"], Ledger(inputs=True)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            size = module.in_features, module.out_features
            new = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=6.0)
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_8bit = True
    model = peft.get_peft_model(model.requires_grad_(False), peft.LoraConfig(r=4)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    if checkpointing:
        model.enable_input_require_grads()
        again = {"use_reentrant": checkpointing == "reentrant"}
        model.activation_checkpointing_enable(again)
    ids = torch.ones(2, 24, dtype=torch.long)
    with real:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    run = cpu_choices(
        quantization="int8", lora=4, dtype=torch.float32, attention="eager",
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    ours = _step.trace(config, run)
    marks = {name: at for at, name in ours.marks}
    forward = ours.events[marks["forward"] : marks["backward"]]
    assert loss.requires_grad
    return real.current - real.before, sum(size for _, size, _ in forward)


def test_checkpointing_frees_what_8bit_layers_keep_only_where_it_is_reentrant():
    """Their inputs hang on the function's ctx, of which non-reentrant checkpointing knows nothing.

    On the CPU bitsandbytes trains by another function than on CUDA, which keeps the same.
    """
    real, ours = zip(*(kept_for_backward(how) for how in (False, True, "reentrant")), strict=True)
    assert len({a - b for a, b in zip(real, ours, strict=True)}) == 1  # the same to the byte
    _, usual, reentrant = real
    # q, k, v share one input, as do gate and up; o and down have their own
    inputs = 2 * 24 * 4 * (32 + 32 + 32 + 64)
    assert usual - reentrant == 3 * inputs
    assert peak(quantization="int8", lora=4, gradient_checkpointing="reentrant") < peak(
        quantization="int8", lora=4
    )


def test_int8_on_cuda_keeps_its_input_and_the_book_version_a_quantized_copy_too():
    def kept(stack):
        layer = _quantized.FakeQuantizedLinear(
            torch.nn.Linear(160, 96, bias=False), "int8", False, torch.float16, stack
        )
        x = torch.zeros(64, 160, dtype=torch.float16, requires_grad=True)
        ledger = Ledger(unit=1)
        ledger.register(x, "held")
        with ledger:
            y = layer(x * 1)  # an input nobody else keeps
        return ledger.current - x.nbytes - y.nbytes

    assert kept("current") == 64 * 160 * 2
    assert kept("book") == 64 * 160 * 2 + 64 * 160 + 160 * 4


def test_8bit_optimizer_states_equal_bitsandbytes():
    import bitsandbytes as bnb

    shapes = [(4096,), (100, 100), (63, 65), (50,), (512, 512)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = bnb.optim.AdamW8bit(parameters)
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    state = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for entry in optimizer.state.values()
        for t in entry.values()
        if isinstance(t, torch.Tensor)
    }

    def states(name):
        found = [_quantized.optimizer_bytes(name, p.numel(), 4) for p in parameters]
        assert not any(temporary for _, temporary in found)
        return [size for sizes, _ in found for size in sizes]

    ours = states("adamw_8bit") + _quantized.CODE_BOOKS
    assert sorted(ours) == sorted(state.values())
    # only the large matrix leaves the card
    assert sum(ours) - sum(states("paged_adamw_8bit") + _quantized.CODE_BOOKS) == 2 * 512 * 512


# --------------------------------------------------------- published GPU measurements
def traced_calls(module, *inputs, calls=3):
    """Peak bytes of a benchmark's forward and backward calls, on CUDA's kernels."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    ledger = Ledger()
    with FakeTensorMode(), _kernels.CudaKernels():
        module = module()
        tensors = [make() for make in inputs]
        for tensor in [*tensors, *module.parameters()]:
            ledger.register(tensor, "held")
        upstream = None
        with ledger:
            for _ in range(calls):
                y = module(*tensors)
                if y.dim() and upstream is None:
                    upstream = torch.empty_like(tensors[0])
                y.backward(upstream, retain_graph=upstream is not None)
                del y
    return ledger, _trace.Trace(ledger.events, []).with_allocator()[0].peak()[0]


@pytest.mark.parametrize(
    ("words", "mib"), [(4096, 1280.126), (16384, 5120.126), (65536, 20480.125)]
)
def test_published_cross_entropy(words, mib):
    _, peak = traced_calls(
        torch.nn.CrossEntropyLoss,
        lambda: torch.empty(8 * 2048, words, requires_grad=True),
        lambda: torch.empty(8 * 2048, dtype=torch.long),
    )
    assert peak / MIB == pytest.approx(mib, rel=5e-4)


@pytest.mark.parametrize(("width", "mib"), [(1024, 80.0195), (4096, 320.0547), (16384, 1280.1953)])
def test_published_rms_norm(width, mib):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    _, peak = traced_calls(
        lambda: LlamaRMSNorm(width),  # the benchmark leaves its weight in float32
        lambda: torch.empty(2048, width, dtype=torch.bfloat16, requires_grad=True),
    )
    assert peak / MIB == pytest.approx(mib, rel=5e-4)


def test_published_layer_norm():
    _, peak = traced_calls(
        lambda: torch.nn.LayerNorm(1024),
        lambda: torch.empty(4096, 1024, requires_grad=True),
    )
    assert peak / MIB == pytest.approx(80.0625, rel=5e-4)


@pytest.mark.parametrize(("tokens", "mib"), [(4096, 6092.2823), (8192, 9162.3135)])
def test_published_head_and_cross_entropy(tokens, mib):
    width, words = 4096, 128256

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(width, words, bias=False, dtype=torch.bfloat16)
            # the benchmark builds the other provider's module beside it
            self.other = torch.nn.Linear(width, words, bias=False, dtype=torch.bfloat16)

        def forward(self, x, labels):
            return F.cross_entropy(self.head(x), labels)

    _, peak = traced_calls(
        Head,
        lambda: torch.empty(tokens, width, dtype=torch.bfloat16, requires_grad=True),
        lambda: torch.empty(tokens, dtype=torch.long),
    )
    peak += 2 * cards.cublas_workspace(cards.AMPERE)
    assert peak / MIB == pytest.approx(mib, rel=5e-4)


# (table, which of its cells are fast, median and worst error). Two kinds of cells of Table 5.5
# are not reproduced: rows 5 (what is printed equals the mixed precision of row 6), and rows 7 and
# 8, where four different runs have one and the same peak.
BOOK = [("5.2", 8, 0.0005, 0.0011), ("5.3", 10, 0.0005, 0.006), ("5.4", 7, 0.005, 0.013),
        ("5.5", 5, 0.003, 0.003)]  # fmt: skip


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("table", "every", "median", "worst"), BOOK, ids=[t for t, *_ in BOOK])
def test_the_books_tables(table, every, median, worst, whole):
    """All kinds of attention and of weights are among the fast ones."""
    cells = memory.book_cells(table)
    if table == "5.5":
        cells = [cell for cell in cells[:-4] if cell[1]["mixed_precision"] or cell[2] > 12.3e9]
    blank = {"optimizer": "", "gradient_accumulation": ""}  # most give the same peak
    same = {(str(choices | blank), peak): n for n, (_, choices, peak) in enumerate(cells)}
    picked = sorted(same.values()) if whole else range(0, len(cells), every)
    errors = [
        abs(memory.estimate_training(cells[n][0], **cells[n][1]).peak_bytes / cells[n][2] - 1)
        for n in picked
    ]
    assert statistics.median(errors) <= median
    assert max(errors) <= worst


def test_our_trace_beats_the_formulas_on_the_same_cells():
    table = memory.compare_formulas(memory.book_cells()[::8])
    assert len(table) >= 5
    ours = table.loc["traced"]
    assert (table.drop("traced")["median error"] > 5 * ours["median error"]).all()
    assert (table.drop("traced")["worst error"] > ours["worst error"]).all()


def test_accelerate_arithmetic_is_accelerates():
    from accelerate.commands.estimate import estimate_training_usage

    config = memory.load_config("facebook/opt-350m")
    for dtype in ("float32", "float16"):
        theirs = max(estimate_training_usage(4 * 331_196_416, dtype).values())
        rules = _formulas._rules_in_use(config, {"dtype": dtype})
        assert rules["accelerate estimate-memory"] == theirs


# ------------------------------------------------------------------ CUDA's choices
def test_trl_fused_head_keeps_what_trl_keeps(monkeypatch):
    """trl's own function on the CPU, its tile arithmetic (a Triton kernel on CUDA) left
    out, byte for byte.
    """
    from trl.kernels import chunked_logprob as trl_head

    monkeypatch.setattr(trl_head, "_forward_tile", lambda *a, **k: None)
    monkeypatch.setattr(trl_head, "_backward_tile", lambda *a, **k: None)
    monkeypatch.setattr(trl_head, "_addmm_fp32", lambda *a, **k: None)
    ours, theirs = _losses.FusedHead, trl_head.ChunkedLogProbFunction

    def kept_and_peaks(function, dtype, trained):
        hidden = torch.zeros(300, 64, dtype=dtype, requires_grad=True)
        weight = torch.zeros(1000, 64, dtype=dtype, requires_grad=trained)
        targets = torch.zeros(300, dtype=torch.long)
        ledger = Ledger(unit=1)
        for tensor in (hidden, weight, targets):
            ledger.register(tensor, "held")
        with ledger:
            out = function.apply(*_arguments(function, hidden, weight, targets, dtype))
            kept, forward = ledger.current, ledger.peak
            total = out[0].sum()
            del out
            total.backward()
        return kept, forward, ledger.peak

    kept_and_peaks(theirs, torch.float32, True)  # its backward imports, and tensors are made there
    for dtype, trained in itertools.product([torch.float32, torch.bfloat16], [True, False]):
        expected = kept_and_peaks(theirs, dtype, trained)
        assert kept_and_peaks(ours, dtype, trained) == expected, (dtype, trained)


def _arguments(function, hidden, weight, targets, dtype):
    if function is _losses.FusedHead:
        return hidden, weight, None, targets, dtype
    return (
        hidden,
        weight,
        None,
        targets,
        1.0,
        32768,
        None,
        1.0,
        ("log_probs", "entropy", "is_top1"),
    )


def test_dropout_keeps_one_byte_per_element_as_on_cuda():
    with _kernels.CudaKernels(), Ledger(unit=1) as ledger:
        x = torch.zeros(1000, requires_grad=True)
        y = F.dropout(x, 0.1, True)
    assert ledger.current == 4000 + 4000 + 1000
    assert y.grad_fn is not None


def test_attention_kernels_and_masks():
    def kept(mask, dtype=torch.bfloat16, heads=4):
        q, k, v = (
            torch.zeros(1, n, 128, 64, dtype=dtype, requires_grad=True) for n in (4, heads, heads)
        )
        with _kernels.CudaKernels(), Ledger(unit=1) as ledger:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != 4
            )
        assert out.shape == (1, 4, 128, 64)
        return ledger.current - out.nbytes

    rows = 4 * 128 * 4  # one float32 per row and head
    assert kept(None) == rows + 16  # flash: and a seed and an offset
    assert kept(None, heads=2) == rows + 16
    assert kept(None, torch.float32) == rows  # float32 has no flash kernel
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    assert kept(mask) == rows + 128 * 128 * 2  # the mask again, in the queries' dtype
    # fewer key heads without grouped attention (Falcon): the plain formula, scores and all
    q = torch.zeros(1, 4, 128, 64, requires_grad=True)
    k = torch.zeros(1, 1, 128, 64, requires_grad=True)
    with _kernels.CudaKernels(), Ledger(unit=1) as ledger:
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert out.shape == q.shape and ledger.current > 4 * 128 * 128 * 4
    # under autocast a card's SDPA gets 16 bits, hence flash
    with torch.autocast("cpu", torch.bfloat16), _kernels.CudaKernels(autocast=True):
        out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert out.dtype == torch.bfloat16 and "Flash" in type(out.grad_fn).__name__


@pytest.mark.parametrize("by_a_view", [False, True])
def test_gradients_are_added_up_as_without_a_ledger(by_a_view):
    """In place, unless the first is a view: a ledger alone would keep autograd from it."""
    from torch.profiler import ProfilerActivity, profile

    weight = torch.ones(30, 100, requires_grad=True)
    inputs = torch.ones(1, 100)

    def loss():
        if by_a_view:  # the gradient of a linear layer's weight is one
            out = F.linear(inputs, weight) + F.linear(inputs, weight)
        else:
            out = weight * 2 + weight * 3
        return out.sum()

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        loss().backward()
    names = [event.name for event in profiled.events()]
    weight.grad, first = None, loss()
    with Ledger(unit=1) as ledger:
        first.backward()
    gradient = weight.nbytes
    if by_a_view:
        assert "aten::add_" not in names and "aten::add" in names
        assert 3 * gradient <= ledger.peak < 3.1 * gradient
    else:
        assert "aten::add_" in names
        assert 2 * gradient <= ledger.peak < 2.1 * gradient


def test_a_sum_in_a_backward_of_ones_own_is_not_in_place():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            first = grad * 2
            both = first + grad
            del first
            return both

    x = torch.ones(1000, requires_grad=True)
    loss, grad = Own.apply(x), torch.ones(1000)
    with Ledger(unit=1) as ledger:
        torch.autograd.grad(loss, x, grad)
    assert ledger.peak == 2 * x.nbytes


def test_caching_allocator_rules():
    allocator = CachingAllocator()
    assert allocator.allocate("a", 1) == 512 and allocator.reserved == 2 * MIB
    assert allocator.allocate("b", 3 * MIB) == 3 * MIB and allocator.reserved == 22 * MIB
    # 17 MiB are left; asking for 16.5 would leave half a MiB, too little to split off
    assert allocator.allocate("c", 16 * MIB + MIB // 2) == 17 * MIB
    # its own segment of 12; the MiB left over is not split off either
    assert allocator.allocate("d", 11 * MIB) == 12 * MIB and allocator.reserved == 34 * MIB
    assert allocator.free("b") == 3 * MIB
    assert allocator.free("c") == 17 * MIB
    assert allocator.allocate("e", 9 * MIB) == 9 * MIB  # neighbors joined: no new segment
    assert allocator.reserved == 34 * MIB


# ------------------------------------------------------------------ laws
def peak(model=None, **choices):
    return memory.estimate_training(model or TINY["llama"], **choices).peak_bytes


def activations(**choices):
    run = _step.Choices(
        **dict(gradient_checkpointing=False, dtype=torch.float32, loss="logits", kernels="cpu")
        | choices
    )
    config = choices.pop("config", TINY["llama"])
    events = _step.trace(config, run)
    forward = dict((name, at) for at, name in events.marks)
    return sum(size for _, size, _ in events.events[forward["forward"] : forward["loss"]])


def test_activations_grow_with_tokens_and_scores_with_their_square():
    base = activations(batch_size=4, sequence_length=128)
    assert activations(batch_size=8, sequence_length=128) == pytest.approx(2 * base, rel=0.01)
    assert activations(batch_size=4, sequence_length=256) == pytest.approx(2 * base, rel=0.01)

    def extra(length):
        return activations(sequence_length=length, attention="eager") - activations(
            sequence_length=length
        )

    # eager keeps softmax and its copy for the product: with float32, two scores per layer
    # and head
    assert extra(512) == pytest.approx(4 * extra(256), rel=0.05)
    assert extra(512) >= 3 * 4 * 512 * 512 * 4


def test_layers_add_the_same_each_and_checkpointing_keeps_one_vector_per_token():
    def at(layers, **choices):
        config = _configs.config_with(TINY["llama"], layers)
        return memory.estimate_training(
            config, dtype="float32", sequence_length=256, lora=4, **choices
        ).instants["loss"]

    steps = [at(n + 1) - at(n) for n in (5, 6)]
    assert max(steps) - min(steps) <= 4096
    kept = (at(13) - at(5)) / 8
    whole = (at(13, gradient_checkpointing=False) - at(5, gradient_checkpointing=False)) / 8
    hidden = 256 * 32 * 4
    assert hidden <= kept < 3 * hidden + 40_000 < whole


def test_every_saving_saves_on_a_ladder():
    """The order of torchtune's ladder for Llama-3.2-3B, batch 2, sequence 4,096, and of
    quantization.
    """
    model, shared = "meta-llama/Llama-3.2-3B", dict(batch_size=2, sequence_length=4096)
    ladder = [
        peak(model, **shared, gradient_checkpointing=False, loss="logits"),
        peak(model, **shared, gradient_checkpointing=False),
        peak(model, **shared),
        peak(model, **shared, optimizer="adamw_8bit"),
        peak(model, **shared, optimizer="paged_adamw_8bit"),
        peak(model, **shared, lora=16),
    ]
    assert ladder == sorted(ladder, reverse=True) and len(set(ladder)) == 6
    foreach = peak(model, **shared, optimizer="adamw_torch")
    assert foreach > ladder[2]
    qlora = peak(model, **shared, lora=16, quantization="nf4")
    plain4 = peak(model, **shared, lora=16, quantization="nf4", double_quant=False)
    assert qlora < plain4 < peak(model, **shared, lora=16)


@pytest.mark.slow
def test_longest_context_grows_with_the_card():
    model = "SmolLM2-135M-Instruct"
    choices = dict(quantization="nf4", lora=32, attention="flash_attention_2", stack="book")
    found = [
        memory.find_largest(model, size, **choices).choices.sequence_length
        for size in ("2GiB", "3GiB")
    ]
    assert found[0] < found[1]
    longest = choices | {"sequence_length": found[0]}
    assert memory.estimate_training(model, **longest).fits("2GiB")
    longest["sequence_length"] += 64
    assert not memory.estimate_training(model, **longest).fits("2GiB")
    with pytest.raises(ValueError, match="not even sequence_length=64"):
        memory.find_largest(model, "300MB", **choices)


def test_mixed_precision_and_packing():
    full = memory.estimate_training(TINY["llama"], dtype="float32", sequence_length=64)
    mixed = memory.estimate_training(
        TINY["llama"], dtype="float32", mixed_precision="bf16", sequence_length=64
    )
    assert mixed.parts["weights"] == full.parts["weights"]
    assert mixed.peak_bytes != full.peak_bytes
    rows = memory.estimate_training(TINY["llama"], batch_size=4, sequence_length=64)
    packed = memory.estimate_training(TINY["llama"], batch_size=4, sequence_length=64, packing=True)
    flash = memory.estimate_training(
        TINY["llama"],
        batch_size=4,
        sequence_length=64,
        packing=True,
        attention="flash_attention_2",
    )
    assert packed.peak_bytes - rows.peak_bytes > 256 * 256  # SDPA needs the block-diagonal mask
    assert flash.peak_bytes < packed.peak_bytes


def test_accumulation_keeps_gradients_alive():
    once = memory.estimate_training(TINY["llama"], sequence_length=64)
    more = memory.estimate_training(TINY["llama"], sequence_length=64, gradient_accumulation=True)
    assert more.instants["forward"] - once.instants["forward"] >= once.parts["weights"] * 0.9


# ------------------------------------------------------------------ the result
def test_estimate_reports_itself():
    estimate = memory.estimate_training("opt-350m", lora=8, sequence_length=128)
    assert sum(estimate.parts.values()) == estimate.peak_bytes
    assert estimate.peak_instant in estimate.instants
    assert estimate.instants[estimate.peak_instant] == estimate.peak_bytes
    low, high = estimate.margin
    assert 0.2e9 < low < high
    assert estimate.reserved_bytes >= estimate.peak_bytes
    assert estimate.fits("T4") and estimate.fits(15 * 2**30) and not estimate.fits("1GB")
    assert "fits: RTX 3060, L4, " in str(estimate)
    assert estimate.verdict("100MB") == "no"
    text, page = str(estimate), estimate._repr_html_()
    assert "opt-350m" in text and "GiB" in text and "T4" in page and "weights" in page
    assert estimate.adapted == ("q_proj", "v_proj") and "adapters on q_proj, v_proj (PEFT's" in text
    assert set(estimate.parts) <= set(estimate.largest)
    assert all(estimate.largest[name] >= size for name, size in estimate.parts.items())
    figure = estimate.plot("T4")
    assert len(figure.axes) == 2 and figure.axes[0].get_ylabel()
    written = [text.get_text() for text in figure.axes[1].texts]
    assert written == ["forward", "loss", "backward", "optimizer", "T4\n14.6 GiB\n(above)"]
    drawn = max(
        area.get_datalim(figure.axes[1].transData).ymax for area in figure.axes[1].collections
    )
    assert (
        drawn * 2**30 == pytest.approx(estimate.peak_bytes) and drawn < figure.axes[1].get_ylim()[1]
    )
    assert "backward 0." in str(figure)


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [("T4", 14_913 * MIB), ("a100-40gb", 40_441 * MIB), ("4090", 24_081 * MIB),
     ("16 GiB", 2**34), ("16GB", 16 * 10**9), ("1.5g", 15 * 10**8), (123, 123)],
)  # fmt: skip
def test_sizes(size, bytes_):
    assert memory.parse_size(size) == bytes_


def test_catalog_has_the_published_number_of_parameters():
    for name, entry in _configs._entries().items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(memory.load_config(name))
        assert sum(p.numel() for p in model.parameters()) == entry["parameters"], name
        assert entry["source"]
    assert len(memory.catalog()) == len(_configs._entries()) > 25


def test_models_by_config_name_path_and_dict(tmp_path):
    config = memory.load_config("SmolLM2-135M-Instruct")
    config.save_pretrained(tmp_path)
    peaks = {
        peak(m, sequence_length=64)
        for m in (
            config,
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            tmp_path,
            str(tmp_path / "config.json"),
        )
    }
    assert len(peaks) == 1
    assert memory.load_config(config.to_dict()).hidden_size == 576


def test_lora_config_objects():
    from peft import LoraConfig

    by_rank = peak(lora=4)
    assert peak(lora=LoraConfig(r=4)) == by_rank
    assert peak(lora=LoraConfig(r=4, target_modules="all-linear")) > by_rank
    assert peak(lora=LoraConfig(r=4, use_dora=True)) > by_rank


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(quantization="nf4"), "needs lora"),
        (dict(quantization="int4", lora=4), "'nf4'"),
        (dict(optimizer="adam"), "adamw_torch"),
        (dict(dtype="int8"), "bfloat16"),
        (dict(attention="flash"), "flash_attention_2"),
        (dict(attention="flash_attention_2", dtype="float32"), "no float32 kernels"),
        (dict(mixed_precision="fp8"), "bf16"),
        (dict(stack="old"), "current"),
        (dict(stack="book", loss="fused"), "'logits', not 'fused'"),
        (dict(gradient_checkpointing="twice"), "'reentrant'"),
        (dict(batch_size=0), "batch_size"),
        (dict(sequence_length=-3), "sequence_length"),
        (dict(lora=-1), "lora, a rank, must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(choices, message):
    with pytest.raises(ValueError, match=message):
        memory.estimate_training(TINY["llama"], **choices)


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="lora"):
        peak(lora="16")
    with pytest.raises(TypeError, match="sequence_length must be a whole number"):
        peak(sequence_length=1.5)
    with pytest.raises(TypeError, match="model must be"):
        memory.estimate_training(3)
    with pytest.raises(ValueError, match="2048 positions"):
        peak("opt-350m", sequence_length=4096)
    with pytest.raises(ValueError, match=r"not in the catalog.*Llama"):
        memory.load_config("llama-3.1-9b")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.MixtralConfig(), "mixture of experts"),
        (transformers.MambaConfig(), "recurrent"),
        (transformers.BertConfig(), "encoder"),
        (transformers.ViTConfig(), "no causal language model"),
    ],
)
def test_refuses_what_it_cannot_model(config, message):
    with pytest.raises(ValueError, match=message):
        memory.estimate_training(config)


def test_a_model_that_breaks_while_traced_is_refused(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    def broken(self, x):
        return x * float(x.sum())  # needs a value, and fakes have none

    monkeypatch.setattr(LlamaMLP, "forward", broken)
    config = transformers.LlamaConfig(**GROUPED | {"vocab_size": 130})
    before = global_state()
    with pytest.raises(ValueError, match="broke while being traced"):
        memory.estimate_training(config)
    assert global_state() == before


def global_state():
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from transformers import masking_utils
    from transformers.models.opt import modeling_opt

    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.get_rng_state().sum().item(),
        masking_utils.find_packed_sequence_indices,
        modeling_opt.eager_attention_forward,
        torch.overrides._len_torch_function_stack()
        if hasattr(torch.overrides, "_len_torch_function_stack")
        else 0,
        len(_get_current_dispatch_mode_stack()),
        torch.is_autocast_enabled("cpu"),
        list(warnings.filters),
        transformers.utils.logging.get_verbosity(),
        _step.logging.root.manager.disable,
    )


def test_leaves_no_global_state_behind():
    before = global_state()
    memory.estimate_training(
        TINY["opt"], stack="book", lora=4, attention="eager", sequence_length=33
    )
    with torch.no_grad():
        memory.estimate_training(TINY["llama"], dtype="float16", sequence_length=33)
        assert not torch.is_grad_enabled()
    with contextlib.suppress(ValueError):
        memory.estimate_training(transformers.Gemma2Config(**GROUPED, head_dim=8, **ENDS))
    assert global_state() == before


def test_gemma2_with_sdpa_says_eager():
    config = transformers.Gemma2Config(**GROUPED, head_dim=8, **ENDS)
    with pytest.raises(ValueError, match="attention='eager'"):
        memory.estimate_training(config, attention="sdpa")


# ------------------------------------------------------------------ measure, napkin, plan
def test_measure_counts_live_bytes_on_the_cpu():
    held = torch.zeros(1000)
    with memory.measure("cpu") as measured:
        a = held + 1
        b = a * 2
        del a
        c = b[:10].clone()
    assert measured.peak_bytes == 4000 + 4000 + 4000  # held, a and b
    assert c.numel() == 10 and "peak 0.0 MB" in str(measured)
    with pytest.raises(RuntimeError), memory.measure("cpu") as measured:
        torch.zeros(500)
        raise RuntimeError
    assert measured.peak_bytes == 2000
    with memory.measure("cpu") as measured:
        torch.zeros(250).sum()
    assert measured.peak_bytes == 1004


def test_measure_and_estimate_agree_on_a_real_step():
    config = transformers.Qwen2Config(
        hidden_size=256,
        intermediate_size=512,
        num_key_value_heads=2,
        **SMALL | {"vocab_size": 2000},
    )
    choices = dict(dtype=torch.float32, sequence_length=64, batch_size=1)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.zeros(1, 64, dtype=torch.long)
    with memory.measure("cpu") as measured:
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    predicted = _step.trace(config, cpu_choices(**choices)).peak()[0]
    assert predicted == pytest.approx(
        measured.peak_bytes, rel=0.01
    )  # one rounds to 512, one does not


def test_napkin_is_the_chapters_arithmetic():
    parts = memory.napkin(
        "Llama-2-7b-hf", gradient_checkpointing=False, batch_size=2, sequence_length=100
    )
    assert parts["weights"] == 2 * (12 * 32 * 4096**2 + 32000 * 4096)
    assert parts["activations"] == 34 * 200 * 4096 * 32
    assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
    eager = memory.napkin(
        "Llama-2-7b-hf",
        gradient_checkpointing=False,
        batch_size=2,
        sequence_length=100,
        attention="eager",
    )
    assert eager["activations"] - parts["activations"] == 5 * 32 * 100**2 * 2 * 32
    assert any("logits" in part for part in memory.NAPKIN_LEAVES_OUT)


def plan(text):
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    return _cli.main(parser.parse_args(text.split()))


def test_plan_on_the_command_line(capsys, tmp_path):
    assert (
        plan("--model SmolLM2-135M-Instruct --quantization nf4 --rank 4 --sequence-length 64") == 0
    )
    assert "peak" in capsys.readouterr().out
    TINY["llama"].save_pretrained(tmp_path)
    assert plan(f"--model {tmp_path} --rank 8 --fit 600MB --vary batch_size") == 0
    assert "largest batch_size" in capsys.readouterr().out
    model = "--model SmolLM2-135M-Instruct --rank 8 --sequence-length 64"
    assert plan(f"{model} --gpu T4 --padded") == 0
    assert capsys.readouterr().out.endswith("fits: T4\n")
    assert plan(f"{model} --gpu T4 --dtype bfloat16") == 1
    assert "'float16' works" in capsys.readouterr().err
    assert plan(f"{model} --all-linear --reentrant") == 0
    assert "adapters on down_proj, gate_proj," in capsys.readouterr().out
    assert plan("--list") == 0 and "Phi-3-mini" in capsys.readouterr().out
    assert plan("--model SmolLM2-135M-Instruct --quantization nf4") == 1
    assert "needs lora" in capsys.readouterr().err
    assert plan("--rank 4") == 2
    capsys.readouterr()
    assert plan("--model SmolLM2-135M-Instruct --all-linear") == 2
    assert "needs --rank" in capsys.readouterr().err


def test_a_second_prediction_reuses_the_first(monkeypatch):
    memory.estimate_training(TINY["qwen3"], sequence_length=40)
    monkeypatch.setattr(_step, "trace", lambda *a, **k: pytest.fail("traced again"))
    memory.estimate_training(TINY["qwen3"], sequence_length=40)


SPEED = """
import resource, sys, time
from helpers import memory
from transformers.models.llama import modeling_llama
times = []
for length in (1024, 1088):
    start = time.perf_counter()
    choices = dict(quantization="nf4", lora=16, sequence_length=length)
    memory.estimate_training(sys.argv[1], **choices)
    times.append(time.perf_counter() - start)
print(*times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("model", "limit"), [(LLAMA_8B, 20), ("SmolLM2-135M-Instruct", 3)])
def test_prediction_is_quick_and_light(model, limit):
    out = subprocess.run(
        [sys.executable, "-c", SPEED, model], capture_output=True, text=True, check=True
    ).stdout
    first, second, gib = map(float, out.split()[-3:])
    print(f"{model}: {first:.1f} s, again {second:.1f} s (aim: {limit} s), {gib:.1f} GiB")
    # Generous on purpose, shared machines are noisy; what is printed is the measurement.
    assert first < 3 * limit and second < first and gib < 4


def test_rounding():
    assert [rounded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
