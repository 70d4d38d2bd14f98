"""Do training and serving read the same prompt? Compared text by text and token by token
(Chapter 6).

"Good in the notebook, garbage in Ollama" is nearly always a prompt that differs by a few
characters. `template_parity` renders conversations with the tokenizer that trained the
model, with llama.cpp's server, and as Ollama would: with a Modelfile's TEMPLATE in Go's own
engine or, where it has none, with the template inside its GGUF file.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import _machine
from helpers._report import Finding, Shown, card
from helpers.serving import _programs
from helpers.serving._anatomy import adds_bos, collate, stop_words, take_apart, writes_date
from helpers.serving._inspection import inspect
from helpers.serving._rest import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpers.serving.server import LlamaServer

WHY = {
    "double_bos": "BOS stands twice: the template writes it and the server adds it",
    "missing_generation_prompt": "the prompt does not open the assistant's turn",
    "trailing_newline": "the prompts differ in white space only",
    "different_text": "the prompts differ",
    "different_tokens": "the same text becomes other tokens",
    "missing_stop": "a token that ends an answer is no stop word: it would go on and on",
    "cutting_stop": "a stop word stands in what each answer begins with: nothing would be left",
}


@dataclass(frozen=True)
class Difference(Finding):
    """One disagreement: a finding, where ('server', 'ollama'), in which talk, both texts."""

    where: str
    index: int | None = None
    expected: str = ""
    got: str = ""

    def __str__(self) -> str:
        place = self.where if self.index is None else f"{self.where}, talk {self.index}"
        text = f"{self.code} ({place}): {self.message}"
        if self.expected:
            text += f"\n  training {self.expected!r}\n  serving  {self.got!r}"
        return text


@dataclass(frozen=True, repr=False)
class Parity(Shown):
    """The outcome: what was compared, what was skipped and why, and the differences."""

    conversations: int
    compared: tuple[str, ...]
    skipped: dict[str, str]
    differences: tuple[Difference, ...]

    @property
    def exact(self) -> bool:
        """True when something was compared and nothing differs."""
        return bool(self.compared) and not self.differences

    @property
    def codes(self) -> set[str]:
        """The set of difference codes."""
        return {difference.code for difference in self.differences}

    def __str__(self) -> str:
        lines = [f"{self.conversations} conversations, {', '.join(self.compared) or 'nothing'}"]
        lines += [f"not compared: {name} ({why})" for name, why in self.skipped.items()]
        lines += ["all equal"] if self.exact else map(str, self.differences[:5])
        if (more := len(self.differences) - 5) > 0:
            lines.append(f"and {more} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return card(str(self), "good" if self.exact else "bad")


def template_parity(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Messages],
    *,
    server: LlamaServer | None = None,
    modelfile: str | None = None,
) -> Parity:
    """Compare the prompts of training with those of serving (Chapter 6).

    Args:
        tokenizer: the one that trained; its chat template is right by definition.
        conversations: lists of messages that end with the user.
        server: a running server, whose template and tokenizer are compared.
        modelfile: the text of a Modelfile. Its stop words are checked, and its TEMPLATE runs
            in Go's text/template (skipped, with the reason, without the program `go`). Without
            a TEMPLATE, the one inside the GGUF file that FROM names is compared.

    Raises:
        ValueError: for nothing to compare, a TEMPLATE that Go refuses, and a Modelfile with no
            template anywhere.

    Example:
        >>> with LlamaServer("model.gguf") as server:  # doctest: +SKIP
        ...     template_parity(tokenizer, [question], server=server).exact
        True
    """
    talks = [list(messages) for messages in conversations]
    if not talks or any(not talk or talk[-1]["role"] != "user" for talk in talks):
        raise ValueError("conversations must be lists of messages that end with the user")
    if server is None and modelfile is None:
        raise ValueError("server or modelfile: pass at least one to compare with")
    expected = [_training_prompt(tokenizer, *numbered) for numbered in enumerate(talks)]
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""  # the servers add it as well
    compared, skipped, found = [], {}, list[Difference]()
    if writes_date(tokenizer):
        skipped["prompts of another day"] = "the template writes today's date into them"
    if server is not None:
        got = [server.apply_template(talk) for talk in talks]
        compared.append("text and tokens of llama.cpp's server")
        # It takes a BOS off the rendered text when it will add its own.
        bare = [[text.removeprefix(bos) for text in texts] for texts in (expected, got)]
        found += _texts("server", tokenizer, *bare)
        found += _tokens(tokenizer, expected, got, server)
    if modelfile is not None:
        fields = _fields(modelfile)
        template, end = carried("" if "template" in fields else fields.get("from", [""])[-1])
        compared.append("stop words of the Modelfile")
        found += _stops(tokenizer, fields.get("stop", []), end)
        if template:
            compared.append("the template inside its GGUF file")
            told = enumerate(_told(fields, talk) for talk in talks)
            got = [_training_prompt(tokenizer, *each, template) for each in told]
            found += _texts("ollama", tokenizer, expected, got)
        elif shutil.which("go"):
            compared.append("its TEMPLATE in Go")
            got = [bos + text for text in _render_in_go(modelfile, talks)]
            found += _texts("ollama", tokenizer, expected, got)
        else:
            skipped["its TEMPLATE"] = "no program `go`; on Debian: apt-get install golang-go"
    return Parity(len(talks), tuple(compared), skipped, tuple(found))


def carried(source: object) -> tuple[str | None, int | None]:
    """The chat template and the end token inside the GGUF file at `source`, where there are any.

    Example:
        >>> carried("no-file-here.gguf")
        (None, None)
    """
    path = Path(str(source))
    found = inspect(path).metadata if path.suffix == ".gguf" and path.is_file() else {}
    return found.get("tokenizer.chat_template"), found.get("tokenizer.ggml.eos_token_id")


def _training_prompt(tokenizer, number, talk, template=None):
    options = {"tokenize": False, "add_generation_prompt": True, "chat_template": template}
    try:
        return tokenizer.apply_chat_template(talk, **options)
    except Exception as error:  # a template may raise anything, on purpose too
        why = f"conversations[{number}]: the tokenizer's own chat template refuses it ({error})"
        raise ValueError(why) from error


def _texts(where, tokenizer, expected, got):
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        if want != have:
            code = _diagnose(tokenizer.bos_token, want, have)
            yield Difference(code, WHY[code], where, index, want, have)


def _diagnose(bos: str | None, want: str, have: str) -> str:
    if bos and have == bos + want:
        return "double_bos"
    if want.split() == have.split():
        return "trailing_newline"
    return "missing_generation_prompt" if want.startswith(have) else "different_text"


def _tokens(tokenizer, expected, got, server):
    bos = tokenizer.bos_token_id
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        ids = tokenizer(want, add_special_tokens=False).input_ids
        theirs = server.tokenize(have, add_special=True)
        double = bos is not None and theirs[:2] == [bos, bos] and ids[:2] != [bos, bos]
        # Differing texts were reported as such.
        if theirs != ids and (double or want == have):
            code = "double_bos" if double else "different_tokens"
            yield Difference(code, WHY[code], "server", index, str(ids), str(theirs))


def _stops(tokenizer, stops, end):
    template = take_apart(tokenizer)
    # One token that surely ends an answer is enough: the first of ours.
    first = stop_words(tokenizer, template)[:1]
    if not {*first, *map(tokenizer.convert_tokens_to_ids, first)} & {*stops, end}:
        yield Difference("missing_stop", WHY["missing_stop"], "ollama")
    for word in stops:
        if word in template.opening:
            yield Difference("cutting_stop", f"{word!r}: {WHY['cutting_stop']}", "ollama")


def _fields(modelfile: str) -> dict[str, list[str]]:
    """FROM, TEMPLATE, SYSTEM and stop texts of a Modelfile, as Ollama's parser reads them."""
    found: dict[str, list[str]] = {}
    names = r"license|from|template|system|parameter[ \t]+stop"
    line = rf'(?ims)^[ \t]*({names})[ \t]+("""(.*?)"""|[^\n]*)'
    for name, text, inside in re.findall(line, modelfile):
        text = text.strip()
        quoted = len(text) > 1 and text[0] == text[-1] == '"'
        text = inside if text.startswith('"""') else text[1:-1] if quoted else text
        found.setdefault(name.split()[-1].lower(), []).append(text)
    return found


def _told(fields: dict[str, list[str]], talk: Messages) -> Messages:
    """The messages as Ollama hands them on: SYSTEM first, where they begin with another role."""
    if "system" in fields and talk[0]["role"] != "system":
        return [{"role": "system", "content": fields["system"][-1]}, *talk]
    return talk


def _render_in_go(modelfile: str, talks: list[Messages]) -> list[str]:
    # A TEMPLATE gets the messages, and once more, in one text, all system messages.
    fields = _fields(modelfile)
    if "template" not in fields:
        raise ValueError("modelfile has no TEMPLATE to render, nor a GGUF file with one in FROM")
    jobs = []
    for talk in (_told(fields, talk) for talk in talks):
        orders = [m.get("content") or "" for m in talk if m["role"] == "system"]
        jobs.append({"System": "\n\n".join(orders), "Messages": collate(talk)})
    done = subprocess.run(
        ["go", "run", Path(__file__).with_name("render.go")],
        input=json.dumps({"Template": fields["template"][-1], "Talks": jobs}),
        capture_output=True,
        encoding="utf-8",
        cwd=tempfile.gettempdir(),
    )
    if done.stderr.startswith("template:"):
        raise ValueError(f"modelfile: Go refuses its TEMPLATE: {done.stderr.strip()}")
    if done.returncode or not done.stdout.endswith("]\n"):  # a list is printed whole or not
        ended, said = _machine.how_it_ended(done.returncode), _programs.last_lines(done.stderr)
        raise RuntimeError(f"`go run` {ended} before it had rendered all talks:\n{said}")
    return json.loads(done.stdout)
