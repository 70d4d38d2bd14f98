"""Where a model is loaded from: what is wrong there, in a sentence (Chapters 0 and 2)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from helpers import runtime

_NEEDED = {  # one of these
    "model": ("config.json", "adapter_config.json"),
    "tokenizer": ("tokenizer*", "vocab*", "*.model"),
}
_READ = {"model": ("*.safetensors", "*.index.json", "*.bin"), "tokenizer": ("config.json",)}


@contextlib.contextmanager
def reading(origin: str, what: str) -> Iterator[bool]:
    """Around `from_pretrained`: its riddles become sentences.

    Yields whether to look at local files only, which spares minutes of retries. origin: a
    folder or a Hub id. what: 'model' or 'tokenizer'. Raises ValueError for a folder that is
    not there or not whole, OSError for what cannot be had here.
    """
    from huggingface_hub import constants

    folder, before = Path(origin), constants.HF_HUB_OFFLINE
    local_only = folder.is_dir() or not runtime.hub_reachable()
    constants.HF_HUB_OFFLINE = before or local_only  # or PEFT's file is asked for five times
    try:
        yield local_only
    except Exception as error:  # of several libraries
        if folder.is_dir():
            _check(folder, what)
        if not isinstance(error, OSError):
            raise
        note, owner = folder / "adapter_config.json", folder.parent
        if note.is_file() and not (folder / "config.json").is_file():
            base = json.loads(note.read_text("utf-8")).get("base_model_name_or_path")
            raise OSError(
                f"{origin} holds an adapter alone, and its base model {base!r} is not here: load "
                "that one, then peft.PeftModel.from_pretrained(model, folder)"
            ) from error
        if folder.is_dir() or not local_only:
            raise
        if owner.is_dir() or owner.name == "outputs":
            raise ValueError(f"name={origin!r}: no such folder in {Path.cwd()}") from error
        raise OSError(
            f"There is no folder {origin!r} here; as a Hub id, it is not in the local cache, and "
            "the Hugging Face Hub cannot be reached. Connect once to download it, or use the "
            "embedded model: load_model('smollm2-135m')."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _check(folder: Path, what: str) -> None:
    """Raise ValueError naming the file that is missing, a pointer or damaged."""
    from safetensors import SafetensorError, safe_open

    if not any(any(folder.glob(pattern)) for pattern in _NEEDED[what]):
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise ValueError(f"name={str(folder)!r}: the folder holds no {what}, but {held}")
    patterns = _NEEDED[what] + _READ[what]
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    for path in sorted(filter(Path.is_file, found)):
        with open(path, "rb") as file:
            if file.read(24) == b"version https://git-lfs.":
                raise ValueError(
                    f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in that "
                    "folder, or download it anew"
                )
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "np"):
                    continue
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged, so download or save it anew: {error}") from error
