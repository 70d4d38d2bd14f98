"""One file from the package index: checked, whole, or a clear word. No network is used."""

import errno
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest
from tqdm import tqdm

from helpers import _downloads as downloads
from helpers.course import notebooks

NAME = "tiny_course_probe-1.0-py3-none-any.whl"
REQUIREMENT = "tiny-course-probe==1.0"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and nothing else; holds one small wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    info = "tiny_course_probe-1.0.dist-info"
    about = "Metadata-Version: 2.1\nName: tiny-course-probe\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        archive.writestr("tiny_course_probe.py", "x = 1\n" * 2000)
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    return folder


def bar(index):
    return tqdm(total=(index / NAME).stat().st_size, disable=True)


def fetch(index, folder, checksum=None):
    checksum = checksum or downloads.sha256(index / NAME)
    return downloads.fetch(REQUIREMENT, checksum, folder, bar(index))


def test_the_checksum_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"yoda")
    assert downloads.sha256(tmp_path / "file") == hashlib.sha256(b"yoda").hexdigest()


def test_a_good_file_arrives_and_the_folder_is_emptied_first(index, tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    (folder / "old.whl").write_text("old")
    path = fetch(index, folder)
    assert path.read_bytes() == (index / NAME).read_bytes()
    assert [p.name for p in folder.iterdir()] == [NAME]


def test_a_damaged_file_is_refused_after_a_second_try(index, tmp_path, monkeypatch):
    tries, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: (tries.append(a[0]), start(*a, **k))[1]
    )
    with pytest.raises(OSError, match=r"damaged or has been tampered with.*Try again"):
        fetch(index, tmp_path / "download", checksum="0" * 64)
    assert ["--no-cache-dir" in command for command in tries] == [False, True]
    assert not list((tmp_path / "download").iterdir()), "it is thrown away"


# The build backend of a source distribution that leaves a mark when it is run.
BACKEND = """\
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, settings=None):
    Path({mark!r}).touch()
    info = Path(folder, "tiny_course_probe-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text({about!r})
    return info.name
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


@pytest.mark.parametrize("tampered", [True, False])
def test_nothing_of_a_tampered_source_is_run(index, tmp_path, tampered):
    (index / NAME).unlink()
    sdist, mark = index / "tiny_course_probe-1.0.tar.gz", tmp_path / "was-run"
    about = "Metadata-Version: 2.1\nName: tiny-course-probe\nVersion: 1.0\n"
    files = {
        "PKG-INFO": about,
        "pyproject.toml": PROJECT,
        "backend.py": BACKEND.format(mark=str(mark), about=about),
    }
    with tarfile.open(sdist, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"tiny_course_probe-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    checksum = "0" * 64 if tampered else downloads.sha256(sdist)
    progress = tqdm(total=sdist.stat().st_size, disable=True)
    wanted = (REQUIREMENT, checksum, tmp_path / "download", progress)
    if tampered:
        with pytest.raises(OSError, match="tampered") as error:
            downloads.fetch(*wanted, source=True)
        assert downloads.sha256(sdist)[:16] in str(error.value), "what it found is said"
    else:
        path = downloads.fetch(*wanted, source=True)
        assert path.read_bytes() == sdist.read_bytes()
    assert mark.exists() != tampered


# ── environments without pip ─────────────────────────────────────────────────────────────
FETCH = """\
import sys
from pathlib import Path
from helpers import _downloads as downloads

class Bar:
    total, n = 1, 0
    reset = update = lambda *_: None

print(downloads.fetch(*sys.argv[1:3], Path(sys.argv[3]), Bar()))
"""


@pytest.mark.skipif(not importlib.util.find_spec("ensurepip"), reason="has no ensurepip")
def test_a_file_arrives_where_pip_is_not_installed(index, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
    folder = "Scripts" if os.name == "nt" else "bin"
    python = str(tmp_path / "bare" / folder / "python")
    assert subprocess.run([python, "-m", "pip"], capture_output=True).returncode == 1
    checksum = downloads.sha256(index / NAME)
    done = subprocess.run(
        [python, "-c", FETCH, REQUIREMENT, checksum, str(tmp_path / "download")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(notebooks.root())},
    )
    assert done.returncode == 0, done.stderr
    assert downloads.sha256(done.stdout.strip()) == checksum


def test_looking_for_pip_leaves_setuptools_whole():
    """On Python 3.11, importlib's own search for pip breaks a later `import setuptools`."""
    pytest.importorskip("setuptools")
    code = "from helpers import _downloads\n_downloads.pip()\nimport setuptools"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=notebooks.root())


def test_no_pip_at_all_names_the_cure(index, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "has_pip", lambda: False)
    monkeypatch.setattr(downloads.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="has no pip") as error:
        fetch(index, tmp_path / "download")
    assert sys.executable in str(error.value) and "uv pip install pip" in str(error.value)


def test_what_is_not_there_is_said_with_pips_words(index, tmp_path):
    (index / NAME).rename(tmp_path / NAME)
    (index / NAME).write_bytes((tmp_path / NAME).read_bytes())  # for the bar's total
    with pytest.raises(OSError, match="could not fetch no-such-thing==9") as error:
        downloads.fetch("no-such-thing==9", "0", tmp_path / "download", bar(index))
    assert "Check the connection" in str(error.value) and "pip says" in str(error.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_keeps_its_number(index, tmp_path, monkeypatch):
    real = downloads.subprocess.Popen

    def full(command, **settings):  # pip's own words, from a real full device
        script = "with open('/dev/full', 'w') as file: file.write('x')"
        return real([command[0], "-c", script], **settings)

    monkeypatch.setattr(downloads.subprocess, "Popen", full)
    with pytest.raises(OSError) as error:
        fetch(index, tmp_path / "download")
    assert error.value.errno == errno.ENOSPC
