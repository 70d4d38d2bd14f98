"""Serve a GGUF model with llama.cpp on this machine, and ask it (Chapter 6).

The server listens on 127.0.0.1 only: nothing outside this machine can reach it, and it
ends with the block. Ollama's side lives in `ollama`, comparing the two with the training
side in `parity`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from helpers import _machine
from helpers._checks import whole_number
from helpers.serving import _rest, gguf, llamacpp
from helpers.serving._rest import Messages

HOST = "127.0.0.1"
GREEDY = {"temperature": 0.0, "top_k": 1, "cache_prompt": False}


class LlamaServer:
    """llama.cpp's server for one model, as a context manager (Chapter 6).

    Args:
        model: path of a GGUF file.
        adapter: path of an adapter's GGUF, applied on top.
        port: 0 takes a free one.
        context: tokens each request may use.
        slots: requests served at once.
        template: a Jinja chat template to use instead of the file's own.

    Attributes:
        key: the password that a request must bring along (`Authorization: Bearer …`); a new
            one each time, so that no other program or web page of this machine can ask.

    Raises:
        ValueError: for a damaged file, a taken port, less than one token or slot, and a model
            and an adapter that changed places.
        RuntimeError: with the server's last words, when it does not start.

    Example:
        >>> with LlamaServer("model.gguf") as server:  # doctest: +SKIP
        ...     server.chat([{"role": "user", "content": "Hello?"}])
    """

    def __init__(
        self,
        model: str | Path,
        *,
        adapter: str | Path | None = None,
        port: int = 0,
        context: int = 1024,
        slots: int = 4,
        template: str | None = None,
    ) -> None:
        self.key = secrets.token_urlsafe(24)
        self.model, self.adapter = Path(model), Path(adapter) if adapter else None
        for name, path in {"model": self.model, "adapter": self.adapter}.items():
            # It says what is wrong with a file better than the server.
            if path and (kind := gguf.inspect(path).metadata.get("general.type", name)) != name:
                raise ValueError(f"{name}={str(path)!r} is a file of the type {kind!r}")
        if template is not None and "{" not in template:
            raise ValueError(f"template must be the text of a Jinja template, not {template!r}")
        self.port, self.template = _free_port(port), template
        self.context, self.slots = whole_number("context", context), whole_number("slots", slots)
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._said = ""

    @property
    def url(self) -> str:
        """Where it listens, also its web page, such as 'http://127.0.0.1:43211'."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        # Linux counts a parent's death by the *thread* that started the child: ours lives as
        # long as the server, yours may be one of a pool or of a widget's callback.
        self._starter = ThreadPoolExecutor(1, "llama-server")
        self._scratch = tempfile.TemporaryDirectory(prefix="llama-server-")
        scratch = Path(self._scratch.name)
        # The key is not on the command line, where every user of the machine could read it;
        # and programs too old to know a variable start all the same.
        own = {"LLAMA_API_KEY": self.key, "LLAMA_ARG_CORS_ORIGINS": "localhost"}
        with open(scratch / "log", "wb") as log:
            self._process = self._starter.submit(
                subprocess.Popen,
                self._command(scratch),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own},
                start_new_session=True,  # Ctrl-C reaches us, and we stop it
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            ).result()
        atexit.register(self.stop)
        try:
            self._wait_until_healthy(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self, scratch: Path) -> list[str]:
        command: list[object] = [llamacpp.binary("llama-server"), "--model", self.model]
        command += ["--host", HOST, "--port", self.port, "--offline"]
        command += ["--ctx-size", self.context * self.slots, "--parallel", self.slots]
        # Where it has a card it puts as many layers there as fit, by itself.
        command += llamacpp.options("llama-server")
        if self.adapter:
            command += ["--lora", self.adapter]
        if self.template is not None:
            path = scratch / "template.jinja"
            path.write_text(self.template, encoding="utf-8")
            command += ["--jinja", "--chat-template-file", path]
        return [str(part) for part in command]

    def _wait_until_healthy(self, process: subprocess.Popen[bytes], seconds: int = 300) -> None:
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            # Not listening yet, or 503. Whoever answers there may be somebody else: do not
            # wait long.
            with contextlib.suppress(OSError, ValueError):
                if _rest.ask(f"{self.url}/health", key=self.key, seconds=2)["status"] == "ok":
                    return
            time.sleep(0.1)
        how = f"was not ready after {seconds} s"
        if process.poll() is not None:
            ended = _machine.how_it_ended(process.returncode)
            how = f"{ended} instead of serving {self.model.name}"
        raise RuntimeError(f"llama-server {how}. Its last words:\n{self.log()}")

    def stop(self) -> None:
        """End the server; does nothing when it has ended."""
        atexit.unregister(self.stop)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._scratch is not None:
            self.log()  # kept
            self._scratch.cleanup()
            self._scratch = None
            self._starter.shutdown()

    def log(self, lines: int = 12) -> str:
        """The last `lines` of what the server said."""
        if self._scratch is not None:
            path = Path(self._scratch.name, "log")
            self._said = path.read_text(encoding="utf-8", errors="replace")
        return "\n".join(self._said.splitlines()[-lines:])

    # ── asking ───────────────────────────────────────────────────────────────────────────
    def get(self, path: str) -> Any:
        """GET a path of the REST API, such as '/health'; returns the decoded JSON."""
        return self.post(path, None)

    def post(self, path: str, payload: dict[str, Any] | None) -> Any:
        """POST `payload` as JSON to a path of the REST API; returns the decoded JSON.

        Raises:
            ConnectionError: with what the server said against it.
            RuntimeError: when the server is not running, or ends while it answers.
            ValueError: for `stream=True`: one answer is returned, whole.
        """
        if self._process is None or self._process.poll() is not None:
            status = self._process.returncode if self._process else None
            how = "" if status is None else f"it {_machine.how_it_ended(status)}; "
            raise RuntimeError(
                f"the server is not running; {how}use it in a `with` block\n{self.log()}"
            )
        try:
            return _rest.ask(self.url + path, payload, key=self.key)
        except _rest.Refused:
            raise
        except (OSError, http.client.HTTPException):
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(1)  # a dying server hangs up first
                how = _machine.how_it_ended(status)
                raise RuntimeError(f"llama-server {how} while answering.\n{self.log()}") from None
            raise

    def complete(
        self,
        prompt: str | list[int],
        *,
        max_tokens: int = 64,
        stop: str | Iterable[str] = (),
        **options: Any,
    ) -> str:
        """Continue a prompt greedily; returns the new text.

        Args:
            prompt: text as the model should read it, special tokens included, or token ids.
            max_tokens: at most so many new tokens.
            stop: a text that ends the answer, or several (EOS always does).
            options: any other field of `/completion`.
        """
        if not isinstance(prompt, str) and any(isinstance(part, str) for part in prompt):
            raise TypeError("prompt must be one text or its token ids: ask several in turn")
        asked: dict[str, Any] = GREEDY | {"prompt": prompt}
        asked["n_predict"] = whole_number("max_tokens", max_tokens)
        asked["stop"] = [stop] if isinstance(stop, str) else list(stop)
        answer = self.post("/completion", asked | options)
        return _whole_characters(answer["content"], answer.get("stop_type") == "limit")

    def chat(self, messages: Messages, *, max_tokens: int = 64, **options: Any) -> str:
        """Answer a conversation greedily, through the chat template of the GGUF file.

        Args:
            messages: dicts with 'role' and 'content'.
            max_tokens: at most so many new tokens.
            options: any other field of `/v1/chat/completions`. A thinking model's thoughts are
                part of the answer; `reasoning_format="auto"` cuts them off.

        Raises:
            ValueError: for an answer without text: thoughts alone, or a call of a tool.
        """
        payload = {"messages": list(messages), "max_tokens": whole_number("max_tokens", max_tokens)}
        asked = GREEDY | {"reasoning_format": "none"} | payload | options
        choice = self.post("/v1/chat/completions", asked)["choices"][0]
        said, cut = _rest.words(choice["message"]), choice["finish_reason"] == "length"
        return _whole_characters(said, cut)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: may hold special tokens, written out.
            add_special: let the server put BOS in front where the model wants one, as it
                does with every prompt.
        """
        payload = {"content": text, "add_special": add_special, "parse_special": True}
        return self.post("/tokenize", payload)["tokens"]

    def apply_template(self, messages: Messages) -> str:
        """The prompt that `chat` would send: messages through the chat template."""
        return self.post("/apply-template", {"messages": list(messages)})["prompt"]


def _whole_characters(text: str, cut: bool) -> str:
    # An answer cut inside an emoji ends with the sign for bytes that are no character.
    return text.rstrip("\ufffd") if cut else text


def _free_port(port: int) -> int:
    whole_number("port", port, 0, 65535)
    try:
        with socket.create_server((HOST, port)) as probe:
            return probe.getsockname()[1]
    except OSError as error:
        raise ValueError(
            f"port={port} cannot be used ({error.strerror}): something else listens there. "
            "Use port=0 for any free one"
        ) from None


if sys.platform == "linux":  # loaded here: a fork of a process with threads must not
    _prctl = ctypes.CDLL(None).prctl


def _die_with_parent() -> None:
    # Linux: the kernel stops the server when Python goes, however it goes. Not by SIGTERM:
    # a graceful stop was seen to hang for minutes, and there is nothing to save.
    _prctl(1, signal.SIGKILL)
