"""GGUF: convert, quantize, look inside, and measure what quantizing cost (Chapter 6).

llama.cpp's own converters and programs do the work (`llamacpp` finds or builds them). What
is added here: files that appear whole or not at all, errors that say what to do, and the
checks whose absence makes a wrong model silently.

Example:
    >>> f16 = convert_model("merged", "model-f16.gguf")  # doctest: +SKIP
    >>> q8 = quantize(f16, "model-Q8_0.gguf", "Q8_0")  # doctest: +SKIP
    >>> inspect(q8).bits_per_weight  # doctest: +SKIP
    8.5
    >>> fidelity(f16, {"Q8_0": q8}, text)  # doctest: +SKIP
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import _machine
from helpers._checks import one_of
from helpers._files import atomic_path
from helpers.serving import _folders, _programs, llamacpp
from helpers.serving._inspection import GGUFFile, inspect

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["GGUFFile", "convert_adapter", "convert_model", "fidelity", "inspect", "quantize"]

FLOATS = ("f32", "f16", "bf16")
KINDS = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1"),
    *("Q4_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)
# What a converter's words mean, for whoever has not written it.
FAILURES = {
    r"Model (\S+) is not supported": (
        "llama.cpp has no converter for {} (OPT is one of those): fine-tune a model of the Llama, "
        "Qwen, Gemma, Phi or Mistral kind"
    ),
    r"(BPE pre-tokenizer) was not recognized": (
        "llama.cpp does not know how this tokenizer cuts a text into words (its {}): a normalizer, "
        "a pre-tokenizer or BOS was changed, or the model is newer than this llama.cpp. Take the "
        "base's own tokenizer files and add only your tokens and template"
    ),
}


# ── converting ───────────────────────────────────────────────────────────────────────────
def convert_model(
    folder: str | Path, out: str | Path, *, dtype: str = "f16", overwrite: bool = False
) -> Path:
    """Convert a Hugging Face model folder, tokenizer included, to one GGUF file.

    Args:
        folder: what `save_pretrained` of the model and of its tokenizer wrote.
        out: a path ending in .gguf, which is returned.
        dtype: 'f32', 'f16', 'bf16' or 'q8_0'.
        overwrite: replace an existing file (else ValueError).

    Raises:
        ValueError: for a folder that lacks something or holds an adapter or a quantized
            model, and for an architecture llama.cpp does not know.

    Example:
        >>> convert_model("merged", "yoda-f16.gguf")  # doctest: +SKIP
        PosixPath('yoda-f16.gguf')
    """
    one_of("dtype", dtype, (*FLOATS, "q8_0"))
    folder = _folders.find("folder", folder, "config.json")
    _folders.check_model(folder)
    return _convert("convert_hf_to_gguf.py", [folder, "--outtype", dtype], out, overwrite)


def convert_adapter(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    dtype: str = "f16",
    overwrite: bool = False,
) -> Path:
    """Convert a saved LoRA adapter to GGUF; it works on top of its base's GGUF.

    Args:
        adapter: the folder that PEFT's `save_pretrained` wrote.
        base: the folder of the model it was trained on; only its config is read.
        out: a path ending in .gguf, which is returned.
        dtype: 'f32', 'f16', 'bf16' or 'q8_0'.
        overwrite: replace an existing file (else ValueError).

    Raises:
        ValueError: for what llama.cpp cannot apply (embeddings or whole modules, DoRA, alpha
            patterns, rsLoRA, whose scale the converter would silently get wrong), for PiSSA,
            OLoRA and other beginnings that changed the base, and for an adapter of another base.

    Example:
        >>> convert_adapter("adapter", "base", "adapter-f16.gguf")  # doctest: +SKIP
        PosixPath('adapter-f16.gguf')
    """
    one_of("dtype", dtype, (*FLOATS, "q8_0"))
    adapter = _folders.find("adapter", adapter, "adapter_config.json")
    _folders.find("adapter", adapter, "adapter_model.safetensors")
    base = _folders.find("base", base, "config.json")
    _folders.check_adapter(adapter, base)
    arguments = [adapter, "--base", base, "--outtype", dtype]
    return _convert("convert_lora_to_gguf.py", arguments, out, overwrite)


def _convert(script: str, arguments: list[object], out: str | Path, overwrite: bool) -> Path:
    source = llamacpp.source_folder()
    command = [sys.executable, source / script, *arguments, "--outfile", out]
    environment = {**os.environ, "PYTHONPATH": str(source / "gguf-py")}
    return _write(script, command, out, overwrite, env=environment)


# ── quantizing ───────────────────────────────────────────────────────────────────────────
def quantize(
    source: str | Path, out: str | Path, kind: str = "Q4_K_M", *, overwrite: bool = False
) -> Path:
    """Quantize a float GGUF file.

    Args:
        source: an f32, f16 or bf16 file, since quantizing twice loses twice.
        out: a path ending in .gguf, which is returned.
        kind: a name such as 'Q8_0', 'Q6_K', 'Q4_K_M' (see KINDS), in either case.
        overwrite: replace an existing file (else ValueError).

    Raises:
        ValueError: for an unknown kind, and a source that is damaged or quantized.

    Example:
        >>> quantize("yoda-f16.gguf", "yoda-Q4_K_M.gguf")  # doctest: +SKIP
        PosixPath('yoda-Q4_K_M.gguf')
    """
    kind = str(kind).upper()
    one_of("kind", kind, KINDS)
    found = inspect(source)
    if found.kind.lower() not in FLOATS:
        raise ValueError(
            f"source={str(source)!r} is {found.kind} already: quantize from an f16 file, "
            "because every quantization loses something"
        )
    command = [llamacpp.binary("llama-quantize"), source, out, kind]
    return _write("llama-quantize", command, out, overwrite)


# ── fidelity ─────────────────────────────────────────────────────────────────────────────
def fidelity(
    float_gguf: str | Path, quantized: dict[str, Path], text: str, *, context: int = 128
) -> pd.DataFrame:
    """How far quantized files are from their float original, measured by llama-perplexity.

    Args:
        float_gguf: the original.
        quantized: {name: path}.
        text: held-out text of at least two windows of `context` tokens.
        context: tokens a window; the second half of each counts.

    Returns:
        One row each, the original's first: MB (1e6 bytes), bits per weight, perplexity
        (exponential of the mean loss per token; lower is better) and mean KL (mean
        Kullback-Leibler divergence of the next-token distribution from the original's, in
        nats; 0 is the same model).

    Raises:
        ValueError: for damaged files and for a text that is too short.

    Example:
        >>> fidelity("yoda-f16.gguf", {"Q8_0": "yoda-Q8_0.gguf"}, text)  # doctest: +SKIP
    """
    import pandas as pd

    if not quantized:
        raise ValueError("quantized is empty: pass a dict such as {'Q8_0': path}")
    program, rows = llamacpp.binary("llama-perplexity"), []
    with tempfile.TemporaryDirectory() as scratch:
        prompt, logits = Path(scratch, "text.txt"), Path(scratch, "logits")
        prompt.write_text(text, encoding="utf-8")
        common = ["-c", context, "-b", context, "--kl-divergence-base", logits]
        common += llamacpp.options("llama-perplexity")
        for name, path in [(None, float_gguf), *quantized.items()]:
            found = inspect(path)
            extra = ["--kl-divergence"] if name else ["-f", prompt]
            label = r"Mean PPL\(Q\) *:" if name else "Final estimate: PPL ="
            wanted = r"Mean +KLD" if name else f"{label}|at least|]nan"
            done = _programs.run_until(wanted, [program, "-m", path, *common, *extra])
            perplexity = re.search(label + r" *([\d.]+)", done.stdout)
            divergence = re.search(r"Mean +KLD: *(-?[\d.]+)", done.stdout)
            if re.search(r"[]:] *-?nan", done.stdout):
                raise ValueError(
                    f"{Path(path).name} holds weights that are no numbers (NaN): its perplexity is "
                    "none either. Look at the training's loss"
                )
            if "you need at least" in done.stdout:
                raise ValueError(
                    f"text is too short for windows of context={context} tokens: give more "
                    "text or a smaller context"
                )
            if done.returncode or not perplexity or (name and not divergence):
                raise _failed(f"llama-perplexity, on {Path(path).name},", done)
            rows.append(
                {
                    "variant": name or found.kind,
                    "MB": found.bytes / 1e6,
                    "bits per weight": found.bits_per_weight,
                    "perplexity": float(perplexity[1]),
                    "mean KL": float(divergence[1]) if divergence else 0.0,
                }
            )
    return pd.DataFrame(rows).set_index("variant")


# ── shared ───────────────────────────────────────────────────────────────────────────────
def _failed(what: str, done: subprocess.CompletedProcess[str]) -> Exception:
    """For a program that failed: a file may be at fault, unless a signal ended it."""
    ended, said = _machine.how_it_ended(done.returncode), _programs.last_lines(done.stdout)
    kind = RuntimeError if "killed" in ended else ValueError
    return kind(f"{what} {ended}. Its last words:\n{said}")


def _write(
    name: str, command: Iterable[object], out: str | Path, overwrite: bool, **settings: Any
) -> Path:
    """Let a command that names `out` write it: whole, or not at all."""
    if Path(out).suffix != ".gguf":
        raise ValueError(f"out must end in .gguf, not {Path(out).name!r}")
    with atomic_path(out, overwrite=overwrite) as partial:
        done = _programs.run([partial if x is out else x for x in command], **settings)
        for words, meaning in FAILURES.items():
            if match := re.search(words, done.stdout):
                raise ValueError(meaning.format(match[1]))
        if done.returncode or not partial.is_file():
            raise _failed(name, done)
        try:  # a full disk ends some programs without a word
            found = inspect(partial)
        except ValueError as error:
            raise _failed(f"{name} left no whole file ({error}): it", done) from None
        tokens = found.metadata.get("tokenizer.ggml.tokens")
        rows = found.tensors["shape"].get("token_embd.weight", (0,))[0]
        if rows and tokens and tokens != f"{rows:,} values":
            raise ValueError(
                f"the tokenizer has {str(tokens).removesuffix(' values')} tokens and the embedding "
                f"{rows:,} rows, which llama.cpp will not load for this kind of tokenizer: call "
                "`model.resize_token_embeddings(len(tokenizer))`, and save the model again"
            )
    return Path(out)
