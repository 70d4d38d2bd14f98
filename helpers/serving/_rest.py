"""JSON over HTTP, past any proxy: what serves is this machine or one of yours (Chapter 6)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

Messages = list[dict[str, str]]  # each with "role" and "content"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Refused(ConnectionError):
    """The server answered, and it was an error."""


def ask(url: str, payload: object = None, *, key: str = "", seconds: float = 600) -> Any:
    """POST a payload as JSON, or GET without one; returns the decoded answer.

    Raises `Refused` with the server's words, OSError when nobody answers, and ValueError for a
    payload that asks for a stream.
    """
    if isinstance(payload, dict) and payload.get("stream"):
        raise ValueError(
            "stream=True: answers are returned whole here. For a stream ask the URL with a client "
            "of OpenAI's protocol, or with urllib, and read the lines that begin with 'data: '"
        )
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    data = None if payload is None else json.dumps(payload).encode()
    try:
        with DIRECT.open(urllib.request.Request(url, data, headers), timeout=seconds) as answer:
            said = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:400]
        raise Refused(f"{url}: HTTP {error.code}: {said}") from None
    try:
        return json.loads(said)
    except ValueError:
        raise Refused(f"{url}: answered, but no JSON: {said[:200]!r}") from None


def words(message: dict[str, Any]) -> str:
    """An answer's text; ValueError for one that holds thoughts or calls of a tool alone."""
    for field in ("reasoning_content", "thinking", "tool_calls"):
        if (found := message.get(field)) and not message.get("content"):
            raise ValueError(
                f"the answer has no text, only {field}: {found!r:.200}. Allow more tokens, or ask "
                "the REST API itself (`server.post`), which returns everything"
            )
    return message.get("content") or ""
