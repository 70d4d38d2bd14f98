"""The cards people rent or own, and what a card's generation decides (Chapter 5).

One table: memory as torch reports it, and the compute capability, from which the rest
follows: the 16-bit type, the attention kernels PyTorch has there, cuBLAS's workspace. Read
beside: PyTorch's aten/native/transformers/cuda/sdp_utils.cpp and
aten/cuda/CublasHandlePool.cpp.
"""

import re
from dataclasses import dataclass

AMPERE = (8, 0)  # the compute capability assumed where no card is named


@dataclass(frozen=True)
class Card:
    """A graphics card.

    memory: bytes, torch's `total_memory`. capability: (major, minor). Make your own for a
    card that is not in the table, or ask `of_this_machine()`.
    """

    name: str
    memory: int
    capability: tuple

    def __str__(self):
        return self.name


# MiB of `torch.cuda.get_device_properties(0).total_memory`, less than the box says: the
# driver keeps some, and error correction more. Every figure was printed by torch on such a
# card and published (issues, training logs); of several the newest or smallest, because
# newer drivers keep more: older ones left a T4 15,102 and an A100 81,251.
_TABLE = [
    ("T4", 14_913, (7, 5)),
    ("RTX 3060", 11_931, (8, 6)),
    ("L4", 22_563, (8, 9)),
    ("A10G", 22_587, (8, 6)),
    ("RTX 3090", 24_124, (8, 6)),
    ("RTX 4090", 24_081, (8, 9)),
    ("RTX 5090", 32_102, (12, 0)),
    ("A40", 45_416, (8, 6)),
    ("L40S", 45_495, (8, 9)),
    ("RTX 6000 Ada", 48_520, (8, 9)),  # without error correction; with it 45,500
    ("A100 40GB", 40_441, (8, 0)),
    ("A100 80GB", 81_153, (8, 0)),
    ("H100 80GB", 81_008, (9, 0)),
    ("H200", 143_156, (9, 0)),
    ("B200", 182_631, (10, 0)),
]
CARDS = {name: Card(name, mib * 2**20, cc) for name, mib, cc in _TABLE}

# (multiprocessors, threads each holds at once) of one card of each capability: T4, A100,
# RTX 3090, RTX 4090, H100, B200, RTX 5090. Its relatives may have half as many or more.
_PROCESSORS = {
    (7, 5): (40, 1024), (8, 0): (108, 2048), (8, 6): (82, 1536), (8, 9): (128, 1536),
    (9, 0): (132, 2048), (10, 0): (148, 2048), (12, 0): (170, 1536),
}  # fmt: skip

# What `torch.cuda.get_device_name()` adds to a name without changing which card it is.
_DECORATION = {"nvidia", "tesla", "geforce", "generation", "pcie"}


def _key(name):
    words = re.split(r"[^a-z0-9]+", name.lower())
    words = [w for w in words if w not in _DECORATION]
    key = "".join(w for w in words if not re.fullmatch(r"sxm\d?|hbm\d?e?", w))
    return re.sub(r"gi?b$", "", key).removeprefix("rtx")


def find_card(gpu):
    """The Card that `gpu` names, or None (Chapter 5).

    gpu: a Card or a name, loosely ('4090', 'h100', 'NVIDIA A100-SXM4-80GB'). Raises
    ValueError when the name fits several cards ('A100').
    """
    if isinstance(gpu, Card):
        return gpu
    if not isinstance(gpu, str):
        return None
    wanted = _key(gpu)
    keys = {_key(card.name): card for card in CARDS.values()}
    found = [card for key, card in keys.items() if wanted == key]
    if not found:  # without its size: 'H100' is one card, 'A100' is two
        sized = [(key[:4], card) for key, card in keys.items() if key[4:].isdigit()]
        found = [card for family, card in sized if wanted == family]
    if len(found) > 1:
        raise ValueError(f"gpu={gpu!r} may be {' or '.join(map(str, found))}: say which")
    return found[0] if found else None


def of_this_machine(device=None):
    """The Card in this machine, with its own name, memory and capability (Chapter 5).

    device: as torch takes it; None is the current one. Raises RuntimeError without CUDA.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA card in this machine; name one, as in gpu='T4'")
    found = torch.cuda.get_device_properties(
        torch.cuda.current_device() if device is None else device
    )
    return Card(found.name, found.total_memory, (found.major, found.minor))


def half_dtype(capability):
    """The 16-bit type cards of this capability compute in: 'bfloat16' from 8.0 on."""
    return "bfloat16" if capability >= AMPERE else "float16"


def processors(capability):
    """(multiprocessors, threads each holds at once) of one card of this capability."""
    known = [one for one in _PROCESSORS if one <= capability] or [min(_PROCESSORS)]
    return _PROCESSORS[max(known)]


def attention_kernels(capability, dtype):
    """PyTorch's SDPA kernels for queries of `dtype` ('float16', …), in order of preference.

    Flash attention needs 8.0 and 16 bits; below 8.0 the memory-efficient kernel takes no
    bfloat16. cuDNN's, which PyTorch prefers on 9.x and 10.x, is counted as flash (on an
    H100 it took 1 to 2 % more while it ran), and with a mask as the efficient kernel.
    """
    modern = capability >= AMPERE
    kernels = ["flash"] if modern and dtype != "float32" else []
    if modern or dtype != "bfloat16":
        kernels.append("efficient")
    return (*kernels, "math")


def cublas_workspace(capability):
    """Bytes of one cuBLAS workspace, without CUBLAS_WORKSPACE_CONFIG in the environment.

    Measured on an H100 (9.0); the others from the source.
    """
    return 32 * 2**20 if capability[0] in (9, 10, 12) else 8_519_680
