"""Where am I, and what can this machine do? (all chapters)

`runtime.start()` is the first call of every notebook: seeds, quiet logs, one small table.
The *profile* it reports ('cpu' or 'gpu') decides model and sizes, never the lesson.
"""

import functools
import logging
import os
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

# bitsandbytes mentions, when imported, that an optional CPU kernel is not installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

CACHE_VARIABLE = "HELPERS_CACHE"
# Where RunPod mounts the disk that survives a stop, unless you chose another place there.
POD_VOLUME = Path(os.environ.get("COURSE_VOLUME", "/workspace"))
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Runtime:
    """What was found on this machine; shows itself as a small table.

    platform: 'colab', 'runpod' or 'local'. device: 'cuda' or 'cpu'.
    compute_dtype: the torch dtype matrix products should run in, native on this device.
    attention: the kernel to ask transformers for ('flash_attention_2' or 'sdpa').
    memory_bytes: of the GPU where there is one, else of the machine.
    offline: True when the Hugging Face Hub cannot be reached.
    profile: 'gpu' or 'cpu'.
    """

    platform: str
    device: str
    device_name: str
    compute_dtype: object
    attention: str
    memory_bytes: int
    offline: bool
    profile: str

    def rows(self):
        """(label, value) pairs, the content of the table."""
        hub = (
            "not reachable: the embedded model and data are used" if self.offline else "yes"
        )
        packages = ("torch", "transformers", "trl", "peft", "bitsandbytes")
        return [
            ("platform", self.platform),
            ("device", f"{self.device} ({self.device_name})"),
            ("memory", f"{self.memory_bytes / 2**30:.1f} GiB"),
            ("compute dtype", str(self.compute_dtype).removeprefix("torch.")),
            ("attention", self.attention),
            ("Hugging Face Hub", hub),
            ("versions", ", ".join(f"{name} {package_version(name)}" for name in packages)),
        ]

    def __str__(self):
        return "\n".join(f"{label:18} {value}" for label, value in self.rows())

    def _repr_html_(self):
        cells = "".join(
            f"<tr><th style='text-align:left'>{label}</th>"
            f"<td style='text-align:left'>{value}</td></tr>"
            for label, value in self.rows()
        )
        return f"<table>{cells}</table>"


def package_version(name):
    """The installed version of a distribution, or 'not installed'."""
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED


def start(seed=42):
    """First call of every notebook: seed everything, quiet the logs, look around.

    seed: int for Python, NumPy and torch. Returns the `Runtime` of `detect()`; leave the
    call as the last line of a cell to see its table.
    """
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an int such as 42, not {seed!r}")
    runtime = detect()
    if runtime.offline:
        # Saves the libraries' own slow attempts; a variable you set yourself is kept.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        _hub_constants_offline()
    quiet()
    from transformers import set_seed

    set_seed(seed)
    from helpers import plots

    plots.use_style()
    return runtime


def _hub_constants_offline():
    # huggingface_hub reads the variable once, at import.
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True


def quiet():
    """Silence progress bars and notices that would bury the lesson; errors stay loud."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # torch notices that a CPU has no pinned memory to offer, at every data loader.
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")
    # trl and peft still use an old name of transformers' internally; nothing to do here.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated.*")


def detect():
    """Look at this machine and say what the course should use on it, as a `Runtime`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Runtime(
        platform=detect_platform(),
        device=device,
        device_name=_device_name(device),
        compute_dtype=native_dtype(device),
        attention=_attention(device),
        memory_bytes=_memory_bytes(device),
        offline=not hub_reachable(),
        profile="gpu" if device == "cuda" else "cpu",
    )


def detect_platform():
    """Where this process runs: 'colab', 'runpod' or 'local'."""
    if os.environ.get("RUNPOD_POD_ID"):
        return "runpod"
    return "colab" if os.environ.get("COLAB_RELEASE_TAG") or _has_colab() else "local"


def _has_colab():
    # Colab's own package, which nothing else brings.
    try:
        return find_spec("google.colab") is not None
    except (ModuleNotFoundError, ValueError):  # no `google` at all; a half-made module
        return False


def _device_name(device):
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores"


def native_dtype(device="cpu"):
    """The fastest dtype the hardware multiplies *natively*: bfloat16, float16 or float32.

    A T4 answers "yes" when asked whether bfloat16 is supported, because it is emulated;
    the honest question excludes emulation. A CPU may have bfloat16 instructions and still
    be faster in float32: a short race decides (Chapters 2 and 5).
    """
    import torch

    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device != "cpu":
        raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if not any(getattr(torch.cpu, probe, bool)() for probe in probes):
        return torch.float32
    return torch.bfloat16 if bfloat16_speedup() > 1.25 else torch.float32


@functools.cache
def bfloat16_speedup():
    """How many times faster than float32 this CPU multiplies in bfloat16 (raced once).

    The best of several turns each, on matrices of the embedded model's size.
    """
    import torch

    matrices = {
        dtype: (torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(matrices, float("inf"))
    for _ in range(8):
        for dtype, (inputs, weight) in matrices.items():
            start = time.perf_counter()
            torch.nn.functional.linear(inputs, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def _attention(device):
    if device == "cuda" and find_spec("flash_attn") is not None:
        import torch

        if torch.cuda.get_device_capability() >= (8, 0):
            return "flash_attention_2"
    return "sdpa"


def _memory_bytes(device):
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    import psutil

    limits = [psutil.virtual_memory().total]
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may own less than the machine
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)


@functools.cache
def hub_reachable(timeout=2.0):
    """True when the Hugging Face Hub answers within `timeout` seconds (asked once)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return _hub_answers(timeout)
    try:
        socket.create_connection(("huggingface.co", 443), timeout).close()
    except OSError:
        return False
    return True


def _hub_answers(timeout):
    # Behind a proxy a plain socket says nothing: ask for a page the way libraries do.
    import urllib.request

    try:
        urllib.request.urlopen("https://huggingface.co/robots.txt", timeout=timeout).close()
    except OSError:
        return False
    return True


def cache_folder():
    """The folder for what is worth keeping between runs; created when missing.

    `HELPERS_CACHE` if set; a pod's volume (it survives a stop) on RunPod; else the
    platform's cache folder of the user. Raises OSError naming the folder and the variable
    when it cannot be written.
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
