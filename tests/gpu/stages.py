"""What is looked at on a card, one function a stage.

Each gets `save(kind, **fields)`, which puts one line of results on the disk, and the
seconds it may take; whatever comes after a kill is lost, nothing before it.
"""

import gc
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from lines import ROOT

sys.path.insert(0, str(ROOT))  # `helpers`, whether or not it is installed
DEVICE = os.environ.get("DEVICE", "cuda")
PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets",
    "triton", "huggingface-hub", "tokenizers", "numpy", "flash-attn",
)  # fmt: skip


def last_words():
    """The end of the traceback of the exception being handled."""
    return "".join(traceback.format_exc().splitlines(keepends=True)[-6:])[-1500:]


def free():
    """Give back what nobody uses any more, so that the next run starts alone."""
    gc.collect()
    import torch

    if DEVICE == "cuda":
        torch.cuda.empty_cache()


# ── the head: what is this machine ───────────────────────────────────────────────────────
def machine():
    """The head of the report. Raises SystemExit where there is no card to report on."""
    import torch

    from helpers import runtime

    if DEVICE == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
        raise SystemExit(
            f"PyTorch {torch.__version__} ({built}) sees no CUDA card here. `python -m "
            "helpers doctor` may know why; DEVICE=cpu runs what needs no card."
        )
    head = {
        "card": "CPU", "device": DEVICE, "capability": None,
        "memory_bytes": runtime.detect().memory_bytes,
        "dtype": str(runtime.native_dtype(DEVICE)).removeprefix("torch."),
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(), "system": platform.system(),
        "versions": {name: runtime.package_version(name) for name in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(), "commit": _commit(),
    }  # fmt: skip
    if DEVICE == "cuda":
        card = torch.cuda.get_device_properties(0)
        head |= {"card": card.name, "capability": [card.major, card.minor],
                 "memory_bytes": card.total_memory}  # fmt: skip
    return head


def _commit():
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# ── env: what cuBLAS takes, which kernels PyTorch chooses ────────────────────────────────
def env(save, _):
    from helpers import runtime
    from helpers.course import doctor

    here = runtime.detect()
    save("runtime", rows=here.rows())
    save("doctor", lines=[str(finding) for finding in doctor.report().findings])
    if DEVICE != "cuda":
        save("skipped", what="cuBLAS workspaces and kernels", why="they need a card")
        return
    import torch

    total = torch.cuda.mem_get_info()
    save("memory", free_bytes=total[0], total_bytes=total[1])
    workspaces(save, here.compute_dtype)
    kernels(save)
    scratch(save, here.compute_dtype)


def workspaces(save, dtype):
    """What cuBLAS takes for itself, in the forward pass and in autograd's thread."""
    import torch

    before = torch.cuda.memory_allocated()
    a = torch.randn(256, 256, device="cuda", dtype=dtype, requires_grad=True)
    product = a @ a
    forward = torch.cuda.memory_allocated() - before - a.nbytes - product.nbytes
    product.sum().backward()
    torch.cuda.synchronize()
    left = torch.cuda.memory_allocated() - before - 2 * a.nbytes - product.nbytes
    save("cublas_workspace", forward=forward, after_backward=left)


def kernels(save):
    """The attention kernel that PyTorch picks (0 math, 1 flash, 2 efficient, 3 cuDNN)."""
    import torch

    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads in (8, 2):
            for masked in (False, True):
                query = torch.randn(1, 8, 256, 64, device="cuda", dtype=dtype)
                key = torch.randn(1, heads, 256, 64, device="cuda", dtype=dtype)
                mask = None
                if masked:
                    mask = torch.ones(1, 1, 256, 256, device="cuda").bool().tril()
                for tensor in (query, key):
                    tensor.requires_grad_(True)
                choice = torch._fused_sdp_choice(
                    query, key, key, mask, 0.0, not masked, enable_gqa=heads != 8
                )
                label = f"{dtype} {'gqa' if heads != 8 else 'mha'} mask={masked}"
                found[label.removeprefix("torch.")] = int(choice)
    save("sdpa_backend", **found)


def scratch(save, dtype):
    """What kernels take while they run, beside their inputs, outputs and gradients."""
    import torch
    from torch.nn import functional

    def tensor(*shape, kind=dtype):
        return torch.randn(*shape, device="cuda", dtype=kind, requires_grad=True)

    def attention(rows, length, heads, shared, width):
        q, k, v = (
            tensor(rows, length, count, width).transpose(1, 2) for count in (heads, shared, shared)
        )
        options = {"is_causal": True, "enable_gqa": heads != shared}
        return lambda: functional.scaled_dot_product_attention(q, k, v, **options), (
            q,
            k,
            v,
        )

    cases = {}
    for rows, length, heads, shared, width in (
        (1, 512, 32, 32, 96), (4, 1024, 32, 32, 96), (1, 500, 16, 16, 64),
        (4, 1024, 16, 16, 64), (1, 1024, 16, 16, 64), (1, 4096, 16, 16, 64),
        (2, 2048, 32, 8, 128), (1, 1024, 32, 8, 128), (1, 2048, 32, 32, 128),
    ):  # fmt: skip
        name = f"attention {rows}x{length}, {heads}/{shared} heads of {width}"
        cases[name] = attention(rows, length, heads, shared, width)
    scores = tensor(4, 16, 512, 512)
    cases["softmax"] = (lambda: scores.softmax(-1), [scores])
    cases["softmax into float32"] = (
        lambda: scores.softmax(-1, dtype=torch.float32), [scores],
    )  # fmt: skip
    states, table = tensor(4096, 1024), tensor(50_000, 512)
    norm, gain = torch.nn.LayerNorm(1024, device="cuda", dtype=dtype), tensor(4096, 1024)
    line = torch.nn.Linear(1024, 4096, device="cuda", dtype=dtype)
    for count in (500, 4096):
        ids = torch.randint(0, 50_000, (count,), device="cuda")
        cases[f"embedding of {count}"] = (
            lambda ids=ids: functional.embedding(ids, table), [table],
        )  # fmt: skip
    cases["layer norm"] = (lambda: norm(states), [states, *norm.parameters()])
    cases["linear with bias"] = (lambda: line(states), [states, *line.parameters()])
    cases["gelu"] = (lambda: functional.gelu(gain), [gain])
    for name, (call, inputs) in cases.items():
        for round_ in range(2):  # the first one makes workspaces that stay
            found = _scratch(call, inputs)
            if round_:
                save("scratch", what=name, **found)


def _scratch(call, inputs):
    """Bytes that a forward and a backward pass took at most and gave back."""
    import torch

    def peak_of(work):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    out, forward = peak_of(call)
    grad = torch.ones_like(out)
    _, backward = peak_of(lambda: torch.autograd.grad(out, inputs, grad))
    return {"forward": forward, "backward": backward}


# ── codes: of the card against those of the CPU and ours ─────────────────────────────────
def codes(save, _):
    import torch

    torch.manual_seed(0)
    sizes = [(1024, 1024), (333, 517)] if DEVICE == "cuda" else [(256, 256)]
    compare_codes(save, {f"normal {a}x{b}": torch.randn(a, b) * 0.02 for a, b in sizes})
    layers(save)


def compare_codes(save, matrices):
    import torch

    for name, weights in matrices.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            try:
                four_bit(save, name, weights.to(dtype))
                eight_bit(save, name, weights.to(dtype))
            except Exception:
                save("error", what=f"{name} {dtype}", text=last_words())


def differ(a, b):
    """How many entries differ, after bringing both to the CPU."""
    return int((a.detach().cpu() != b.detach().cpu()).sum())


def four_bit(save, name, weights):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from helpers import quantization

    on_card = weights.to(DEVICE)
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            options = {"quant_type": kind, "compress_statistics": double, "blocksize": 64}
            card, state = quantize_4bit(on_card, **options)
            cpu, state_cpu = quantize_4bit(weights, **options)
            ours = getattr(quantization, f"quantize_{kind}")
            ours_cpu = ours(weights, double_quantize=double)
            ours_card = ours(on_card, double_quantize=double)
            back = dequantize_4bit(card, state).float().cpu()
            save(
                "codes", matrix=name, dtype=weights.dtype, what=kind, double=double,
                bytes=card.numel(),
                card_against_cpu=differ(card, cpu),
                card_against_ours=differ(card, ours_cpu.codes),
                ours_card_against_ours_cpu=differ(ours_card.codes, ours_cpu.codes),
                scales_card_against_cpu=differ(state.absmax, state_cpu.absmax),
                scales_card_against_ours=differ(state.absmax, ours_cpu.block_scales),
                scales_card_against_ours_card=differ(state.absmax, ours_card.block_scales),
                values_card_against_ours=float(
                    (back - ours_cpu.dequantize().float()).abs().max()
                ),
            )  # fmt: skip


def eight_bit(save, name, weights):
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant

    from helpers import quantization

    half = weights.to(torch.float16)
    for threshold in (0.0, 0.9 * float(half.abs().max())):  # none, and a few columns
        card, scales, columns = int8_vectorwise_quant(half.to(DEVICE), threshold=threshold)
        cpu, scales_cpu, _ = int8_vectorwise_quant(half.clone(), threshold=threshold)
        ours = quantization.quantize_int8(weights, threshold=threshold)
        ours_card = quantization.quantize_int8(weights.to(DEVICE), threshold=threshold)
        gap = (card.cpu().int() - cpu.int()).abs().max()
        save(
            "codes", matrix=name, dtype=weights.dtype, what="int8",
            threshold=threshold, bytes=card.numel(), largest_gap=int(gap),
            card_against_cpu=differ(card, cpu), card_against_ours=differ(card, ours.codes),
            ours_card_against_ours_cpu=differ(ours_card.codes, ours.codes),
            scales_card_against_cpu=differ(scales, scales_cpu),
            outlier_columns=0 if columns is None else len(columns),
        )  # fmt: skip


def layers(save):
    """Outputs and milliseconds of quantized layers for few and for many tokens."""
    import torch
    from bitsandbytes import nn as bits

    from helpers import runtime, speed

    torch.manual_seed(0)
    dtype = runtime.native_dtype(DEVICE)
    width, most = (4096, 4096) if DEVICE == "cuda" else (512, 64)
    plain = torch.nn.Linear(width, width, bias=False, dtype=dtype)
    kinds = {"plain": plain.to(DEVICE)}
    for name in ("nf4", "int8"):
        if name == "nf4":
            new = bits.LinearNF4(width, width, bias=False, compute_dtype=dtype)
        else:
            new = bits.Linear8bitLt(width, width, bias=False, has_fp16_weights=False, threshold=6.0)
        new.load_state_dict({"weight": plain.weight.detach().cpu().float()})
        kinds[name] = new.to(DEVICE)
    for tokens in (count for count in (1, 8, 64, 512, 4096) if count <= most):
        x = torch.randn(tokens, width, device=DEVICE, dtype=dtype)
        with torch.no_grad():
            reference = kinds["plain"](x)
        for name, layer in kinds.items():
            with torch.no_grad():
                out = layer(x)
                took = speed.benchmark(layer, x, min_run_time=0.05, rounds=1).median
            error = (out - reference).norm() / reference.norm()
            save("layer", what=name, dtype=dtype, tokens=tokens, ms=1e3 * took,
                 error=float(error))  # fmt: skip


# ── gpu_tests: the course's own ──────────────────────────────────────────────────────────
def gpu_tests(save, _):
    """Every test marked gpu, in this process: its line is saved the moment it ends."""
    try:
        version("pytest")
    except PackageNotFoundError:
        save("skipped", what="pytest -m gpu", why="pytest is not installed here")
        return
    import pytest

    class Lines:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                save("test", test=report.nodeid, outcome=report.outcome, when=report.when,
                     seconds=round(report.duration, 2), output=report.capstdout[-1500:],
                     text=report.longreprtext[-1500:])  # fmt: skip

        def pytest_collectreport(self, report):
            if report.failed:
                save("error", what=report.nodeid, text=report.longreprtext[-1500:])

    # Only modules that have such tests: some of the others need the model's weights.
    # Without the project's own options: they ask for plug-ins that may not be here.
    modules = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py"))
               if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]  # fmt: skip
    status = pytest.main(
        ["-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider",
         "--continue-on-collection-errors", *modules],
        plugins=[Lines()],
    )  # fmt: skip
    save("gpu_tests", status=int(status))


# ── model: the embedded one, its answers and its weights ─────────────────────────────────
def model(save, _):
    from safetensors import safe_open

    from helpers import generation, models, runtime

    runtime.quiet()
    started = time.perf_counter()
    folder = models.embedded_folder()
    save("embedded", seconds=round(time.perf_counter() - started, 1))
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    prompt = generation.chat_prompt(tokenizer, "What is the capital of France?")
    for quantization in (None, "nf4", "fp4", "int8"):
        for attention in ("eager", "sdpa") if DEVICE == "cuda" else ("sdpa",):
            choices = {"quantization": quantization, "attention": attention}
            try:
                answer(save, tokenizer, prompt, choices)
            except Exception:
                save("error", what=choices, text=last_words())
            free()
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = ("layers.3.self_attn.q_proj", "layers.15.mlp.down_proj")
        real = {key: tensors.get_tensor(f"model.{key}.weight").float() for key in names}
    compare_codes(save, real)


def answer(save, tokenizer, prompt, choices):
    import torch

    from helpers import generation, models

    loaded = models.load_model(models.EMBEDDED, device=DEVICE, **choices)
    started = time.perf_counter()
    text = generation.generate(loaded, tokenizer, prompt, max_new_tokens=24)
    took = time.perf_counter() - started
    allocated = torch.cuda.memory_allocated() if DEVICE == "cuda" else None
    save("answer", **choices, text=text, seconds=round(took, 3), dtype=loaded.dtype,
         allocated=allocated)  # fmt: skip


# ── chapters ─────────────────────────────────────────────────────────────────────────────
def chapter(save, limit, name, folder):
    """A notebook as it stands; errors are noted and the next cell goes on.

    A cell may take four fifths of the time that is left. The executed copy goes to
    `folder`.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    size = sum(bool(c.cell_type == "code" and c.source.strip()) for c in notebook.cells)
    save("chapter", chapter=name, cells=size)
    began = {}

    def begins(cell, cell_index, **_):
        began[cell_index] = time.perf_counter()

    def done(cell, cell_index, execute_reply, **_):
        content, error = execute_reply["content"], None
        expected = "raises-exception" in cell.metadata.get("tags", [])
        if content["status"] != "ok" and not expected:
            error = f"{content.get('ename')}: {content.get('evalue')}"[:1500]
        save("cell", chapter=name, cell=cell_index, error=error,
             seconds=round(time.perf_counter() - began[cell_index], 2),
             first_line=cell.source.strip().splitlines()[0][:80],
             output=shown(cell)[: 3000 if error else 600])  # fmt: skip
        nbformat.write(notebook, folder / f"{name}.ipynb")

    until = time.monotonic() + limit
    late = {"ename": "Timeout", "evalue": "four fifths of the time that was left"}
    NotebookClient(
        notebook,
        timeout_func=lambda _: max(10, int(0.8 * (until - time.monotonic()))),
        kernel_name="python3",
        allow_errors=True,
        interrupt_on_timeout=True,
        error_on_timeout=late,
        store_widget_state=False,
        resources={"metadata": {"path": str(ROOT)}},
        on_cell_execute=begins,
        on_cell_executed=done,
    ).execute()


def shown(cell):
    """What a cell's outputs say, as plain text."""
    found = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            found.append(output.text)
        elif "text/plain" in output.get("data", {}):
            found.append(output.data["text/plain"])
        elif output.output_type == "error":
            found.append("\n".join(output.traceback)[-1500:])
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(found))
