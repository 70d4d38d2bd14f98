"""Ollama: a Modelfile from a tokenizer, and a client (Chapter 6).

Ollama does not read a chat template in Jinja; it wants one in Go's template language. Here
it is not picked from a list of known models: the tokenizer's own template is rendered on
probe conversations, taken apart, written down again in Go, and put together once more to be
compared. What does not come out equal is refused.
"""

import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

PORTS = {"": 11434, "http": 80, "https": 443}  # where an address names no port
INSTALL = (
    "Install it from ollama.com/download (macOS, Windows), with its shell script on Linux "
    "and on a pod, in Colab with the same script and `ollama serve &` in a terminal; then "
    "`ollama serve` must be running"
)
RAW_MODE = (
    "Way out: leave TEMPLATE alone and send prompts that you rendered yourself, "
    '`{"raw": true, "prompt": tokenizer.apply_chat_template(...)}`'
)
USERS, ANSWERS = ("first question", "second question"), ("first answer", "second answer")
SYSTEM = "standing order"
HARD = "quotes \" ' ``` braces {{ .X }} {% y %} back\\slash\nnew line, accents é, 汉字 🙂"


@dataclass(frozen=True)
class Anatomy:
    """A chat template taken apart: the texts around the contents of a conversation.

    user, again: before the first and before a later question. assistant: before an answer;
    prompt: what opens the answer that the model shall write. after_user, after_assistant:
    what closes a turn. system, system_user: before the system message, and between it and
    the first question (None without a place for it). default: a system message the template
    adds when there is none.
    """

    user: str
    after_user: str
    assistant: str
    after_assistant: str
    prompt: str
    again: str
    system: str | None
    system_user: str | None
    default: str | None

    def render(self, messages):
        """The prompt for `messages`, as Ollama will build it from the Go template."""
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        talk = [m for m in messages if m["role"] != "system"]
        system = self.default if system is None else system
        text = ""
        for number, message in enumerate(talk):
            if message["role"] == "assistant":
                before, after = self.assistant, self.after_assistant
            elif number:
                before, after = self.again, self.after_user
            else:
                first = self.user
                if system is not None and self.system is not None:
                    first = self.system + system + self.system_user
                before, after = first, self.after_user
            text += before + message["content"] + after
        return text + self.prompt

    def go_template(self):
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


def ollama_modelfile(tokenizer, source, *, adapter=None, parameters=None):
    """Ollama's Modelfile for a model and its chat template, as text (Chapter 6).

    source: path of a GGUF file, or the name of a model Ollama has. adapter: path of an
    adapter's GGUF; recent versions of Ollama are reported to refuse it, so prefer a merged
    model. parameters: such as {'temperature': 0, 'num_ctx': 1024}. The stop words come
    from the template. Raises ValueError when the template cannot be said in Go's language.
    """
    anatomy = take_apart(tokenizer)
    template = anatomy.go_template()
    lines = [f"FROM {source}"]
    if adapter is not None:
        lines += [
            "# Recent versions of Ollama are reported to refuse ADAPTER: merge instead.",
            f"ADAPTER {adapter}",
        ]
    lines.append(f'TEMPLATE """{template}"""')
    if anatomy.default is not None:
        lines.append(f'SYSTEM """{anatomy.default}"""')
    lines += [f"PARAMETER stop {json.dumps(s, ensure_ascii=False)}" for s in stop_words(tokenizer)]
    for name, value in (parameters or {}).items():
        if not isinstance(value, str | int | float | bool):
            raise TypeError(f"parameters[{name!r}] must be a number or text, not {value!r}")
        shown = json.dumps(value, ensure_ascii=False)
        lines.append(f"PARAMETER {name} {shown}")
    return "\n".join(lines) + "\n"


def stop_words(tokenizer):
    """The special tokens that end an answer: EOS, and those around the next question."""
    after = take_apart(tokenizer)
    between = after.after_assistant + after.again
    special = sorted(
        (t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
        key=lambda token: between.find(token),
    )
    found = [token for token in special if token in between]
    eos = tokenizer.eos_token
    return found if eos in found or not eos else [eos, *found]


def take_apart(tokenizer):
    """The `Anatomy` of a tokenizer's chat template, without a BOS the server adds itself.

    Raises ValueError for a template that does more than put fixed texts around contents.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"tokenizer has no chat template. {RAW_MODE}")
    question, answer = USERS[0], ANSWERS[0]
    try:
        talk = _render(tokenizer, _talk(2))
        head, between, again, tail = _split(talk, question, answer, USERS[1])
        open_end = _render(tokenizer, _talk(1), prompt=False)
        after_user = _closing(_split(open_end, question)[-1], between, tail)
        closed = _render(tokenizer, [*_talk(1), _message("assistant", answer)], prompt=False)
        after_answer = _closing(_split(closed, question, answer)[-1], again)
    except Exception as error:  # a template may raise anything, on purpose too
        raise ValueError(
            f"tokenizer: its chat template cannot be read ({error}). {RAW_MODE}"
        ) from error
    default = system = system_user = None
    try:
        ordered = _render(tokenizer, [_message("system", SYSTEM), *_talk(1)])
        system, system_user, _ = _split(ordered, SYSTEM, question)
    except Exception:  # no place for a system message, which is a fact, not a fault
        system = None
    if system is not None and head.startswith(system) and head != system:
        rest = head.removeprefix(system)
        if rest.endswith(system_user):
            default = rest.removesuffix(system_user)
    anatomy = Anatomy(
        user=head,
        after_user=after_user,
        assistant=between.removeprefix(after_user),
        after_assistant=after_answer,
        prompt=tail.removeprefix(after_user),
        again=again.removeprefix(after_answer),
        system=system,
        system_user=system_user,
        default=default,
    )
    return _check(anatomy, tokenizer)


def _check(anatomy, tokenizer):
    if '"""' in anatomy.go_template() + str(anatomy.default):
        raise ValueError(f'tokenizer: its template holds """, which ends a field. {RAW_MODE}')
    probes = [_talk(1), _talk(2), [_message("user", HARD)]]
    probes.append([*_talk(1), _message("assistant", HARD), _message("user", "And?")])
    if anatomy.system is not None:
        order = [_message("system", SYSTEM)]
        probes += [
            order + _talk(1),
            order + _talk(2),
            [_message("system", HARD), *_talk(2)],
        ]
    for probe in probes:
        if (expected := _render(tokenizer, probe)) != (got := anatomy.render(probe)):
            raise ValueError(
                "tokenizer: its chat template does more than put fixed texts around the "
                f"messages, so Go's would differ: {expected!r} against {got!r}. {RAW_MODE}"
            )
    return anatomy


def adds_bos(tokenizer):
    """Whether the tokenizer, and so a GGUF made of it, puts BOS before every text."""
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _render(tokenizer, messages, prompt=True):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    # The server adds BOS on its own; a second one in the template spoils the answers.
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def _message(role, content):
    return {"role": role, "content": content}


def _talk(questions):
    messages = []
    for number in range(questions):
        messages.append(_message("user", USERS[number]))
        if number < questions - 1:
            messages.append(_message("assistant", ANSWERS[number]))
    return messages


def _split(text, *contents):
    parts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found:
            raise ValueError(f"it drops or changes the message {content!r}")
        parts.append(before)
    return [*parts, text]


def _closing(closing, *followed):
    # What ends a turn also when nothing follows; some templates add more at the very end.
    return closing if all(text.startswith(closing) for text in followed) else ""


# ── asking ───────────────────────────────────────────────────────────────────────────────
def ollama_chat(model, messages, *, address=None, **options):
    """Ask Ollama over its REST API; returns the answer's text (Chapter 6).

    model: a name from `ollama list`. address: in any form that OLLAMA_HOST may have, which
    is its default ('127.0.0.1', ':11500', 'https://host/path'; nothing: 127.0.0.1:11434).
    options: such as temperature=0, num_predict=64. Raises ValueError for another form,
    ConnectionError with how to install and start Ollama when nobody answers. Not run by
    the course's tests against Ollama itself, whose program cannot be had there.
    """
    address = _url(address or os.environ.get("OLLAMA_HOST", ""))
    payload = {"model": model, "messages": list(messages), "stream": False}
    request = urllib.request.Request(
        f"{address}/api/chat",
        json.dumps(payload | {"options": options}).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=600) as answer:
            return json.load(answer)["message"]["content"]
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:400]
        raise ConnectionError(f"Ollama at {address} refused (HTTP {error.code}): {said}") from None
    except OSError as error:
        raise ConnectionError(f"Ollama does not answer at {address} ({error}). {INSTALL}") from None


def _url(address):
    """The address as Ollama's own client reads it, in full: scheme, host, port, path."""
    text = address.strip().strip("\"'")
    scheme, _, rest = text.rpartition("://")
    try:
        if _version(rest) == 6:  # without its brackets, so without a port
            rest = f"[{rest}]"
        parts = urllib.parse.urlsplit(f"{scheme or 'http'}://{rest}")
        default, host, port = PORTS[scheme.lower()], parts.hostname, parts.port
    except (KeyError, ValueError):
        raise ValueError(
            f"address (or OLLAMA_HOST) must look like 'host', 'host:11434' or "
            f"'http://host:11434', not {address!r}"
        ) from None
    # What a server listens on to be seen from everywhere is no place to call.
    here = {None: "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
    host = here.get(host, host)
    host = f"[{host}]" if _version(host) == 6 else host
    path = parts.path.strip("/")
    return f"{parts.scheme}://{host}:{port or default}{'/' + path if path else ''}"


def _version(host):
    """4 or 6 for an IP address, None for a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return None
