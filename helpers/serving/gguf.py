"""GGUF: convert, quantize, look inside, and measure what quantizing cost (Chapter 6).

llama.cpp's own converters and programs do the work (`llamacpp` finds or builds them). What
is added here: files that appear whole or not at all, errors that say what to do, and the
checks whose absence makes a wrong model silently.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import _machine
from helpers._checks import one_of, whole_number
from helpers._files import atomic_path
from helpers.serving import _folders, _programs, _rows, llamacpp
from helpers.serving._fidelity import fidelity
from helpers.serving._inspection import GGUFFile, inspect

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GGUFFile", "convert_adapter", "convert_model", "fidelity", "imatrix"]
__all__ += ["inspect", "quantize"]

FLOATS = ("f32", "f16", "bf16")
KINDS = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1"),
    *("Q4_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_0"),
    *("IQ4_NL", "IQ4_XS", "IQ3_M", "IQ3_S", "IQ3_XS"),
    *(DEMANDING := ("IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")),
)
SUMS = ".in_sum2"  # what llama-imatrix calls the sums of squares of a matrix's inputs
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
    r"you need at least (\d+) tokens": (
        "text is too short: with this context it needs {} tokens. Give more rows or a smaller "
        "context"
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
    _write(script, command, out, overwrite, env=environment)
    return Path(out)


# ── quantizing ───────────────────────────────────────────────────────────────────────────
def imatrix(
    source: str | Path,
    out: str | Path,
    text: str | Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    context: int = 512,
    overwrite: bool = False,
) -> Path:
    """Measure which weights matter most on your data: an importance matrix for `quantize`.

    For each input of each matrix llama-imatrix takes the mean of its square.

    Args:
        source: the float GGUF file.
        out: a path ending in .gguf, which is returned.
        text: *training* rows as `fidelity` takes them, or one text; special tokens count.
        tokenizer: renders the rows; None: the GGUF's own template.
        context: tokens read at a time; the text must have twice as many.
        overwrite: replace an existing file (else ValueError).

    Raises:
        ValueError: for a damaged file, and too few rows.

    Example:
        >>> imatrix("yoda-f16.gguf", "yoda-imatrix.gguf", train)  # doctest: +SKIP
        PosixPath('yoda-imatrix.gguf')
    """
    whole_number("context", context, 2)
    with tempfile.TemporaryDirectory() as scratch:
        words = Path(scratch, "rows.txt")
        words.write_text(_rows.as_text(inspect(source), text, tokenizer), encoding="utf-8")
        command = [llamacpp.binary("llama-imatrix"), "-m", source, "-f", words, "-o", out]
        command += ["-c", context, "-b", context, "--parse-special", "--no-ppl"]
        _write("llama-imatrix", [*command, *llamacpp.options("llama-imatrix")], out, overwrite)
    return Path(out)


def quantize(
    source: str | Path,
    out: str | Path,
    kind: str = "Q4_K_M",
    *,
    imatrix: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Quantize a float GGUF file; prints how many tensors fell back to another type, if any.

    Args:
        source: an f32, f16 or bf16 file, since quantizing twice loses twice.
        out: a path ending in .gguf, which is returned.
        kind: a name such as 'Q8_0', 'Q6_K', 'Q4_K_M' (see KINDS), in either case.
        imatrix: an importance matrix (see `imatrix`): the weights that matter most are rounded
            with the most care. The smallest kinds demand one.
        overwrite: replace an existing file (else ValueError).

    Raises:
        ValueError: for an unknown kind, one that demands an importance matrix, a matrix of
            another model, and a source that is damaged or quantized.

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
    if imatrix is None and kind in DEMANDING:
        raise ValueError(
            f"kind={kind!r} is so small that it demands imatrix=, the file that `gguf.imatrix` "
            "makes of your training rows"
        )
    guide: list[object] = []
    if imatrix is not None:
        sums = inspect(imatrix).tensors["row"].filter(like=SUMS)
        rows = {str(name).removesuffix(SUMS): row for name, row in sums.items()}
        if not rows or any(found.tensors["row"].get(x) != row for x, row in rows.items()):
            raise ValueError(f"imatrix={str(imatrix)!r} was not measured on this model")
        guide = ["--imatrix", imatrix]
    command = [llamacpp.binary("llama-quantize"), *guide, source, out, kind]
    said = _write("llama-quantize", command, out, overwrite)
    if fell := [x for x in said.splitlines() if re.search("falling back|using fallback", x)]:
        one = " ".join(fell[0].split()).removeprefix("warning: ")
        print(f"{kind}: {len(fell)} of {len(found.tensors)} tensors fell back, such as {one}")
    return Path(out)


# ── shared ───────────────────────────────────────────────────────────────────────────────
def _failed(what: str, done: subprocess.CompletedProcess[str]) -> Exception:
    """For a program that failed: a file may be at fault, unless a signal ended it."""
    ended, said = _machine.how_it_ended(done.returncode), _programs.last_lines(done.stdout)
    kind = RuntimeError if "killed" in ended else ValueError
    return kind(f"{what} {ended}. Its last words:\n{said}")


def _write(
    name: str, command: Iterable[object], out: str | Path, overwrite: bool, **settings: Any
) -> str:
    """Let a command that names `out` write it, whole or not at all; returns what it said."""
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
    return done.stdout
