"""JSON over HTTP, past any proxy: what serves is this machine or one of yours (Chapter 6)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

Messages = list[dict[str, str]]  # each with "role" and "content"


class Refused(ConnectionError):
    """The server answered, and it was an error."""


def ask(url: str, payload: object = None, *, key: str = "", seconds: float = 600) -> Any:
    """POST a payload as JSON, or GET without one; returns the decoded answer.

    Raises `Refused` with the server's words, and OSError when nobody answers.
    """
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    data = None if payload is None else json.dumps(payload).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data, headers), timeout=seconds) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:400]
        raise Refused(f"{url}: HTTP {error.code}: {said}") from None
