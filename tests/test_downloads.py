"""One file from the package index: checked, whole, or a clear word. No network is used."""

import errno
import hashlib
import os
import zipfile

import pytest
from tqdm import tqdm

from helpers import downloads

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
    wheel = (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
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
    assert sorted(p.name for p in folder.iterdir()) == ["pip.log", NAME]


def test_a_damaged_file_is_refused_after_a_second_try(index, tmp_path, monkeypatch):
    tries = []
    real = downloads._pip_download
    monkeypatch.setattr(
        downloads, "_pip_download", lambda *a: (tries.append(a[2]), real(*a))[1]
    )
    with pytest.raises(OSError, match=r"damaged or has been tampered with.*Try again"):
        fetch(index, tmp_path / "download", checksum="0" * 64)
    assert tries == [[], ["--no-cache-dir"]]


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
