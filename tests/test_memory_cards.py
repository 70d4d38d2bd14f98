"""A card is an argument of the predictor: names, dtypes, kernels, workspaces, padding."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from helpers import memory
from helpers.memory import _kernels, _step, cards, estimate
from helpers.memory._trace import Ledger

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import ladder

MIB = 2**20
GROUPED = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, vocab_size=128,
)  # fmt: skip
LLAMA_8B = dict(model="Llama-3.1-8B", quantization="nf4", lora=16)
WORKSPACES = 2 * (32 * MIB - 8_519_680)

DEVICE_NAMES = {
    "Tesla T4": "T4",
    "NVIDIA GeForce RTX 3060": "RTX 3060",
    "NVIDIA L4": "L4",
    "NVIDIA A10G": "A10G",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA A40": "A40",
    "NVIDIA L40S": "L40S",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB",
    "NVIDIA H100 80GB HBM3": "H100 80GB",
    "NVIDIA H100 PCIe": "H100 80GB",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
}
LOOSE = {
    "t4": "T4", "H100": "H100 80GB", "h100-80gb": "H100 80GB", "rtx4090": "RTX 4090",
    "4090": "RTX 4090", "L4": "L4", "a100-40gb": "A100 40GB", "A100 80 GiB": "A100 80GB",
    "6000 ada": "RTX 6000 Ada",
}  # fmt: skip


# ------------------------------------------------------------------ names and sizes
def test_every_card_parses_by_the_name_torch_gives_it():
    assert set(DEVICE_NAMES.values()) == set(memory.GPUS)
    for written, name in (DEVICE_NAMES | LOOSE | {n: n for n in memory.GPUS}).items():
        assert cards.find_card(written).name == name, written
        assert memory.parse_size(written) == memory.GPUS[name]


@pytest.mark.parametrize(
    "other",
    ["NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 3060 Ti", "L40",
     "Quadro RTX 6000", "RTX 6000", "A100 64GB", "A10"],
)  # fmt: skip
def test_another_card_is_not_taken_for_one_of_the_table(other):
    with pytest.raises(ValueError, match=r"neither a size.*of_this_machine"):
        memory.parse_size(other)
    with pytest.raises(ValueError, match="neither a size"):
        memory.estimate_training(GROUPED, gpu=other)


@pytest.mark.parametrize("name", ["A100", "NVIDIA A100-SXM4"])
def test_a_name_that_fits_two_cards_names_both(name):
    with pytest.raises(ValueError, match="A100 40GB or A100 80GB"):
        memory.parse_size(name)


def test_memory_is_what_torch_reports_not_what_the_box_says():
    printed = {"T4": 16, "L4": 24, "RTX 4090": 24, "A100 40GB": 40, "H100 80GB": 80}
    for name, gib in printed.items():
        assert 0.9 < memory.GPUS[name] / (gib * 2**30) < 1, name
    assert 14.5 < memory.GPUS["T4"] / 2**30 < 14.8
    assert 79.0 < memory.GPUS["H100 80GB"] / 2**30 < 79.3


def test_the_card_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="gpu='T4'"):
        cards.of_this_machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = types.SimpleNamespace(name="NVIDIA Z1", total_memory=7, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    card = cards.of_this_machine()
    monkeypatch.undo()  # libraries that are imported from here on believe it
    assert card == cards.Card("NVIDIA Z1", 7, (9, 0))
    assert memory.parse_size(card) == 7
    estimate = memory.estimate_training(GROUPED, lora=4, gpu=card)
    assert estimate.parts["workspace"] == 64 * MIB and estimate.verdict(card) == "no"
    assert "no: NVIDIA Z1" in str(estimate)


# ------------------------------------------------------------------ what a card decides
def test_sixteen_bits_and_workspaces_follow_the_capability():
    halves = {c.name: cards.half_dtype(c.capability) for c in every_card()}
    assert [name for name, dtype in halves.items() if dtype == "float16"] == ["T4"]
    wide = [c.name for c in every_card() if cards.cublas_workspace(c.capability) > 9e6]
    assert wide == ["RTX 5090", "H100 80GB", "H200", "B200"]


def every_card():
    return cards.CARDS.values()


def test_hopper_and_blackwell_take_50_mb_more():
    def estimate(gpu):
        return memory.estimate_training(**LLAMA_8B, gpu=gpu)

    ampere = estimate("A100 80GB")
    assert estimate(None).peak_bytes == ampere.peak_bytes == estimate("24GiB").peak_bytes
    hopper = estimate("H100 80GB")
    assert hopper.peak_bytes - ampere.peak_bytes == pytest.approx(WORKSPACES, abs=MIB)
    for gpu in ("NVIDIA H200", "rtx 5090", "B200"):
        small = memory.estimate_training(GROUPED, gpu=gpu, sequence_length=32)
        assert small.parts["workspace"] == 64 * MIB, gpu
    # a prediction made for no card knows what they add
    need = ampere.peak_bytes + WORKSPACES + ampere.margin[1]
    for capability, size, fits in [
        ((9, 0), need, True), ((9, 0), need - 1, False), ((8, 6), need - WORKSPACES, True),
    ]:  # fmt: skip
        assert ampere.fits(cards.Card("a", size, capability)) == fits


def kernel(capability, dtype, mask=None, heads=4):
    """'flash', 'efficient' or 'math', by what the stand-in keeps for backward."""
    q, k = (torch.zeros(1, n, 128, 64, dtype=dtype, requires_grad=True) for n in (4, heads))
    mode = _kernels.CudaKernels(capability=capability)
    with mode, Ledger(unit=1) as ledger:
        out = F.scaled_dot_product_attention(
            q, k, k, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != 4
        )
    name = type(out.grad_fn).__name__
    if "Flash" in name or "Efficient" in name:
        return "flash" if "Flash" in name else "efficient"
    assert ledger.current > 4 * 128 * 128 * 4  # the scores
    return "math"


@pytest.mark.parametrize(
    ("capability", "dtype", "heads", "masked", "expected"),
    [
        ((7, 5), torch.float16, 4, False, "efficient"),
        ((7, 5), torch.float32, 4, False, "efficient"),
        ((7, 5), torch.bfloat16, 4, False, "math"),
        ((7, 5), torch.float16, 2, False, "math"),  # transformers passes enable_gqa=True
        ((7, 5), torch.float16, 4, True, "efficient"),
        ((8, 0), torch.bfloat16, 4, False, "flash"),
        ((8, 9), torch.bfloat16, 2, False, "flash"),
        ((9, 0), torch.float16, 2, False, "flash"),
        ((8, 6), torch.float32, 4, False, "efficient"),
        ((8, 0), torch.bfloat16, 4, True, "efficient"),
    ],
)
def test_the_kernel_pytorch_takes(capability, dtype, heads, masked, expected):
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool) if masked else None
    assert kernel(capability, dtype, mask, heads) == expected


@pytest.mark.slow
def test_the_longest_context_of_a_t4():
    found = memory.find_largest(gpu="T4", **LLAMA_8B)
    length = found.choices.sequence_length
    assert 3_500 <= length <= 5_000, length
    longer = memory.estimate_training(**LLAMA_8B, gpu="T4", sequence_length=length + 64)
    assert found.fits("T4") and not longer.fits("T4")


def test_a_t4_is_a_t4():
    found = memory.estimate_training(**LLAMA_8B, gpu="T4", sequence_length=3_520)
    assert found.fits("T4") and "fits: T4" in str(found)
    assert found.choices.dtype == torch.float16
    longer = memory.estimate_training(**LLAMA_8B, gpu="T4", sequence_length=5_056)
    assert not longer.fits("T4")
    # asked of a prediction that was made for Ampere, a T4 still answers for itself
    ampere = memory.estimate_training(**LLAMA_8B, sequence_length=5_056)
    assert ampere.fits(memory.GPUS["T4"]) and not ampere.fits("T4")
    assert "other kernels (ask with --gpu, or gpu=): T4" in str(ampere)
    assert "T4" in ampere._repr_html_()


def test_without_shared_heads_a_t4_needs_what_ampere_needs():
    phi = dict(lora=8, sequence_length=2048, dtype="float16", gradient_checkpointing=False)
    t4, ampere = (
        memory.estimate_training("phi-3-mini", gpu=gpu, **phi).peak_bytes for gpu in ("T4", "A10G")
    )
    assert t4 == pytest.approx(ampere, rel=0.01)


def test_adapters_of_a_quantized_model_are_float32_on_a_t4():
    def adapters(gpu):
        choices = dict(lora=4, quantization="nf4", sequence_length=64, gpu=gpu)
        return memory.estimate_training("SmolLM2-135M-Instruct", **choices).parts

    t4, l4 = adapters("T4"), adapters("L4")
    assert t4["adapters"] == pytest.approx(2 * l4["adapters"], rel=0.05)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(dtype="bfloat16"), r"dtype='bfloat16'.*'T4'.*dtype='float16' works"),
        (dict(dtype=torch.bfloat16), r"dtype='bfloat16'.*'T4'.*dtype='float16' works"),
        (dict(mixed_precision="bf16"), r"mixed_precision='bf16'.*'T4'.*'fp16' works"),
        (dict(attention="flash_attention_2"), r"flash_attention_2.*'T4'.*'sdpa' works"),
    ],
)
def test_what_a_t4_cannot_do_is_refused_by_name(choices, message):
    with pytest.raises(ValueError, match=message):
        memory.estimate_training(GROUPED, gpu="Tesla T4", **choices)
    assert memory.estimate_training(GROUPED, gpu="L4", sequence_length=32, **choices)


# ------------------------------------------------------------------ padding
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_padded_batch_equals_a_real_one_to_the_byte(attention, checkpointing):
    run = _step.Choices(
        dtype=torch.float32, batch_size=2, sequence_length=40, attention=attention,
        gradient_checkpointing=checkpointing, loss="logits", kernels="cpu", padded=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(
        GROUPED, dtype=torch.float32, attn_implementation=attention
    ).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids, labels, mask = (torch.ones(2, 40, dtype=torch.long) for _ in range(3))
    mask[0, -1] = 0
    ledger = Ledger()
    for tensor in [*model.parameters(), *model.buffers(), ids, labels, mask]:
        ledger.register(tensor, "held")
    with ledger:
        for _ in range(2):
            kept = dict(attention_mask=mask, labels=labels, use_cache=False)
            model(input_ids=ids, **kept).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert _step.trace(GROUPED, run).peak()[0] == ledger.peak


def test_padding_costs_a_mask_and_repeated_heads():
    def gib(**choices):
        return memory.estimate_training(**LLAMA_8B, **choices).peak_bytes / 2**30

    batch = dict(batch_size=2, sequence_length=2048, gradient_checkpointing=False)
    assert gib(**batch) == pytest.approx(23.8, abs=0.1)
    assert gib(**batch, padded=True) == pytest.approx(25.8, abs=0.1)
    # on a T4 a mask keeps shared heads off the plain formula
    t4 = dict(gpu="T4", sequence_length=4096)
    assert gib(**t4, padded=True) < 0.7 * gib(**t4)


@pytest.mark.parametrize(
    "choices", [dict(packing=True), dict(attention="flash_attention_2"), dict(stack="book")]
)
def test_padding_is_refused_where_it_is_not_known(choices):
    with pytest.raises(ValueError, match="padded=True is known for attention='sdpa'"):
        memory.estimate_training(GROUPED, padded=True, **choices)


# ------------------------------------------------------------------ the rest of the face
@pytest.mark.parametrize(("vary", "unit"), [("sequence_length", 64), ("batch_size", 1)])
def test_the_search_ends_where_one_unit_more_does_not_fit(monkeypatch, vary, unit):
    def imagined(model, *, gpu, **choices):
        return types.SimpleNamespace(
            fits=lambda gpu: choices[vary] <= limit * unit, peak_bytes=1, **choices
        )

    monkeypatch.setattr(estimate, "estimate_training", imagined)
    most = 1024 if unit == 1 else 131_072 // 64
    for limit in [*range(1, 300), most - 1, most, most + 7]:
        found = memory.find_largest("Llama-3.1-8B", "T4", vary=vary)
        assert getattr(found, vary) == min(limit, most) * unit


def test_formulas_take_a_lora_config():
    from peft import LoraConfig

    measured = 2 * 10**9
    rank, config = (
        memory.compare_formulas([("opt-350m", {"lora": lora}, measured)])
        for lora in (8, LoraConfig(r=8))
    )
    assert (config.drop("traced") == rank.drop("traced")).all(axis=None)


def test_measure_tells_what_lay_there_before(monkeypatch):
    held, unused = torch.zeros(1000), torch.zeros(500)
    with memory.measure("cpu") as found:
        kept = held + 1
    assert found.before_bytes == held.nbytes and unused.nbytes
    assert found.peak_bytes - found.before_bytes == kept.nbytes
    with memory.measure("cpu") as found:
        torch.zeros(10)
    assert found.before_bytes == 0 and "before" not in str(found)

    calls = dict(
        empty_cache=None, reset_peak_memory_stats=None, synchronize=None,
        memory_allocated=700, max_memory_allocated=1200, max_memory_reserved=2000,
        mem_get_info=(1, 9),
    )  # fmt: skip
    for name, value in calls.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with memory.measure("cuda") as found:
        pass
    assert (found.before_bytes, found.peak_bytes) == (700, 1200)
    assert "from before" in str(found)


# ── what a card has measured ─────────────────────────────────────────────────────────────
RESULTS = Path(__file__).parent / "gpu" / "results"
H100 = "nvidia-h100-80gb-hbm3.json"
# Runs whose first prediction was wrong, or which nothing else holds: (report, id). Llama's
# in four bits, PyTorch's and transformers' models, every kind of attention and optimizer.
MEASURED = [
    (RESULTS / H100, "Llama-3.1-8B nf4 16 2x2048"),
    (RESULTS / H100, "Llama-3.1-8B int8 16 2x2048"),
    (RESULTS / H100, "opt-350m 4x1024"),
    (RESULTS / H100, "opt-350m adamw_torch 1x500"),
    (RESULTS / H100, "opt-350m 16 eager False 2x1024"),
    (RESULTS / H100, "Qwen2.5-1.5B-Instruct 2x1024 padded"),
    (RESULTS / H100, "openai-community/gpt2 eager False 4x512"),
    (RESULTS / "first" / H100, "Phi-3-mini-4k-instruct 16 eager 1x2048"),
    (RESULTS / "first" / H100, "SmolLM2-135M-Instruct float32 False 2x128"),
    (RESULTS / "first" / H100, "opt-350m paged_adamw_8bit 1x500"),
]


@pytest.mark.parametrize(("path", "name"), MEASURED, ids=[name for _, name in MEASURED])
def test_predictions_are_what_an_h100_measured(path, name):
    report = json.loads(path.read_text(encoding="utf-8"))
    line = next(x for x in report["lines"] if x.get("id") == name and "measured" in x)
    entry = next(x for x in ladder.runs(ladder.RUNGS, "bfloat16") if x["id"] == name)
    predicted = ladder.predict(entry, ladder.card_of(report["head"]))
    assert predicted["peak_bytes"] == pytest.approx(line["measured"], rel=0.005)


def test_what_kernels_take_is_what_an_h100_measured():
    """To the byte, but for the allocator's rounding of a counter beside the buffer."""
    report = json.loads((RESULTS / H100).read_text(encoding="utf-8"))
    took = {x["what"]: x["backward"] for x in report["lines"] if x["kind"] == "scratch"}
    hopper = (9, 0)
    assert _kernels.column_sums(4096, 4096, hopper) == 2**27
    assert took["linear with bias"] == 2**27 + 512
    with FakeTensorMode():
        scores = torch.empty(4, 16, 512, 512, dtype=torch.bfloat16)
        softmax = torch.ops.aten._softmax_backward_data.default
        assert _kernels.scratch(softmax, (scores, scores)) == took["softmax"]
    # Flash and cuDNN: float32 dQ, and dK and dV for each query head where heads are shared.
    for rows, length, heads, shared, width in (
        (4, 1024, 16, 16, 64),
        (2, 2048, 32, 8, 128),
    ):
        name = f"attention {rows}x{length}, {heads}/{shared} heads of {width}"
        assert ours_beside_gradients(rows, length, heads, shared, width) == pytest.approx(
            took[name], rel=0.03
        )


def ours_beside_gradients(rows, length, heads, shared, width):
    with FakeTensorMode():
        q, k, v = (  # as tests/gpu/stages.py lays them out, and every model
            torch.empty(
                rows, length, count, width, dtype=torch.bfloat16, requires_grad=True
            ).transpose(1, 2)
            for count in (heads, shared, shared)
        )
        out = _kernels.cuda_attention(q, k, v, is_causal=True, enable_gqa=heads != shared)
        grad, ledger = torch.empty_like(out), Ledger()
        ledger.register(out, "held")
        with ledger:
            found = torch.autograd.grad(out, (q, k, v), grad)
        return ledger.peak - sum(x.nbytes for x in (*found, out))


@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (8, 7), (9, 0), (10, 3), (12, 1)])
def test_every_generation_has_a_number_of_processors(capability):
    count, threads = cards.processors(capability)
    assert count >= 40 and threads in (1024, 1536, 2048)


def test_few_rows_need_no_buffer():
    assert _kernels.column_sums(500, 4096, (9, 0)) == 0
    assert _kernels.column_sums(4096, 4095, (9, 0)) > 0  # one column at a time
    assert _kernels.column_sums(4096, 1, (9, 0)) >= 0
