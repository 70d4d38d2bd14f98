"""Results that survive the program that writes them, and hold nothing private.

Standard library only. One JSON object per line, on the disk when `save` returns.
"""

import contextlib
import getpass
import json
import math
import os
import re
import site
import socket
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Names that many machines share say nothing about anybody, and are words of our own texts.
SHARED_NAMES = {"root", "user", "ubuntu", "home", "admin", "jovyan", "runner", "localhost"}
SECRET_VARIABLE = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|API_?KEY|ACCESS_KEY", re.I)
SECRET = re.compile(r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|rpa_)[\w-]{12,}|(?<=://)[^\s/@]+(?=@)")
UNIX_FOLDERS = re.compile(r"(?:(?<![\w.~<>/])|(?<=://))/(?:[^\s/'\"`:;,<>()\[\]{}|]+/)+")
WINDOWS_FOLDERS = re.compile(r"\b[A-Za-z]:(?:\\+[^\\\n'\":;,]+)*\\+")


def slug(card):
    """A card's name as a file's name: 'Tesla T4' -> 'tesla-t4'."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "card"


def save(path, stage, kind, **fields):
    """Append one line of results; it is on the disk when this returns."""
    line = {"kind": kind, "stage": stage, "at": round(time.time(), 1)} | scrub(fields)
    text = json.dumps(line, allow_nan=False) + "\n"
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # whoever wrote last was killed in the middle
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path):
    """All whole lines of a file of results; none where there is no file."""
    found = []
    if Path(path).is_file():
        for text in Path(path).read_text(encoding="utf-8").split("\n"):
            try:
                found.append(json.loads(text))
            except ValueError:
                continue  # empty, or torn by a kill
    return found


def forget(path, stages):
    """Drop the lines of stages that are about to run again; the others stay."""
    kept = [json.dumps(line) for line in read(path) if line["stage"] not in stages]
    _replace(path, "".join(f"{text}\n" for text in kept))


def write_report(path, head, lines):
    """One JSON of everything, a line of results a line, whole or not at all."""
    rows = ",\n".join(json.dumps(line) for line in lines)
    _replace(path, f'{{"head": {json.dumps(scrub(head))},\n"lines": [\n{rows}\n]}}\n')


def _replace(path, text):
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# ── nothing private ──────────────────────────────────────────────────────────────────────
def scrub(value):
    """The value as JSON can hold it, without the owner's paths, names and secrets."""
    if isinstance(value, dict):
        return {str(key): scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON knows no nan
    text = SECRET.sub("<secret>", str(value))
    for secret in _secrets():
        text = text.replace(secret, "<secret>")
    for place, name in _places():
        text = re.sub(re.escape(place) + r"(?![\w-])", lambda _, name=name: name, text)
    text = WINDOWS_FOLDERS.sub(lambda _: "…\\", UNIX_FOLDERS.sub("…/", text))
    for name in _names():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "<user>", text)
    return text


def _secrets():
    named = [value for key, value in os.environ.items() if SECRET_VARIABLE.search(key)]
    return sorted((value for value in named if len(value) >= 8), key=len, reverse=True)


def _places():
    """(folder of this machine, what to call it), the innermost first."""
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    packages += site.getsitepackages()
    named = [(ROOT, "."), (Path.home(), "~"), (tempfile.gettempdir(), "<tmp>")]
    named += [(folder, "<packages>") for folder in packages]
    named += [(sysconfig.get_path("stdlib"), "<python>")]
    spelled = {}
    for folder, name in named:
        for path in (Path(folder), Path(folder).resolve()):
            for text in (str(path), path.as_posix(), str(path).replace("\\", "\\\\")):
                spelled.setdefault(text, name)
    return sorted(
        ((text, name) for text, name in spelled.items() if len(text) > 3),
        key=lambda item: len(item[0]),
        reverse=True,
    )


def _names():
    names = {Path.home().name, socket.gethostname()}
    with contextlib.suppress(KeyError, OSError, ImportError):  # a user without a name
        names.add(getpass.getuser())
    return {name for name in names if len(name) > 2 and name.lower() not in SHARED_NAMES}
