"""Files and folders that are written whole or not at all (used everywhere)."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to; it becomes `path` at the end.

    When the block raises or the process dies, `path` stays as it was. Raises
    ValueError before anything is done where `path` exists and overwrite is off.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with atomic_path(out) as partial:
        ...     _ = partial.write_text("1 2 3")
        >>> out.read_text()
        '1 2 3'
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise ValueError(f"{path} exists: pass overwrite=True to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    partial = room / path.name
    try:
        yield partial
        if path.is_dir():  # a rename replaces files and empty folders only
            os.replace(path, room / "before")
        os.replace(partial, path)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def make_once(
    folder: Path, make: Callable[[Path], None], complete: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """`folder`, made by `make(partial)` where it is not complete; whoever comes second waits.

    `make` gets a path to create the folder at. What a killed process left is cleared away.
    """
    from filelock import FileLock

    if not complete(folder):
        with FileLock(f"{folder}.lock"):  # the system frees it when a process dies
            if not complete(folder):
                for leftover in folder.parent.glob(f".{folder.name}.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                with atomic_path(folder) as partial:
                    make(partial)
    return folder


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a text (as UTF-8) or bytes in one step: a reader sees the old or the new file."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
