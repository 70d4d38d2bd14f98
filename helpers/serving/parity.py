"""Do training and serving read the same prompt? Compared text by text and token by token
(Chapter 6).

"Good in the notebook, garbage in Ollama" is nearly always a prompt that differs by a few
characters. `template_parity` renders conversations with the tokenizer that trained the
model, with llama.cpp's server, and with a Modelfile's TEMPLATE in Go's own engine.
"""

import html
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from helpers.serving.ollama import adds_bos, stop_words

GO_PROGRAM = """\
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

type Talk struct {
	System   string
	Messages []Message
}

type Job struct {
	Template string
	Talks    []Talk
}

func main() {
	var job Job
	check(json.NewDecoder(os.Stdin).Decode(&job))
	engine, err := template.New("").Option("missingkey=zero").Parse(job.Template)
	check(err)
	texts := make([]string, len(job.Talks))
	for i, talk := range job.Talks {
		var out strings.Builder
		check(engine.Execute(&out, talk))
		texts[i] = out.String()
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}

func check(err error) {
	if err != nil {
		os.Stderr.WriteString(err.Error())
		os.Exit(1)
	}
}
"""
WHY = {
    "double_bos": "BOS stands twice: the template writes it and the server adds it",
    "missing_generation_prompt": "the prompt does not open the assistant's turn",
    "trailing_newline": "the prompts differ in white space only",
    "different_text": "the prompts differ",
    "different_tokens": "the same text becomes other tokens",
    "missing_stop": "a token that ends an answer is no stop word: it would go on and on",
}


@dataclass(frozen=True)
class Difference:
    """One disagreement: where ('server', 'ollama'), which conversation, code, and texts."""

    where: str
    index: int | None
    code: str
    expected: str = ""
    got: str = ""

    def __str__(self):
        place = self.where if self.index is None else f"{self.where}, talk {self.index}"
        text = f"{self.code} ({place}): {WHY[self.code]}"
        if not self.expected:
            return text
        return f"{text}\n  training {self.expected!r}\n  serving  {self.got!r}"


@dataclass(frozen=True)
class Parity:
    """The outcome: what was compared, what was skipped and why, and the differences."""

    conversations: int
    compared: tuple
    skipped: dict
    differences: tuple = field(repr=False)

    @property
    def exact(self):
        """True when something was compared and nothing differs."""
        return bool(self.compared) and not self.differences

    @property
    def codes(self):
        """The set of difference codes."""
        return {difference.code for difference in self.differences}

    def __str__(self):
        lines = [f"{self.conversations} conversations, {', '.join(self.compared) or 'nothing'}"]
        lines += [f"not compared: {name} ({why})" for name, why in self.skipped.items()]
        if self.exact:
            lines.append("all equal")
        lines += [str(difference) for difference in self.differences[:5]]
        if (more := len(self.differences) - 5) > 0:
            lines.append(f"and {more} more")
        return "\n".join(lines)

    def _repr_html_(self):
        color = "#009E73" if self.exact else "#D55E00"
        return (
            f"<pre style='border-left:4px solid {color};padding-left:8px'>"
            f"{html.escape(str(self))}</pre>"
        )


def template_parity(tokenizer, conversations, *, server=None, modelfile=None):
    """Compare the prompts of training with those of serving (Chapter 6).

    conversations: lists of messages that end with the user. server: a running
    `LlamaServer`; its template and its tokenizer are compared. modelfile: the text of a
    Modelfile; its TEMPLATE runs in Go's text/template (skipped, with the reason, where the
    program `go` is missing), and its stop words are checked. Returns a `Parity`.
    """
    talks = [list(messages) for messages in conversations]
    if not talks or any(not talk or talk[-1]["role"] != "user" for talk in talks):
        raise ValueError("conversations must be lists of messages that end with the user")
    if server is None and modelfile is None:
        raise ValueError("server or modelfile: pass at least one to compare with")
    expected = [
        tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        for talk in talks
    ]
    compared, skipped, found = [], {}, []
    if server is not None:
        got = [server.apply_template(talk) for talk in talks]
        compared += ["text and tokens of llama.cpp's server"]
        found += _texts("server", tokenizer, expected, got)
        found += _tokens(tokenizer, expected, got, server)
    if modelfile is not None:
        found += _stops(tokenizer, modelfile)
        compared.append("stop words of the Modelfile")
        if shutil.which("go"):
            got = render_go(modelfile, talks)
            compared.append("its TEMPLATE in Go")
            wanted = expected
            if adds_bos(tokenizer):  # Ollama adds it to what the template writes
                got = [tokenizer.bos_token + text for text in got]
            found += _texts("ollama", tokenizer, wanted, got)
        else:
            skipped["its TEMPLATE"] = "no program `go`; on Debian: apt-get install golang-go"
    return Parity(len(talks), tuple(compared), skipped, tuple(found))


def _texts(where, tokenizer, expected, got):
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        # llama.cpp's server takes a BOS off the rendered text when it will add its own.
        if where == "server" and adds_bos(tokenizer):
            want = want.removeprefix(tokenizer.bos_token)
            have = have.removeprefix(tokenizer.bos_token)
        if want != have:
            yield Difference(where, index, _diagnose(tokenizer, want, have), want, have)


def _diagnose(tokenizer, want, have):
    bos = tokenizer.bos_token or ""
    if bos and have == bos + want:
        return "double_bos"
    if want.split() == have.split():
        return "trailing_newline"
    if want.startswith(have):
        return "missing_generation_prompt"
    return "different_text"


def _tokens(tokenizer, expected, got, server):
    bos = tokenizer.bos_token_id
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        ids = tokenizer(want, add_special_tokens=False).input_ids
        theirs = server.tokenize(have, add_special=True)
        if theirs == ids:
            continue
        double = bos is not None and theirs[:2] == [bos, bos] and ids[:2] != [bos, bos]
        code = "double_bos" if double else "different_tokens"
        if double or want == have:  # differing texts were reported as such
            yield Difference("server", index, code, str(ids), str(theirs))


def _stops(tokenizer, modelfile):
    stops = [
        json.loads(text) if text.startswith('"') else text.strip()
        for text in re.findall(r"(?mi)^PARAMETER +stop +(.+)$", modelfile)
    ]
    # One token that surely ends an answer is enough: the first of ours.
    if not set(stop_words(tokenizer)[:1]) & set(stops):
        yield Difference("ollama", None, "missing_stop")


def render_go(modelfile, talks):
    """Render conversations with a Modelfile's TEMPLATE in Go's engine, as Ollama would.

    Ollama hands the template the messages and, apart, the system message: that of the
    talk, or the Modelfile's SYSTEM. Raises ValueError when Go refuses the template.
    """
    template = _field(modelfile, "TEMPLATE")
    if template is None:
        raise ValueError('modelfile has no TEMPLATE """…""" to render')
    default = _field(modelfile, "SYSTEM")
    job = {"Template": template, "Talks": []}
    for talk in talks:
        if default is not None and talk[0]["role"] != "system":
            talk = [{"role": "system", "content": default}, *talk]
        system = talk[0]["content"] if talk[0]["role"] == "system" else ""
        messages = [{"Role": m["role"], "Content": m["content"]} for m in talk]
        job["Talks"].append({"System": system, "Messages": messages})
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "render.go")
        program.write_text(GO_PROGRAM, encoding="utf-8")
        done = subprocess.run(
            ["go", "run", str(program)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=folder,
        )
    if done.returncode:
        raise ValueError(f"modelfile: Go refuses its TEMPLATE: {done.stderr.strip()}")
    return json.loads(done.stdout)


def _field(modelfile, name):
    match = re.search(rf'(?ms)^{name} """(.*?)"""', modelfile)
    return match and match[1]
