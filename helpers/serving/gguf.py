"""GGUF: convert, quantize, look inside, and measure what quantizing cost (Chapter 6).

llama.cpp's own converters and programs do the work (`helpers.llamacpp` finds or builds
them). What is added here: files that appear whole or not at all, errors that say what to
do, and the checks whose absence makes a wrong model silently.
"""

import contextlib
import html
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from helpers.serving import llamacpp

FLOATS = ("f32", "f16", "bf16")
KINDS = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1"),
    *("Q4_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)
SUPER_BLOCK = 256  # weights that the K types quantize together
NOT_A_FALLBACK = {"F32", "F16", "BF16"}


# ── converting ───────────────────────────────────────────────────────────────────────────
def convert_model(folder, out, *, dtype="f16", overwrite=False):
    """Convert a Hugging Face model folder, tokenizer included, to one GGUF file.

    dtype: 'f32', 'f16', 'bf16' or 'q8_0'. out: a path ending in .gguf; an existing file is
    refused unless `overwrite`. Returns its path. Raises ValueError for a folder that lacks
    something, for an architecture llama.cpp does not know, and for other bad arguments.
    """
    _one_of("dtype", dtype, (*FLOATS, "q8_0"))
    folder = _folder("folder", folder, "config.json")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"folder={str(folder)!r} holds an adapter; use `convert_adapter`, or merge it "
            "(`model.merge_and_unload()`), save the whole model and convert that"
        )
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"folder={str(folder)!r} has no tokenizer ({', '.join(names)}). A GGUF file "
            "carries it: call `tokenizer.save_pretrained(folder)` first"
        )
    config = _json(folder / "config.json")
    if config.get("quantization_config"):
        raise ValueError(
            f"folder={str(folder)!r} holds a quantized model. Load the base in float32 or "
            "16 bits, merge the adapter into that, and save it again"
        )
    with _new_file(out, overwrite) as partial:
        _convert("convert_hf_to_gguf.py", [folder, "--outtype", dtype], partial)
    return Path(out)


def convert_adapter(adapter, base, out, *, dtype="f16", overwrite=False):
    """Convert a saved LoRA adapter to GGUF; it works on top of its base's GGUF.

    adapter: a folder with adapter_config.json. base: the folder of the model it was
    trained on (`models.embedded_folder()`, say; only its config is read). Raises ValueError
    for what llama.cpp cannot apply: embeddings or whole modules in the adapter, DoRA,
    alpha patterns, rsLoRA (whose scale the converter would silently get wrong), and for an
    adapter that does not fit the base.
    """
    _one_of("dtype", dtype, (*FLOATS, "q8_0"))
    adapter = _folder("adapter", adapter, "adapter_config.json")
    base = _folder("base", base, "config.json")
    _check_adapter(adapter)
    _check_fit(adapter, base)
    with _new_file(out, overwrite) as partial:
        arguments = [adapter, "--base", base, "--outtype", dtype]
        _convert("convert_lora_to_gguf.py", arguments, partial)
    return Path(out)


MERGE = (
    "Merge it instead: load the base in float32 or 16 bits, `PeftModel.from_pretrained`, "
    "`merge_and_unload()`, save, `gguf.convert_model`"
)


def _check_adapter(adapter):
    config = _json(adapter / "adapter_config.json")
    for name, why in (
        ("use_dora", "DoRA's magnitudes are unknown to llama.cpp"),
        ("alpha_pattern", "llama.cpp knows one alpha for all layers"),
        ("use_rslora", "the converter would scale by alpha/r instead of alpha/sqrt(r)"),
    ):
        if config.get(name):
            raise ValueError(f"adapter={str(adapter)!r} has {name}: {why}. {MERGE}")
    for name in _shapes(adapter):
        if not re.search(r"\.lora_[AB]\.weight$", name):
            raise ValueError(
                f"adapter={str(adapter)!r} holds {name}, which is no low-rank pair: "
                "embeddings, heads, norms and `modules_to_save` cannot be applied by "
                "llama.cpp (norms it would drop without a word). "
                f"{MERGE}"
            )


def _check_fit(adapter, base):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, shape in _shapes(adapter).items():
        if not (match := re.match(r"base_model\.model\.(.+)\.lora_([AB])\.weight$", name)):
            continue
        try:
            layer = model.get_submodule(match[1])
            expected = layer.in_features if match[2] == "A" else layer.out_features
        except AttributeError:
            expected = None
        if expected != shape[1 if match[2] == "A" else 0]:
            raise ValueError(
                f"adapter={str(adapter)!r} was trained on another model than "
                f"base={str(base)!r}: {match[1]} "
                + (
                    "does not exist there"
                    if expected is None
                    else f"has {expected} features there, and the adapter wants {shape}"
                )
            )


def _shapes(folder):
    """{tensor name: shape} of a saved adapter, without reading the weights."""
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(
            f"adapter={str(folder)!r} has no adapter_model.safetensors; save it again with "
            "today's peft (`model.save_pretrained`)"
        )
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _convert(script, arguments, out):
    source = llamacpp.source_folder()
    environment = {**os.environ, "PYTHONPATH": str(source / "gguf-py")}
    command = [sys.executable, source / script, *arguments, "--outfile", out]
    done = _run(command, environment)
    if done.returncode == 0 and out.is_file():
        return
    said = done.stdout + done.stderr
    if match := re.search(r"Model (\S+) is not supported", said):
        raise ValueError(
            f"llama.cpp has no converter for {match[1]} (OPT is one of those). Its own "
            "models are of the Llama, Qwen, Gemma, Phi, Mistral kind: fine-tune one of them"
        )
    raise _failed(script, done)


# ── quantizing ───────────────────────────────────────────────────────────────────────────
def quantize(source, out, kind="Q4_K_M", *, overwrite=False):
    """Quantize a float GGUF file; returns the new file's path.

    kind: a name such as 'Q8_0', 'Q6_K', 'Q4_K_M' (see KINDS). source: an f32, f16 or bf16
    file, since quantizing twice loses twice. Raises ValueError for an unknown kind, for a
    source that is damaged or quantized, and for an existing `out` without `overwrite`.
    """
    kind = str(kind).upper()
    _one_of("kind", kind, KINDS)
    found = inspect(source)
    if found.kind.lower() not in FLOATS:
        raise ValueError(
            f"source={str(source)!r} is {found.kind} already; quantize from an f16 file, "
            "because every quantization loses something"
        )
    with _new_file(out, overwrite) as partial:
        done = _run([llamacpp.binary("llama-quantize"), source, partial, kind])
        if done.returncode:
            raise _failed("llama-quantize", done)
    return Path(out)


# ── looking inside ───────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file holds.

    kind: its file type, such as 'F16' or 'Q4_K_M'. metadata: {key: value}, long lists as
    their length. tensors: a DataFrame with shape, type, bytes and bits per weight.
    """

    path: Path
    kind: str
    metadata: dict = field(repr=False)
    tensors: object = field(repr=False)

    @property
    def bytes(self):
        """Size of the file."""
        return self.path.stat().st_size

    @property
    def bits_per_weight(self):
        """Bits really used per weight, over all tensors."""
        weights = self.tensors["weights"].sum()
        return float(8 * self.tensors["bytes"].sum() / weights)

    @property
    def types(self):
        """{tensor type: number of tensors}, most frequent first."""
        return dict(Counter(self.tensors["type"]).most_common())

    @property
    def fell_back(self):
        """Matrices whose rows do not divide into blocks of 256, in a file of a K type.

        llama.cpp stores them in another, larger type of blocks of 32.
        """
        if "_K" not in self.kind:
            return self.tensors.iloc[:0]
        odd = self.tensors["row"] % SUPER_BLOCK != 0
        return self.tensors[odd & ~self.tensors["type"].isin(NOT_A_FALLBACK)]

    def __str__(self):
        types = ", ".join(f"{count} {name}" for name, count in self.types.items())
        text = (
            f"{self.path.name}: {self.kind}, {self.bytes / 1e6:.1f} MB, "
            f"{self.bits_per_weight:.2f} bits per weight\n"
            f"{len(self.tensors)} tensors: {types}"
        )
        if fell := len(self.fell_back):
            text += f"\n{fell} fell back: their rows are no multiple of {SUPER_BLOCK} weights"
        return text

    def _repr_html_(self):
        lines = str(self).replace(str(self.path.name), f"<b>{self.path.name}</b>", 1)
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(key)}</td>"
            f"<td style='text-align:left'>{html.escape(_short(value))}</td></tr>"
            for key, value in self.metadata.items()
        )
        return f"<p>{lines.replace(chr(10), '<br>')}</p><table>{rows}</table>"


def _short(value, width=90):
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def inspect(path):
    """Read a GGUF file's metadata and tensor list; returns a `GGUFFile`.

    Raises FileNotFoundError, and ValueError for a file that is no GGUF, is cut short, or
    is damaged.
    """
    import gguf
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file")
    with open(path, "rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(
                f"path={str(path)!r} is no GGUF file: it begins with {magic!r}, not b'GGUF'"
            )
    try:
        reader = gguf.GGUFReader(path)
        tensors = pd.DataFrame(map(_tensor, reader.tensors)).set_index("name")
        metadata = {name: _value(f) for name, f in reader.fields.items() if f.types}
        kind = gguf.LlamaFileType(metadata.get("general.file_type", 1024)).name
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(
            f"path={str(path)!r} is cut short or damaged ({path.stat().st_size:,} bytes; "
            f"{type(error).__name__}: {error}). Convert or download it again"
        ) from error
    kind = kind.removeprefix("MOSTLY_").removeprefix("ALL_")
    return GGUFFile(path, kind, metadata, tensors)


def _tensor(tensor):
    return {
        "name": tensor.name,
        "shape": tuple(int(n) for n in reversed(tensor.shape)),
        "row": int(tensor.shape[0]),
        "type": tensor.tensor_type.name,
        "weights": int(tensor.n_elements),
        "bytes": int(tensor.n_bytes),
        "bits per weight": 8 * int(tensor.n_bytes) / int(tensor.n_elements),
    }


def _value(entry):
    if len(entry.data) > 12:
        return f"{len(entry.data):,} values"
    return entry.contents()


# ── fidelity ─────────────────────────────────────────────────────────────────────────────
def fidelity(float_gguf, quantized, text, *, context=128):
    """How far quantized files are from their float original, on `text`, as a DataFrame.

    quantized: {name: path}. text: held-out text of at least two windows of `context`
    tokens. Columns: MB (1e6 bytes), bits per weight, perplexity (exponential of the mean
    loss per token; lower is better) and mean KL (mean Kullback-Leibler divergence of the
    next-token distribution from the original's, in nats; 0 is the same model). One row for
    the original comes first. llama-perplexity measures; the second half of each window
    counts. Raises ValueError for damaged files and for a text that is too short.
    """
    import pandas as pd

    if not quantized:
        raise ValueError("quantized is empty; pass a dict such as {'Q8_0': path}")
    program = llamacpp.binary("llama-perplexity")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        prompt, logits = Path(scratch, "text.txt"), Path(scratch, "logits")
        prompt.write_text(text, encoding="utf-8")
        common = ["-c", str(context), "-b", str(context), "--kl-divergence-base", logits]
        common += llamacpp.threads() + llamacpp.options("llama-perplexity")
        for name, path in {"original": float_gguf, **quantized}.items():
            found = inspect(path)
            base = name == "original"
            extra = ["-f", prompt] if base else ["--kl-divergence"]
            done = _run([program, "-m", path, *common, *extra])
            said = done.stdout + done.stderr
            word = "Final estimate: PPL =" if base else r"Mean PPL\(Q\) *:"
            perplexity = re.search(word + r" *([\d.]+)", said)
            divergence = re.search(r"Mean +KLD: *(-?[\d.]+)", said)
            if perplexity is None or (divergence is None and not base):
                if "you need at least" in said:
                    raise ValueError(
                        f"text is too short for windows of context={context} tokens: give "
                        "more text or a smaller context"
                    )
                raise _failed(f"llama-perplexity, on {Path(path).name},", done)
            rows.append(
                {
                    "variant": found.kind if base else name,
                    "MB": found.bytes / 1e6,
                    "bits per weight": found.bits_per_weight,
                    "perplexity": float(perplexity[1]),
                    "mean KL": 0.0 if base else float(divergence[1]),
                }
            )
    return pd.DataFrame(rows).set_index("variant")


# ── shared ───────────────────────────────────────────────────────────────────────────────
def _run(command, environment=None):
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )


def _failed(what, done):
    """The error to raise for a program that did not do its work.

    A file or an argument may be at fault (ValueError), unless a signal ended it.
    """
    said = _last_words(done.stdout + done.stderr)
    kind = RuntimeError if done.returncode < 0 else ValueError
    ended = llamacpp.how_it_ended(done.returncode)
    return kind(f"{what} {ended}. Its last words:\n{said}")


def _last_words(said, lines=8):
    kept = [line for line in said.splitlines() if line.strip()][-lines:]
    return "\n".join(line[:300] for line in kept)


@contextlib.contextmanager
def _new_file(out, overwrite):
    """Yields a temporary path beside `out`, and renames it when the block succeeds."""
    out = Path(out)
    if out.suffix != ".gguf":
        raise ValueError(f"out must end in .gguf, not {out.name!r}")
    if out.exists() and not overwrite:
        raise ValueError(f"out={str(out)!r} exists; pass overwrite=True to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent) as scratch:
        partial = Path(scratch, out.name)
        yield partial
        os.replace(partial, out)


def _folder(name, value, needed):
    folder = Path(value)
    if not (folder / needed).is_file():
        what = "has no" if folder.is_dir() else "is not a folder; wanted is one with"
        raise ValueError(f"{name}={str(value)!r} {what} {needed}")
    return folder


def _json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
