"""Ollama: a Modelfile from a tokenizer, and a client (Chapter 6).

Older versions of Ollama do not read a chat template in Jinja; they want one in Go's template
language. Here it is not picked from a list of known models: the tokenizer's own template is
rendered on probe conversations, taken apart, written down again in Go, and put together once
more to be compared. What does not come out equal is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.serving import _rest
from helpers.serving._rest import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PORTS = {"": 11434, "http": 80, "https": 443}  # where an address names no port
# What a server listens on to be seen from everywhere is no place to call.
LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
INSTALL = (
    "Install it from ollama.com/download (macOS, Windows), with its shell script on Linux "
    "and on a pod, in Colab with the same script and `ollama serve &` in a terminal; then "
    "`ollama serve` must be running"
)
RAW_MODE = (
    "Way out: leave TEMPLATE alone and send prompts that you rendered yourself, "
    '`{"raw": true, "prompt": tokenizer.apply_chat_template(...)}`'
)
TALK, ORDER = ("first question", "first answer", "second question"), "standing order"
HARD = "quotes \" ' ``` braces {{ .X }} {% y %} back\\slash\nnew line, accents é, 汉字 🙂"


def ollama_modelfile(
    tokenizer: PreTrainedTokenizerBase,
    source: object,
    *,
    adapter: object = None,
    parameters: Mapping[str, str | float] | None = None,
) -> str:
    """Ollama's Modelfile for a model and its chat template, as text (Chapter 6).

    Args:
        tokenizer: its chat template is said in Go's language; its stop words are named.
        source: path of a GGUF file, or the name of a model Ollama has.
        adapter: path of an adapter's GGUF; recent versions of Ollama are reported to refuse
            it, so prefer a merged model.
        parameters: such as {'temperature': 0, 'num_ctx': 1024}.

    Raises:
        ValueError: when the template cannot be said in Go's language.

    Example:
        >>> text = ollama_modelfile(tokenizer, "./yoda.gguf")  # doctest: +SKIP
    """
    template = parse_template(tokenizer)
    lines = [f"FROM {source}"]
    if adapter is not None:
        lines.append("# Recent versions of Ollama are reported to refuse ADAPTER: merge instead.")
        lines.append(f"ADAPTER {adapter}")
    lines.append(f'TEMPLATE """{template.text()}"""')
    if template.default is not None:
        lines.append(f'SYSTEM """{template.default}"""')
    settings = [("stop", word) for word in stop_words(tokenizer)]
    for name, value in [*settings, *(parameters or {}).items()]:
        if not isinstance(value, str | int | float):
            raise TypeError(f"parameters[{name!r}] must be a number or text, not {value!r}")
        lines.append(f"PARAMETER {name} {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


# ── the template ─────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class GoTemplate:
    """A chat template taken apart: the fixed texts around the contents of a conversation.

    user, again: before the first and before a later question. assistant: before an answer;
    prompt: what opens the answer that the model shall write. after_user, after_assistant:
    what closes a turn. system: before the system message (None without a place for it);
    system_user: between it and the first question. default: a system message that the
    template adds when there is none.

    Example:
        >>> turns = {"user": "Q:", "again": "Q:", "after_user": ";"}
        >>> turns |= {"assistant": "A:", "after_assistant": ";", "prompt": "A:"}
        >>> GoTemplate(**turns).render([{"role": "user", "content": "Hello"}])
        'Q:Hello;A:'
    """

    user: str
    again: str
    after_user: str
    assistant: str
    after_assistant: str
    prompt: str
    system: str | None = None
    system_user: str = ""
    default: str | None = None

    def render(self, messages: Messages) -> str:
        """The prompt for `messages`, as Ollama will build it from the template."""
        system = next((m["content"] for m in messages if m["role"] == "system"), self.default)
        first, text = self.user, ""
        if self.system is not None and system:
            first = self.system + system + self.system_user
        for number, message in enumerate(m for m in messages if m["role"] != "system"):
            if message["role"] == "assistant":
                text += self.assistant + message["content"] + self.after_assistant
            else:
                text += (self.again if number else first) + message["content"] + self.after_user
        return text + self.prompt

    def text(self) -> str:
        """The same in Go's template language, with Ollama's variables."""
        first = self.user
        if self.system is not None:
            order = f"{self.system}{{{{ $.System }}}}{self.system_user}"
            first = f"{{{{ if $.System }}}}{order}{{{{ else }}}}{self.user}{{{{ end }}}}"
        if self.system is not None or self.again != self.user:
            # With a system message, the first question is the second message.
            shift = "{{ if or (eq $i 0) (and $.System (eq $i 1)) }}"
            first = f"{shift}{first}{{{{ else }}}}{self.again}{{{{ end }}}}"
        return (
            '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}'
            f"{first}{{{{ $m.Content }}}}{self.after_user}"
            '{{ else if eq $m.Role "assistant" }}'
            f"{self.assistant}{{{{ $m.Content }}}}{self.after_assistant}"
            f"{{{{ end }}}}{{{{ end }}}}{self.prompt}"
        )


def parse_template(tokenizer: PreTrainedTokenizerBase) -> GoTemplate:
    """Take a tokenizer's chat template apart, without a BOS that the server adds itself.

    ValueError for a template that does more than put fixed texts around contents.

    Example:
        >>> parse_template(tokenizer).user  # doctest: +SKIP
        '<|im_start|>user\\n'
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"tokenizer has no chat template. {RAW_MODE}")
    try:
        head, between, again, tail = _split(_render(tokenizer, TALK), *TALK)
        # What ends a turn also when nothing follows; some templates add more at the very end.
        after_user = _split(_render(tokenizer, TALK[:1], prompt=False), *TALK[:1])[-1]
        after_user *= between.startswith(after_user) and tail.startswith(after_user)
        after = _split(_render(tokenizer, TALK[:2], prompt=False), *TALK[:2])[-1]
        after *= again.startswith(after)
    except Exception as error:  # a template may raise anything, on purpose too
        raise ValueError(
            f"tokenizer: its chat template cannot be read ({error}). {RAW_MODE}"
        ) from error
    system, system_user, default = None, "", None
    # No place for a system message is a fact, not a fault.
    with contextlib.suppress(Exception):
        system, system_user, _ = _split(_render(tokenizer, TALK[:1], ORDER), ORDER, TALK[0])
    if system is not None and head.startswith(system) and head != system:
        rest = head.removeprefix(system)
        default = rest.removesuffix(system_user) if rest.endswith(system_user) else None
    found = GoTemplate(
        user=head,
        again=again.removeprefix(after),
        after_user=after_user,
        assistant=between.removeprefix(after_user),
        after_assistant=after,
        prompt=tail.removeprefix(after_user),
        system=system,
        system_user=system_user,
        default=default,
    )
    _check(found, tokenizer)
    return found


def _check(template: GoTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
    if '"""' in template.text() + str(template.default):
        raise ValueError(f'tokenizer: its template holds """, which ends a field. {RAW_MODE}')
    for system in (None, ORDER, HARD) if template.system is not None else (None,):
        for talk in (TALK[:1], TALK, (HARD,), (TALK[0], HARD, "And?")):
            expected, got = _render(tokenizer, talk, system), template.render(_talk(talk, system))
            if expected != got:
                raise ValueError(
                    "tokenizer: its chat template does more than put fixed texts around the "
                    f"messages, so Go's would differ: {expected!r} against {got!r}. {RAW_MODE}"
                )


def stop_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that end an answer: EOS, and those around the next question.

    Example:
        >>> stop_words(tokenizer)  # doctest: +SKIP
        ['<|im_end|>']
    """
    template = parse_template(tokenizer)
    between = template.after_assistant + template.again
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    found = sorted((t for t in special if t in between), key=between.find)
    eos = tokenizer.eos_token
    return found if eos in found or not eos else [eos, *found]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer, and so a GGUF made of it, puts BOS before every text.

    Example:
        >>> adds_bos(tokenizer)  # doctest: +SKIP
        False
    """
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _render(tokenizer, contents, system=None, prompt=True):
    talk = _talk(contents, system)
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
    # The server adds BOS on its own; a second one in the template spoils the answers.
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def _talk(contents: Sequence[str], system: str | None) -> list[dict[str, str]]:
    turns = [(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    turns = turns if system is None else [("system", system), *turns]
    return [{"role": role, "content": content} for role, content in turns]


def _split(text: str, *contents: str) -> list[str]:
    parts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found:
            raise ValueError(f"it drops or changes the message {content!r}")
        parts.append(before)
    return [*parts, text]


# ── asking ───────────────────────────────────────────────────────────────────────────────
def ollama_chat(
    model: str, messages: Messages, *, address: str | None = None, **options: object
) -> str:
    """Ask Ollama over its REST API; returns the answer's text (Chapter 6).

    Not run by the course's tests against Ollama itself, whose program cannot be had there.

    Args:
        model: a name from `ollama list`.
        messages: dicts with 'role' and 'content'.
        address: in any form that OLLAMA_HOST may have, which is its default ('127.0.0.1',
            ':11500', 'https://host/path'; nothing: 127.0.0.1:11434).
        options: such as temperature=0, num_predict=64.

    Raises:
        ValueError: for an address of another form.
        ConnectionError: with how to install and start Ollama, when nobody answers.

    Example:
        >>> question = {"role": "user", "content": "Hello?"}
        >>> ollama_chat("yoda", [question], temperature=0)  # doctest: +SKIP
    """
    url = _url(address or os.environ.get("OLLAMA_HOST", ""))
    payload = {"model": model, "messages": list(messages), "stream": False, "options": options}
    try:
        return _rest.ask(f"{url}/api/chat", payload)["message"]["content"]
    except _rest.Refused:
        raise
    except OSError as error:
        raise ConnectionError(f"Ollama does not answer at {url} ({error}). {INSTALL}") from None


def _url(address: str) -> str:
    """The address as Ollama's own client reads it, in full: scheme, host, port, path."""
    scheme, _, rest = address.strip().strip("\"'").rpartition("://")
    if rest.count(":") > 1 and "[" not in rest:  # IPv6 without its brackets, so no port
        rest = f"[{rest}]"
    try:
        parts = urllib.parse.urlsplit(f"{scheme or 'http'}://{rest}")
        default, port = PORTS[scheme.lower()], parts.port
    except (KeyError, ValueError):
        raise ValueError(
            f"address (or OLLAMA_HOST) must look like 'host', 'host:11434' or "
            f"'http://host:11434', not {address!r}"
        ) from None
    host = LOOPBACK.get(parts.hostname or "", parts.hostname or "")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{port or default}{parts.path.rstrip('/')}"
