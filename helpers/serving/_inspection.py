"""Look inside a GGUF file (Chapter 6; public as `gguf.inspect`)."""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers._report import Shown, card, shorten, table

if TYPE_CHECKING:
    import pandas as pd

SUPER_BLOCK = 256  # weights that the K types quantize together
FEW = 12  # a longer list is told by its length
STRING, ARRAY = 8, 9
NEWER, KINDS = {42: ("Q2_0", 64, 18)}, {41: "Q2_0"}  # numbers that PyPI's `gguf` has no name for
FORMS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))  # GGUF's numbers


@dataclass(frozen=True, repr=False)
class GGUFFile(Shown):
    """What a GGUF file holds.

    Attributes:
        path: where it lies.
        kind: its file type, such as 'F16' or 'Q4_K_M'.
        metadata: {key: value}, long lists as their length.
        tensors: shape, row, type, weights, bytes and bits per weight of each, by name.
    """

    path: Path
    kind: str
    metadata: dict[str, Any]
    tensors: pd.DataFrame

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    @property
    def bits_per_weight(self) -> float:
        """Bits really used per weight, over all tensors."""
        return float(8 * self.tensors["bytes"].sum() / self.tensors["weights"].sum())

    @property
    def types(self) -> dict[str, int]:
        """{tensor type: number of tensors}, most frequent first."""
        return dict(Counter(self.tensors["type"]).most_common())

    @property
    def fallback_tensors(self) -> pd.DataFrame:
        """Matrices of a K or IQ type's file whose rows do not divide into super-blocks of 256.

        llama.cpp stores them in another, larger type of blocks of 32.
        """
        odd = self.tensors["row"] % SUPER_BLOCK != 0
        quantized = ~self.tensors["type"].isin(["F32", "F16", "BF16"])
        super_blocks = ("_K" in self.kind or "IQ" in self.kind) and self.kind != "IQ4_NL"
        return self.tensors[odd & quantized & super_blocks]

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.types.items())
        text = (
            f"{self.path.name}: {self.kind}, {self.bytes / 1e6:.1f} MB, "
            f"{self.bits_per_weight:.2f} bits per weight\n"
            f"{len(self.tensors)} tensors: {types}"
        )
        if fell := len(self.fallback_tensors):
            text += f"\n{fell} fell back: their rows are no multiple of {SUPER_BLOCK} weights"
        return text

    def _repr_html_(self) -> str:
        rows = [(key, shorten(value)) for key, value in self.metadata.items()]
        return card(str(self)) + table(rows, row_heads=True)


def inspect(path: str | Path) -> GGUFFile:
    """Read the metadata and the list of tensors of the GGUF file at `path`.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: for a file that is no GGUF, is cut short, or is damaged.

    Example:
        >>> inspect("model-f16.gguf").bits_per_weight  # doctest: +SKIP
        16.0
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
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, rows = _head(data)
            tensors = pd.DataFrame(rows).set_index("name")
            if (number := metadata.get("general.file_type")) is None:  # an adapter, an imatrix
                kind = tensors["type"].mode()[0]
            else:
                kind = KINDS.get(number) or gguf.LlamaFileType(number).name
        except (ValueError, LookupError, ArithmeticError, TypeError, struct.error) as error:
            raise ValueError(
                f"path={str(path)!r} is cut short or damaged ({path.stat().st_size:,} bytes; "
                f"{type(error).__name__}: {error}). Convert or download it again"
            ) from error
    return GGUFFile(path, kind.removeprefix("MOSTLY_").removeprefix("ALL_"), metadata, tensors)


class _Cursor:
    """Reads one value after the other; gguf's own reader takes seconds for a tokenizer."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def skip(self, size: int) -> int:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"{self.at:,} bytes are wanted")
        return start

    def number(self, form: str) -> Any:
        start = self.skip(struct.calcsize(form))
        return struct.unpack_from(f"<{form}", self.data, start)[0]

    def text(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        return self.data[start : start + size].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(FORMS[kind])
        kind, count = self.number("I"), self.number("Q")
        if count <= FEW:
            return [self.value(kind) for _ in range(count)]
        if kind in FORMS:
            self.skip(count * struct.calcsize(FORMS[kind]))
        else:
            for _ in range(count):
                self.skip(self.number("Q"))
        return f"{count:,} values"


def _kind(number: int) -> tuple[str, int, int]:
    """The name of a tensor type, its weights per block and its bytes per block."""
    import gguf

    kind = gguf.GGMLQuantizationType(number)
    return kind.name, *gguf.GGML_QUANT_SIZES[kind]


def _head(data: mmap.mmap) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metadata, and a row for each tensor; raises where the data end too soon."""
    read = _Cursor(data)
    version, tensors, pairs = read.number("I"), read.number("Q"), read.number("Q")
    if version not in (2, 3):
        raise ValueError(f"version {version} of the format")
    metadata = {"GGUF.version": version, "GGUF.tensor_count": tensors, "GGUF.kv_count": pairs}
    for _ in range(pairs):
        key = read.text()
        metadata[key] = read.value(read.number("I"))
    rows = []
    for _ in range(tensors):
        name = read.text()
        shape = [read.number("Q") for _ in range(read.number("I"))]
        number, offset, weights = read.number("I"), read.number("Q"), math.prod(shape)
        kind, block, size = NEWER.get(number) or _kind(number)
        row = {"name": name, "shape": tuple(reversed(shape)), "row": shape[0], "type": kind}
        row |= {"weights": weights, "bytes": weights // block * size, "offset": offset}
        rows.append(row | {"bits per weight": 8 * size / block})
    align = metadata.get("general.alignment", 32)
    read.skip(-read.at % align)
    read.skip(max((row["offset"] + row["bytes"] for row in rows), default=0))
    for row in rows:
        del row["offset"]
    return metadata, rows
