"""Ollama: a Modelfile from a tokenizer, and a client (Chapter 6).

Since 0.30 (May 2026) Ollama starts llama.cpp's server and lets it read the chat template in
the GGUF file, so a file that carries the trained one needs no TEMPLATE. Older versions, and
files without a template, want one in Go's language: `_anatomy` takes the tokenizer's own
apart and writes it in Go, or refuses.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from helpers.serving import _rest
from helpers.serving._anatomy import GoTemplate, parse_template, quoted, stop_words, take_apart
from helpers.serving._rest import Messages
from helpers.serving.parity import carried

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ollama_chat", "ollama_modelfile"]

PORTS = {"": 11434, "http": 80, "https": 443}  # where an address names no port
# What a server listens on to be seen from everywhere is no place to call.
LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
INSTALL = (
    "Install it from ollama.com/download (macOS, Windows), with its shell script on Linux "
    "and on a pod, in Colab with the same script and `ollama serve &` in a terminal; then "
    "`ollama serve` must be running"
)


def ollama_modelfile(
    tokenizer: PreTrainedTokenizerBase,
    source: object,
    *,
    adapter: object = None,
    parameters: Mapping[str, object] | None = None,
) -> str:
    """Ollama's Modelfile for a model and its chat template, as text (Chapter 6).

    `FROM` and your parameters, where the GGUF file carries the tokenizer's own template;
    otherwise a TEMPLATE in Go's language and stop words besides.

    Args:
        tokenizer: the one that trained.
        source: path of a GGUF file, or the name of a model Ollama has.
        adapter: path of an adapter's GGUF; `ollama create` refuses it since 0.34.1, so prefer
            a merged model.
        parameters: such as {'temperature': 0, 'stop': ['###', 'Q:']}.

    Raises:
        ValueError: when a TEMPLATE is needed and cannot be said in Go's language, or writes
            the date of the day or strips thoughts; and for what a Modelfile cannot hold.

    Example:
        >>> text = ollama_modelfile(tokenizer, "./yoda.gguf")  # doctest: +SKIP
    """
    lines = [f"FROM {_one_line('source', source)}"]
    if adapter is not None:
        lines.append("# Ollama refuses ADAPTER since 0.34.1 (ollama/ollama#14969): merge instead.")
        lines.append(f"ADAPTER {_one_line('adapter', adapter)}")
    settings = []
    if carried(source)[0] == tokenizer.chat_template is not None:
        template = take_apart(tokenizer)
    else:
        template = parse_template(tokenizer)
        lines.append(f'TEMPLATE """{template.text()}"""')
        lost = "tool messages, system messages" + " after the first" * (template.system is not None)
        lines.append(f"# Ollama drops what TEMPLATE does not say: tool calls, {lost}.")
        if template.default:
            lines.append(f'SYSTEM """{template.default}"""')
        settings = [("stop", quoted("stop", word)) for word in stop_words(tokenizer, template)]
    for name, value in (parameters or {}).items():
        values = value if name == "stop" and isinstance(value, list | tuple) else [value]
        settings += [(name, _setting(name, each, template)) for each in values]
    lines += [f"PARAMETER {name} {value}" for name, value in dict.fromkeys(settings)]
    return "\n".join(lines) + "\n"


# ── what a Modelfile can hold ────────────────────────────────────────────────────────────
def _one_line(name: str, value: object) -> str:
    text = "" if value is None else str(value)
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{name} must be a path or a name of one line, not {value!r}")
    return text


def _setting(name: str, value: object, template: GoTemplate) -> str:
    where = f"parameters[{name!r}]"
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise ValueError(f"{where}: a parameter's name has letters, digits and _ only")
    if isinstance(value, str):
        if name == "stop" and value in template.opening:
            raise ValueError(
                f"{where}: each answer itself begins with {template.opening!r}, so "
                f"{value!r} would cut it to nothing"
            )
        return quoted(where, value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{where} must be a number or text (several only for stop), not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, not {value!r}")
    if isinstance(value, numbers.Integral):  # NumPy's as well
        return str(int(value)) if not isinstance(value, bool) else str(value).lower()
    return repr(float(value))


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
    payload: dict[str, Any] = {"model": model, "messages": list(messages), "options": options}
    payload["stream"] = options.get("stream", False)  # refused, in words
    try:
        return _rest.words(_rest.ask(f"{url}/api/chat", payload)["message"])
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
