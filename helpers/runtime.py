"""Where am I, and what can this machine do? (all chapters)

`runtime.start()` is the first call of every notebook: seeds, quiet logs, one small table.
The *profile* it reports ('cpu' or 'gpu') decides model and sizes, never the lesson.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import _machine
from helpers._checks import one_of, whole_number
from helpers._machine import available_memory_bytes, memory_bytes, usable_cores
from helpers._report import Shown, card, table

if TYPE_CHECKING:
    import torch

__all__ = [
    "Runtime",
    "available_memory_bytes",
    "cache_folder",
    "detect",
    "detect_platform",
    "hub_reachable",
    "memory_bytes",
    "native_dtype",
    "native_dtype_reason",
    "package_version",
    "quiet",
    "start",
    "usable_cores",
]

CACHE_VARIABLE = "HELPERS_CACHE"
DTYPE_VARIABLE = "HELPERS_DTYPE"
# Where RunPod mounts the disk that survives a stop, unless you chose another place there.
POD_VOLUME = Path(os.environ.get("COURSE_VOLUME", "/workspace"))
NOT_INSTALLED = "not installed"


@dataclass(frozen=True, repr=False)
class Runtime(Shown):
    """What was found on this machine; shows itself as a small table."""

    platform: str  # 'colab', 'kaggle', 'runpod' or 'local'
    device: str  # 'cuda' or 'cpu'
    device_name: str
    compute_dtype: torch.dtype  # of matrix products: native on this device
    attention: str  # for transformers: 'sdpa', which runs everywhere
    memory_bytes: int  # of the GPU where there is one, else of the machine
    offline: bool  # the Hugging Face Hub, or the mirror `HF_ENDPOINT` names, did not answer
    profile: str  # 'gpu' or 'cpu'
    dtype_reason: str = ""

    @property
    def warning(self) -> str:
        """What a reader should not overlook and nothing else would say, or ''."""
        if self.device == "cpu" or not self.offline:
            return ""
        return (
            "The Hub did not answer: this card will run the small embedded model, not "
            "the book's. If you have a network, run this cell again."
        )

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) pairs, the content of the table."""
        why = f" ({self.dtype_reason})" if self.dtype_reason else ""
        hub = "not reachable: the embedded model and data are used" if self.offline else "yes"
        packages = ("torch", "transformers", "trl", "peft", "bitsandbytes")
        return [
            ("platform", self.platform),
            ("device", f"{self.device} ({self.device_name})"),
            ("memory", f"{self.memory_bytes / 2**30:.1f} GiB"),
            ("compute dtype", str(self.compute_dtype).removeprefix("torch.") + why),
            ("attention", self.attention),
            ("Hugging Face Hub", hub),
            ("versions", ", ".join(f"{name} {package_version(name)}" for name in packages)),
        ]

    def __str__(self) -> str:
        lines = [f"{label:18} {value}" for label, value in self.rows()]
        return "\n".join([*lines, self.warning] if self.warning else lines)

    def _repr_html_(self) -> str:
        rows = table(self.rows(), row_heads=True)
        return rows + card(self.warning, "bad") if self.warning else rows


def start(seed: int = 42) -> Runtime:
    """First call of every notebook: seed everything, quiet the logs, look around.

    Args:
        seed: for Python, NumPy and torch, from 0 to 2**32 - 1; ValueError or TypeError else.

    Returns:
        What `detect` found; leave the call as the last line of a cell to see its table.

    Example:
        >>> start().profile  # doctest: +SKIP
        'cpu'
    """
    seed = whole_number("seed", seed, least=0, most=2**32 - 1)
    hub_reachable.cache_clear()  # running the cell again asks again
    here = detect()
    quiet()
    import datasets
    from huggingface_hub import constants
    from transformers import set_seed

    from helpers import plots

    # Saves the libraries' own slow attempts. In this process only: what was found out here
    # may be over in a minute, and an exported variable would outlive it in every child.
    constants.HF_HUB_OFFLINE = here.offline
    if "HF_DATASETS_OFFLINE" not in os.environ:  # a copy, made when it was imported
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = here.offline
    set_seed(seed)
    plots.use_style()
    return here


def quiet() -> None:
    """Silence progress bars and notices that would bury the lesson; errors stay loud."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    # bitsandbytes mentions, when imported, that an optional CPU kernel is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # torch notices that a CPU has no pinned memory to offer, at every data loader.
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")
    # trl and peft still use an old name of transformers' internally; nothing to do here.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated.*")


def detect() -> Runtime:
    """Look at this machine and say what the course should use on it.

    Example:
        >>> detect().attention
        'sdpa'
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{usable_cores()} cores"
    return Runtime(
        platform=detect_platform(),
        device=device,
        device_name=name,
        compute_dtype=native_dtype(device),
        dtype_reason=native_dtype_reason(device),
        attention="sdpa",
        memory_bytes=memory_bytes(device),
        offline=not hub_reachable(),
        profile="gpu" if device == "cuda" else "cpu",
    )


def detect_platform() -> str:
    """Where this process runs: 'colab', 'kaggle', 'runpod' or 'local'.

    Example:
        >>> detect_platform() in ("colab", "kaggle", "runpod", "local")
        True
    """
    if os.environ.get("RUNPOD_POD_ID"):
        return "runpod"
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "kaggle"
    try:  # Colab's own package, which nothing else brings
        colab = bool(os.environ.get("COLAB_RELEASE_TAG") or find_spec("google.colab"))
    except (ModuleNotFoundError, ValueError):  # no `google` at all; a half-made module
        colab = False
    return "colab" if colab else "local"


def package_version(name: str) -> str:
    """The installed version of a distribution, or 'not installed'.

    Args:
        name: as pip knows it.

    Example:
        >>> package_version("no-such-package")
        'not installed'
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED


# ── number formats and kernels ───────────────────────────────────────────────────────────
def native_dtype(device: str = "cpu") -> torch.dtype:
    """The dtype matrix products should run in: bfloat16, float16 or float32 (Chapter 2).

    By a rule, so that a machine always gives the same answer: `native_dtype_reason` says
    which. `HELPERS_DTYPE` overrides it; ValueError for a dtype that is unknown there. A T4
    says that it supports bfloat16, and emulates it: asked is whether it is native.

    Args:
        device: 'cpu' or 'cuda'.

    Example:
        >>> native_dtype("cpu").is_floating_point
        True
    """
    return _dtype_and_reason(device)[0]


def native_dtype_reason(device: str = "cpu") -> str:
    """Why `native_dtype` says what it says, in a few words.

    Args:
        device: 'cpu' or 'cuda'.

    Example:
        >>> native_dtype_reason("cpu")  # doctest: +SKIP
        'this processor multiplies bfloat16'
    """
    return _dtype_and_reason(device)[1]


def _dtype_and_reason(device: str) -> tuple[torch.dtype, str]:
    import torch

    one_of("device", device, ("cpu", "cuda"))
    if chosen := os.environ.get(DTYPE_VARIABLE):
        choices = ("float32", "bfloat16", "float16")
        # On a CPU, float16 would want a scaler.
        one_of(f"on {device!r}, {DTYPE_VARIABLE}", chosen, choices[: 3 if device == "cuda" else 2])
        return getattr(torch, chosen), f"{DTYPE_VARIABLE} says so"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "native on this card"
        return torch.float16, "this card only emulates bfloat16"
    instructions, vendor = _machine.processor()
    if "avx512_bf16" in instructions and "AuthenticAMD" in vendor:
        # Measured on two cores: 399 GFLOP/s, and 104 in float32.
        return torch.bfloat16, "AVX-512 BF16 of an AMD processor"
    if "amx_bf16" in instructions:
        # A virtual machine may list AMX and refuse it; without AMX, bfloat16 was slower
        # than float32 on Intel (155 against 260 GFLOP/s, Emerald Rapids).
        return torch.float32, f"to use AMX where it works: {DTYPE_VARIABLE}=bfloat16"
    return torch.float32, "no fast bfloat16 on this processor"


# ── the Hub, the cache ───────────────────────────────────────────────────────────────────
@functools.cache
def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face Hub, or the mirror `HF_ENDPOINT` names, answers; asked once.

    Any answer counts, a refusal included: somebody is there. An answer that only came too
    late is waited for once more, twice as long. `start()` asks anew.

    Args:
        timeout: in seconds.

    Example:
        >>> hub_reachable()  # doctest: +SKIP
        False
    """
    said = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if any(text.upper() in {"1", "ON", "YES", "TRUE"} for text in said):
        return False
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    address = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    for patience in (timeout, 2 * timeout):
        try:
            # Asked the way libraries do, so that a proxy is used where there is one.
            urllib.request.urlopen(f"{address}/robots.txt", timeout=patience).close()
            return True
        except urllib.error.HTTPError:
            return True
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                return True  # the Hub's library knows other certificates than Python
            if not isinstance(reason, TimeoutError):
                return False
    return False


def cache_folder() -> Path:
    """The folder for what is worth keeping between runs; created when missing.

    `HELPERS_CACHE` if set; on a pod its volume, which survives a stop; else the user's
    cache folder of the platform. OSError names the folder and the variable.

    Example:
        >>> cache_folder().name  # doctest: +SKIP
        'fine-tuning-course'
    """
    import platformdirs

    if chosen := os.environ.get(CACHE_VARIABLE):
        folder = Path(chosen).expanduser()
    elif detect_platform() == "runpod" and POD_VOLUME.is_dir():
        folder = POD_VOLUME / ".cache" / "fine-tuning-course"
    else:
        folder = Path(platformdirs.user_cache_dir("fine-tuning-course"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The cache folder {folder} cannot be created ({error.strerror}). "
            f"Set the variable {CACHE_VARIABLE} to a folder you can write to."
        ) from error
    return folder
