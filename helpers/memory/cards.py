"""The cards people rent or own, and what a card's generation decides (Chapter 5).

One table, cards.csv: the memory that torch reports, and the compute capability, from which the
rest follows: the 16-bit type, the attention kernels PyTorch has there, cuBLAS's workspace. Read
beside: PyTorch's aten/native/transformers/cuda/sdp_utils.cpp and
aten/cuda/CublasHandlePool.cpp.

`mib` is `torch.cuda.get_device_properties(0).total_memory`, less than the box says: the driver
keeps some, and error correction more (the RTX 6000 Ada is without it; with it 45,500). Every
figure was printed by torch on such a card and published (issues, training logs); of several the
newest or smallest, because newer drivers keep more: older ones left a T4 15,102 and an A100
81,251. `processors` and the `threads` each holds at once stand at one card of each capability.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from importlib import resources

Capability = tuple[int, int]  # (major, minor)
AMPERE = (8, 0)  # the compute capability assumed where no card is named


@dataclass(frozen=True)
class Card:
    """A graphics card; make your own for one that is not in the table.

    Args:
        name: what reports call it.
        memory: bytes, torch's `total_memory`.
        capability: (major, minor).

    Example:
        >>> Card("my card", 12 * 2**30, (8, 6)).capability
        (8, 6)
    """

    name: str
    memory: int
    capability: Capability

    def __str__(self) -> str:
        return self.name


CARDS: dict[str, Card] = {}
_PROCESSORS: dict[Capability, tuple[int, int]] = {}
_TABLE = resources.files("helpers.memory").joinpath("cards.csv").read_text("utf-8")
for _row in csv.DictReader(_TABLE.splitlines()):
    _major, _minor = map(int, _row["capability"].split("."))
    CARDS[_row["name"]] = Card(_row["name"], int(_row["mib"]) * 2**20, (_major, _minor))
    if _row["processors"]:
        _PROCESSORS[_major, _minor] = int(_row["processors"]), int(_row["threads"])
GPUS = {name: card.memory for name, card in CARDS.items()}

# What `torch.cuda.get_device_name()` adds to a name without changing which card it is.
_DECORATION = {"nvidia", "tesla", "geforce", "generation", "pcie"}


def _key(name: str) -> str:
    words = [w for w in re.split(r"[^a-z0-9]+", name.lower()) if w not in _DECORATION]
    key = "".join(w for w in words if not re.fullmatch(r"sxm\d?|hbm\d?e?", w))
    return re.sub(r"gi?b$", "", key).removeprefix("rtx")


def find_card(gpu: object) -> Card | None:
    """The Card that `gpu` names, or None (Chapter 5).

    Args:
        gpu: a Card or a name, loosely ('4090', 'h100', 'NVIDIA A100-SXM4-80GB').

    Raises:
        ValueError: the name fits several cards ('A100').

    Example:
        >>> print(find_card("NVIDIA GeForce RTX 4090"))
        RTX 4090
    """
    if isinstance(gpu, Card):
        return gpu
    if not isinstance(gpu, str):
        return None
    wanted = _key(gpu)
    keys = {_key(card.name): card for card in CARDS.values()}
    found = [card for key, card in keys.items() if wanted == key]
    if not found:  # without its size: 'H100' is one card, 'A100' is two
        found = [c for key, c in keys.items() if key[4:].isdigit() and wanted == key[:4]]
    if len(found) > 1:
        raise ValueError(f"gpu={gpu!r} may be {' or '.join(map(str, found))}: say which")
    return found[0] if found else None


def parse_size(gpu: Card | str | float) -> int:
    """Bytes of a card or of a size (Chapter 5).

    Args:
        gpu: a Card, its name as `find_card` takes it, '16GiB', '24GB', or a number of bytes.

    Raises:
        ValueError: a name in no table, or of two cards.
        TypeError: another type.

    Example:
        >>> parse_size("16 GiB") == 16 * 2**30
        True
    """
    if card := find_card(gpu):
        return card.memory
    if isinstance(gpu, bool) or not isinstance(gpu, int | float | str):
        raise TypeError(f"gpu must be a card's name, a size like '16GiB', or bytes, not {gpu!r}")
    if not isinstance(gpu, str):
        return int(gpu)
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", gpu.lower())
    if not found or not found[1].strip("."):
        raise ValueError(
            f"gpu={gpu!r} is neither a size like '16GiB' nor one of {', '.join(CARDS)}; for "
            "the card in this machine pass memory.cards.of_this_machine()"
        )
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def of_this_machine(device: object = None) -> Card:
    """The Card in this machine, with its own name, memory and capability (Chapter 5).

    Args:
        device: as torch takes it; None: the current one.

    Raises:
        RuntimeError: without CUDA.

    Example:
        >>> memory.find_largest("phi-3-mini", of_this_machine(), lora=8)  # doctest: +SKIP
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA card in this machine; name one, as in gpu='T4'")
    chosen: int = torch.cuda.current_device() if device is None else device  # type: ignore[assignment]
    found = torch.cuda.get_device_properties(chosen)
    return Card(found.name, found.total_memory, (found.major, found.minor))


# ------------------------------------------------------------------ what a capability decides
def half_dtype(capability: Capability) -> str:
    """The 16-bit type cards of this capability compute in: 'bfloat16' from 8.0 on.

    Example:
        >>> half_dtype((7, 5))
        'float16'
    """
    return "bfloat16" if capability >= AMPERE else "float16"


def processors(capability: Capability) -> tuple[int, int]:
    """(multiprocessors, threads each holds at once) of one card; its relatives may differ.

    Example:
        >>> processors((8, 0))
        (108, 2048)
    """
    known = [one for one in _PROCESSORS if one <= capability] or [min(_PROCESSORS)]
    return _PROCESSORS[max(known)]


def cublas_workspace(capability: Capability) -> int:
    """Bytes of one cuBLAS workspace: measured on an H100 (9.0), the others from the source.

    CUBLAS_WORKSPACE_CONFIG in the environment would change it.

    Example:
        >>> cublas_workspace((9, 0)) / 2**20
        32.0
    """
    return 32 * 2**20 if capability[0] in (9, 10, 12) else 8_519_680
