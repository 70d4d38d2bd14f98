"""Find the course's notebooks, and run them with progress (all chapters).

`python -m helpers run Chapter0` executes in a fresh kernel and writes the executed copy
under `outputs/`. What keeps the stored ones clean is in `tests/house.py`.
"""

from __future__ import annotations

import asyncio
import atexit
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import _files, _machine
from helpers.course import places

if TYPE_CHECKING:
    from nbclient import NotebookClient
    from nbformat import NotebookNode

CHAPTERS = (*(f"Chapter{number}" for number in range(7)), "AppendixB")
CELL_SECONDS = 1800


class NotebookError(RuntimeError):
    """The notebooks are not here, or one did not run to its end; the message says why."""


def root() -> Path:
    """The folder of the course, where the notebooks lie; NotebookError where it is not.

    Example:
        >>> root().joinpath("README.md").is_file()
        True
    """
    folder = places.repository_folder()
    if folder is None:
        raise NotebookError(
            "This needs the course's repository, and `helpers` was installed without it: "
            f"git clone https://github.com/{places.address()} fine-tuning-course"
        )
    return folder


def written() -> list[str]:
    """The names of the notebooks that exist, in the course's order.

    Example:
        >>> written()[0]
        'Chapter0'
    """
    return [chapter for chapter in CHAPTERS if (root() / f"{chapter}.ipynb").is_file()]


def find(name: str) -> Path:
    """The path of a chapter's notebook.

    Args:
        name: 'Chapter0', 'chapter0.ipynb', '0', 'AppendixB' or 'B'.

    Raises:
        ValueError: there is none of that name.

    Example:
        >>> find("b").name
        'AppendixB.ipynb'
    """
    wanted = name.removesuffix(".ipynb").lower()
    for chapter in written():
        full = chapter.lower()
        if wanted in (full, full.removeprefix("chapter").removeprefix("appendix")):
            return root() / f"{chapter}.ipynb"
    raise ValueError(f"name must be one of {', '.join(written())}, not {name!r}")


def output_folder(path: Path) -> Path:
    """`outputs/chapterN/` of a notebook, created when missing.

    Args:
        path: of the notebook.

    Example:
        >>> output_folder(find("B")).name  # doctest: +SKIP
        'appendixb'
    """
    folder = root() / "outputs" / path.stem.lower()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(name: str, *, progress: bool = True) -> Path:
    """Execute a notebook top to bottom in a fresh kernel.

    Args:
        name: as in `find`.
        progress: show a bar on stderr.

    Returns:
        The path of the executed copy, which is written even when a cell fails.

    Raises:
        NotebookError: a cell failed, the kernel died, or nbclient is not installed.
        KeyboardInterrupt: it was stopped; says where, and no kernel is left.
        ValueError: there is no notebook of that name.

    Example:
        >>> run("Chapter0")  # doctest: +SKIP
    """
    path = find(name)
    try:
        import ipykernel  # noqa: F401
        import nbclient  # noqa: F401
        import nbformat
    except ImportError as error:
        wanted = f"pip install '{places.DISTRIBUTION}[notebook]'"
        raise NotebookError(f"Running notebooks needs {error.name}: {wanted}") from error
    notebook = nbformat.read(path, as_version=4)
    executed = output_folder(path) / path.name
    try:
        _execute(notebook, path, progress)
    finally:
        _files.write_whole(executed, nbformat.writes(notebook, version=4) + "\n")
    return executed


def _execute(notebook: NotebookNode, path: Path, progress: bool) -> None:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError
    from tqdm.auto import tqdm

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    bar = tqdm(total=len(code), desc=path.stem, unit="cell", disable=not progress)
    running: list[NotebookNode] = []
    kernels: list[Any] = []

    def begin(cell, **_):
        bar.set_postfix_str(cell.source.strip().partition("\n")[0][:48])
        running.append(cell)
        manager: Any = client.km
        kernels.append(manager.provisioner.process)

    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        on_cell_execute=begin,
        on_cell_executed=lambda **_: bar.update(1),
    )
    try:
        with bar:
            _until_the_end(client)
    except CellExecutionError as error:
        source = "\n".join(f"    {line}" for line in running[-1].source.splitlines())
        why = f"failed.\n\n{source}\n\n{error.ename}: {error.evalue}"
    except RuntimeError as error:  # nbclient's, of a kernel that died or never began
        atexit.unregister(client._cleanup_kernel)  # nbclient forgets it, and fails at exit
        ended = _machine.how_it_ended(kernels[-1].wait()) if kernels else f"failed ({error})"
        why = f"did not end: the kernel {ended}."
        if "memory" in ended:
            why += " Close other notebooks and programs, or take a machine with more."
    except CellTimeoutError:
        why = (
            f"ran for {CELL_SECONDS} seconds and was stopped: take a faster machine, or "
            "JupyterLab (`python -m helpers lab`), which knows no limit."
        )
    except KeyboardInterrupt:
        why = "was stopped; the notebook is as it was, and what had run is under outputs/."
        raise KeyboardInterrupt(f"{path.name}: {_place(code, running)} {why}") from None
    else:
        return
    raise NotebookError(f"{path.name}: {_place(code, running)} {why}")


def _place(code: list[NotebookNode], running: list[NotebookNode]) -> str:
    number = next((n for n, cell in enumerate(code, 1) if running and cell is running[-1]), 0)
    return f"code cell {number} of {len(code)}"


class _Loop(asyncio.SelectorEventLoop):
    """Ctrl-C cancels the run, and nbclient ends its kernel in order.

    Its own handler would pull the kernel from under the run, which ends in an AssertionError.
    """

    stopped = False

    def add_signal_handler(self, sig: int, callback: object, *args: object) -> None:
        run = asyncio.current_task()

        def stop() -> None:
            self.stopped = True
            if run:
                run.cancel()

        super().add_signal_handler(sig, stop)


def _until_the_end(client: NotebookClient) -> None:
    """Execute; KeyboardInterrupt after Ctrl-C or a SIGTERM, with no kernel left."""
    if _inside_a_loop():  # called from a notebook's cell
        client.execute(stderr=subprocess.DEVNULL)
        return
    loop = _Loop()
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(client.async_execute(stderr=subprocess.DEVNULL))
    except BaseException as error:
        if loop.stopped:
            raise KeyboardInterrupt from error
        raise


def _inside_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
