"""Where am I, and what can this machine do? (all chapters)

`runtime.start()` is the first call of every notebook: seeds, quiet logs, one small table.
The *profile* it reports ('cpu' or 'gpu') decides model and sizes, never the lesson.
"""

import functools
import logging
import os
import platform as machine
import re
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

# bitsandbytes mentions, when imported, that an optional CPU kernel is not installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

CACHE_VARIABLE = "HELPERS_CACHE"
DTYPE_VARIABLE = "HELPERS_DTYPE"
DTYPES = ("float32", "bfloat16", "float16")
# Where RunPod mounts the disk that survives a stop, unless you chose another place there.
POD_VOLUME = Path(os.environ.get("COURSE_VOLUME", "/workspace"))
NOT_INSTALLED = "not installed"
CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may use


@dataclass(frozen=True)
class Runtime:
    """What was found on this machine; shows itself as a small table.

    platform: 'colab', 'kaggle', 'runpod' or 'local'. device: 'cuda' or 'cpu'.
    compute_dtype: the torch dtype matrix products should run in, native on this device;
    dtype_reason: why that one.
    attention: the kernel to ask transformers for: 'sdpa', which runs everywhere.
    memory_bytes: of the GPU where there is one, else of the machine.
    offline: True when the Hugging Face Hub (or the mirror `HF_ENDPOINT` names) did not
    answer.
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
    dtype_reason: str = ""

    @property
    def warning(self):
        """What a reader should not overlook, or ''.

        A card without the Hub trains the small model, and nothing else would say so.
        """
        if self.device == "cpu" or not self.offline:
            return ""
        return (
            "The Hub did not answer: this card will run the small embedded model, not "
            "the book's. If you have a network, run this cell again."
        )

    def rows(self):
        """(label, value) pairs, the content of the table."""
        hub = "not reachable: the embedded model and data are used" if self.offline else "yes"
        dtype = str(self.compute_dtype).removeprefix("torch.")
        why = f" ({self.dtype_reason})" if self.dtype_reason else ""
        packages = ("torch", "transformers", "trl", "peft", "bitsandbytes")
        return [
            ("platform", self.platform),
            ("device", f"{self.device} ({self.device_name})"),
            ("memory", f"{self.memory_bytes / 2**30:.1f} GiB"),
            ("compute dtype", dtype + why),
            ("attention", self.attention),
            ("Hugging Face Hub", hub),
            ("versions", ", ".join(f"{name} {package_version(name)}" for name in packages)),
        ]

    def __str__(self):
        lines = [f"{label:18} {value}" for label, value in self.rows()]
        return "\n".join([*lines, self.warning] if self.warning else lines)

    def _repr_html_(self):
        cells = "".join(
            f"<tr><th style='text-align:left'>{label}</th>"
            f"<td style='text-align:left'>{value}</td></tr>"
            for label, value in self.rows()
        )
        loud = "<p style='color:#b00020'><b>{}</b></p>"
        return f"<table>{cells}</table>{loud.format(self.warning) if self.warning else ''}"


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
    hub_reachable.cache_clear()  # running the cell again asks again
    runtime = detect()
    _tell_the_libraries(runtime.offline)
    quiet()
    from transformers import set_seed

    set_seed(seed)
    from helpers import plots

    plots.use_style()
    return runtime


def _tell_the_libraries(offline):
    # Saves the libraries' own slow attempts. In this process only: what was found out here
    # may be over in a minute, and an exported variable would outlive it in every child.
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    if "HF_DATASETS_OFFLINE" not in os.environ:  # a copy, made when it was imported
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = offline


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
        dtype_reason=native_dtype_reason(device),
        attention="sdpa",
        memory_bytes=_memory_bytes(device),
        offline=not hub_reachable(),
        profile="gpu" if device == "cuda" else "cpu",
    )


def detect_platform():
    """Where this process runs: 'colab', 'kaggle', 'runpod' or 'local'."""
    if os.environ.get("RUNPOD_POD_ID"):
        return "runpod"
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "kaggle"
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
    return f"{usable_cores()} cores"


def native_dtype(device="cpu"):
    """The dtype matrix products should run in: bfloat16, float16 or float32 (Chapter 2).

    By a rule, so that a machine always gives the same answer: `native_dtype_reason` says
    which. `HELPERS_DTYPE` overrides it. A T4 answers "yes" when asked whether bfloat16 is
    supported, because it is emulated; the honest question excludes emulation. Raises
    ValueError for another device and for an unknown dtype in the variable.
    """
    return _dtype_and_reason(device)[0]


def native_dtype_reason(device="cpu"):
    """Why `native_dtype` says what it says, in a few words."""
    return _dtype_and_reason(device)[1]


def _dtype_and_reason(device):
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")
    if chosen := os.environ.get(DTYPE_VARIABLE):
        choices = DTYPES if device == "cuda" else DTYPES[:2]  # float16 wants a scaler
        if chosen not in choices:
            raise ValueError(
                f"{DTYPE_VARIABLE} must be one of {', '.join(choices)} on {device!r}, not "
                f"{chosen!r}"
            )
        return getattr(torch, chosen), f"{DTYPE_VARIABLE} says so"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "native on this card"
        return torch.float16, "this card only emulates bfloat16"
    instructions, vendor = _processor()
    if "avx512_bf16" in instructions and "AuthenticAMD" in vendor:
        # Measured on two cores: 399 GFLOP/s, and 104 in float32.
        return torch.bfloat16, "AVX-512 BF16 of an AMD processor"
    if "amx_bf16" in instructions:
        # A virtual machine may list AMX and refuse it; without AMX, bfloat16 was slower
        # than float32 on Intel (155 against 260 GFLOP/s, Emerald Rapids).
        return torch.float32, f"to use AMX where it works: {DTYPE_VARIABLE}=bfloat16"
    return torch.float32, "no fast bfloat16 on this processor"


def _processor():
    """(instruction sets, vendor) of the CPU as the system lists them."""
    info = Path("/proc/cpuinfo")  # Linux
    if not info.is_file():
        return set(), machine.processor()
    text = info.read_text(encoding="utf-8", errors="replace")
    found = {
        key: match[1] if (match := re.search(rf"(?m)^{key}\s*:\s*(.*)$", text)) else ""
        for key in ("flags", "vendor_id")
    }
    return set(found["flags"].split()), found["vendor_id"]


def flash_attention_problem():
    """None where flash attention 2 can run, else why not, as a sentence (Chapter 5).

    It needs a card of compute capability 8.0 or newer and a flash-attn that was built for
    the torch at hand: one that is merely installed may fail when it is loaded.
    """
    import torch

    if not torch.cuda.is_available():
        return "flash attention 2 needs a CUDA card, and there is none here"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return (
            "flash attention 2 needs compute capability 8.0 (Ampere) or newer, and this "
            f"card has {capability[0]}.{capability[1]}"
        )
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        import flash_attn  # noqa: F401
    except Exception as error:
        return (
            f"flash-attn is installed and cannot be loaded ({error}); was it built for "
            f"torch {torch.__version__}?"
        )
    return None


# ── what this process may use ────────────────────────────────────────────────────────────
def _memory_bytes(device):
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    import psutil

    limit, _ = _container_memory()
    return min(psutil.virtual_memory().total, limit)


def available_memory_bytes():
    """Bytes of memory this process may still take.

    What the system has free, and in a container no more than is left of its limit.
    """
    import psutil

    limit, used = _container_memory()
    return int(max(0, min(psutil.virtual_memory().available, limit - used)))


def _container_memory():
    """(limit, in use) in bytes of the control group, version 2 or 1; no limit: infinite."""
    for folder, limit, used, cached in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
         "total_inactive_file"),
    ):  # fmt: skip
        text = _text(folder / limit)
        if text.isdigit() and int(text) < 2**60:  # version 1 says "none" by a huge number
            in_use = int(_text(folder / used) or 0)
            # Pages of files count as used and are given up on demand.
            spare = re.search(rf"(?m)^{cached} (\d+)", _text(folder / "memory.stat"))
            return int(text), max(0, in_use - int(spare[1] if spare else 0))
    return float("inf"), 0


def usable_cores():
    """Number of CPU cores this process may use, at least 1.

    A container of 8 cores on a machine of 128 shows all 128 to `os.cpu_count`.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    quota, _, period = _text(CGROUP / "cpu.max").partition(" ")
    if not period:  # version 1
        quota = _text(CGROUP / "cpu" / "cpu.cfs_quota_us")
        period = _text(CGROUP / "cpu" / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def _text(path):
    try:
        return path.read_text().strip()
    except OSError:  # not Linux, or the other version of control groups
        return ""


# ── the Hub ──────────────────────────────────────────────────────────────────────────────
@functools.cache
def hub_reachable(timeout=3.0):
    """True when the Hugging Face Hub answers within `timeout` seconds; asked once.

    `HF_ENDPOINT` names a mirror, which is asked instead. Any answer counts, a refusal
    included: somebody is there. An answer that only came too late is waited for once more,
    twice as long. `start()` asks anew.
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
