"""Look inside a GGUF file, with the gguf library (Chapter 6; public as `gguf.inspect`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers._report import Shown, card, shorten, table

if TYPE_CHECKING:
    import pandas as pd

SUPER_BLOCK = 256  # weights that the K types quantize together


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
        """Matrices of a K type's file whose rows do not divide into super-blocks of 256.

        llama.cpp stores them in another, larger type of blocks of 32.
        """
        odd = self.tensors["row"] % SUPER_BLOCK != 0
        quantized = ~self.tensors["type"].isin(["F32", "F16", "BF16"])
        return self.tensors[odd & quantized & ("_K" in self.kind)]

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
        reader = gguf.GGUFReader(path)
        tensors = pd.DataFrame(map(_tensor, reader.tensors)).set_index("name")
        metadata = {name: _value(f) for name, f in reader.fields.items() if f.types}
        kind = gguf.LlamaFileType(metadata.get("general.file_type", 1024)).name
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(
            f"path={str(path)!r} is cut short or damaged ({path.stat().st_size:,} bytes; "
            f"{type(error).__name__}: {error}). Convert or download it again"
        ) from error
    return GGUFFile(path, kind.removeprefix("MOSTLY_").removeprefix("ALL_"), metadata, tensors)


def _tensor(tensor: Any) -> dict[str, Any]:
    weights, size = int(tensor.n_elements), int(tensor.n_bytes)
    return {
        "name": tensor.name,
        "shape": tuple(int(n) for n in reversed(tensor.shape)),
        "row": int(tensor.shape[0]),
        "type": tensor.tensor_type.name,
        "weights": weights,
        "bytes": size,
        "bits per weight": 8 * size / weights,
    }


def _value(entry: Any) -> Any:
    return entry.contents() if len(entry.data) <= 12 else f"{len(entry.data):,} values"
