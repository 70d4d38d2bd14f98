"""A shell line as the simple commands it is made of; nothing is run or expanded."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field


def names(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


@dataclass
class Command:
    """One simple command: its words, and the variables that are set for it."""

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The program without its folder: 'pip' of '/usr/bin/pip3'."""
        last = re.split(r"[/\\]", self.words[0])[-1].removesuffix(".exe")
        return re.sub(r"^(pip|python)[\d.]*$|^(?:\{?sys\.executable\}?|py)$", _plain_name, last)

    @property
    def module(self) -> str:
        """The module of `python -m module`; '' otherwise."""
        return self._after_python()[0]

    @property
    def script(self) -> str:
        """The script that runs, by its own name or as Python's argument; '' otherwise."""
        if self.words[0].endswith(".py"):
            return self.words[0]
        return self._after_python()[1]

    @property
    def arguments(self) -> list[str]:
        """The words behind the program, the module or the script."""
        return self.words[self._after_python()[2] :]

    def _after_python(self) -> tuple[str, str, int]:
        if self.name != "python":
            return "", "", 1
        number = 1
        while number < len(self.words) and self.words[number].startswith("-"):
            if self.words[number] == "-m":
                return "".join(self.words[number + 1 : number + 2]), "", number + 2
            number += 2 if self.words[number] in ("-W", "-X") else 1
        return "", "".join(self.words[number : number + 1]), number + 1


def _plain_name(match: re.Match[str]) -> str:
    return match[1] or "python"


def commands(text: str) -> Iterator[Command]:
    """The simple commands of a line; quotes that do not fit together count as blanks."""
    words: list[str] = []
    for word in [*_words(text), ";"]:
        if word.strip(";|&") or not word:
            words.append(word)
            continue
        if found := _command(words):
            yield found
            if found.name in ("sh", "bash") and found.words[1:2] in (["-c"], ["-lc"]):
                yield from commands(" ".join(found.words[2:3]))
        words = []


def _words(text: str) -> list[str]:
    for attempt in (text, re.sub(r"[\"'`\\]", " ", text)):
        try:
            lexer = shlex.shlex(attempt, posix=True, punctuation_chars=";|&")
            lexer.whitespace_split, lexer.commenters = True, ""
            return list(lexer)
        except ValueError:
            continue
    return text.split()


def _command(words: list[str]) -> Command | None:
    comment = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
    words, variables = list(words[:comment]), {}
    while words:
        word = words[0].lstrip("({")
        setting = re.match(r"([A-Za-z_]\w*)=(.*)", word, re.S)
        if setting:
            variables[setting[1]] = setting[2]
        elif word in ("poetry", "uv", "conda") and words[1:2] == ["run"]:
            words = words[1:]
            while words[1:] and words[1].startswith("-"):
                words = words[2:] if words[1] in ("-n", "--name", "--with", "-p") else words[1:]
        elif word and word not in _WRAPPERS:
            return Command([word, *words[1:]], variables)
        words = words[1:]
    return Command([""], variables) if variables else None


_WRAPPERS = names("sudo time nohup exec command env export set do then else if while ! $")
