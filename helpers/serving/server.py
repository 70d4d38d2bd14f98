"""Serve a GGUF model with llama.cpp on this machine, and ask it (Chapter 6).

    with serving.LlamaServer("model.gguf") as server:
        server.chat([{"role": "user", "content": "Hello?"}])

The server listens on 127.0.0.1 only: nothing outside this machine can reach it, and it
ends with the block. Ollama's side lives in `helpers.ollama`, comparing the two with the
training side in `helpers.parity`.
"""

import atexit
import contextlib
import ctypes
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from helpers.serving import _programs, gguf, llamacpp

HOST = "127.0.0.1"
GREEDY = {"temperature": 0.0, "top_k": 1, "cache_prompt": False}


class LlamaServer:
    """llama.cpp's server for one model, as a context manager (Chapter 6).

    model: path of a GGUF file. adapter: path of an adapter's GGUF, applied on top. port: 0
    takes a free one. context: tokens each request may use. slots: requests served at once.
    template: a Jinja chat template to use instead of the file's own.
    `url` is the address, also of the web page where llama.cpp was built with it. `key` is
    the password that a request must bring along (`Authorization: Bearer …`); a new one each
    time, so that no other program or web page of this machine can ask.

    Raises ValueError for a damaged file and a taken port, RuntimeError with the server's
    last words when it does not start.
    """

    def __init__(self, model, *, adapter=None, port=0, context=1024, slots=4, template=None):
        self.key = secrets.token_urlsafe(24)
        self.model, self.adapter = Path(model), adapter and Path(adapter)
        for path in filter(None, (self.model, self.adapter)):
            gguf.inspect(path)  # says what is wrong with a file better than the server
        self.port = _free_port(port)
        self.context, self.slots, self.template = context, slots, template
        self._process = self._scratch = None

    @property
    def url(self):
        """Where it listens, such as 'http://127.0.0.1:43211'."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self):
        self._scratch = tempfile.TemporaryDirectory(prefix="llama-server-")
        self._log = Path(self._scratch.name, "log")
        with open(self._log, "wb") as log:
            self._process = _start(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment()},
                start_new_session=True,  # Ctrl-C reaches us, and we stop it
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        atexit.register(self.stop)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def _command(self):
        command = [llamacpp.binary("llama-server"), "--model", self.model]
        command += ["--host", HOST, "--port", self.port, "--offline"]
        command += ["--ctx-size", self.context * self.slots, "--parallel", self.slots]
        # Where it has a card it puts as many layers there as fit, by itself.
        command += llamacpp.options("llama-server")
        if self.adapter:
            command += ["--lora", self.adapter]
        if self.template is not None:
            path = Path(self._scratch.name, "template.jinja")
            path.write_text(self.template, encoding="utf-8")
            command += ["--jinja", "--chat-template-file", path]
        return [str(part) for part in command]

    def _environment(self):
        # Not on the command line, where every user of the machine could read the key; and
        # programs too old to know a variable start all the same.
        return {"LLAMA_API_KEY": self.key, "LLAMA_ARG_CORS_ORIGINS": "localhost"}

    def _wait_until_healthy(self, seconds=300):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"llama-server {_programs.how_it_ended(self._process.returncode)} "
                    f"instead of serving {self.model.name}. Its last words:\n{self.log()}"
                )
            with contextlib.suppress(OSError, ConnectionError):  # not listening yet: 503
                # Whoever answers on that port may be somebody else: do not wait long.
                if self._request("/health", None, seconds=2).get("status") == "ok":
                    return
            time.sleep(0.1)
        raise RuntimeError(f"llama-server was not ready after {seconds} s:\n{self.log()}")

    def stop(self):
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
            self._last_words = self.log()
            self._scratch.cleanup()
            self._scratch = None

    def log(self, lines=12):
        """The last lines of what the server said."""
        if self._scratch is None:
            return getattr(self, "_last_words", "")
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    # ── asking ───────────────────────────────────────────────────────────────────────────
    def get(self, path):
        """GET a path of the REST API; returns the decoded JSON."""
        return self._request(path, None)

    def post(self, path, payload):
        """POST `payload` as JSON to a path of the REST API; returns the decoded JSON."""
        return self._request(path, json.dumps(payload).encode())

    def _request(self, path, data, seconds=600):
        if self._process is None:
            raise RuntimeError("the server is not running; use it in a `with` block")
        if (status := self._process.poll()) is not None:
            raise RuntimeError(
                f"the server is not running; it {_programs.how_it_ended(status)}; use it "
                f"in a `with` block\n{self.log()}"
            )
        headers = {"Content-Type": "application/json"}
        headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, data, headers)
        # A proxy of the environment must not see requests to this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise ConnectionError(f"{path}: HTTP {error.code}: {said[:400]}") from None

    def complete(self, prompt, *, max_tokens=64, stop=(), **options):
        """Continue a prompt greedily; returns the new text.

        prompt: text as the model should read it, special tokens included, or token ids.
        stop: texts that end the answer (EOS always does). options: any other field of
        `/completion`.
        """
        payload = {"prompt": prompt, "n_predict": max_tokens, "stop": list(stop)}
        return self.post("/completion", GREEDY | payload | options)["content"]

    def chat(self, messages, *, max_tokens=64, **options):
        """Answer a conversation greedily, through the chat template of the GGUF file."""
        payload = {"messages": list(messages), "max_tokens": max_tokens}
        answer = self.post("/v1/chat/completions", GREEDY | payload | options)
        return answer["choices"][0]["message"]["content"]

    def tokenize(self, text, *, add_special=False):
        """Token ids of a text in which special tokens may be written out.

        add_special: let the server put BOS in front where the model wants one, as it does
        with every prompt.
        """
        payload = {"content": text, "add_special": add_special, "parse_special": True}
        return self.post("/tokenize", payload)["tokens"]

    def apply_template(self, messages):
        """The prompt that `chat` would send: messages through the chat template."""
        return self.post("/apply-template", {"messages": list(messages)})["prompt"]


def _free_port(port):
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise ValueError(f"port must be 0 (any free one) to 65535, not {port!r}")
    with socket.socket() as probe:
        if sys.platform == "win32":  # there SO_REUSEADDR would share a port in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"port={port} cannot be used ({error.strerror}): something else listens "
                "there. Use port=0 for any free one"
            ) from None
        return probe.getsockname()[1]


def _start(command, **settings):
    """`subprocess.Popen` in a thread that lives as long as the process it starts.

    Linux counts a parent's death by the *thread* that started the child: a server started
    in a thread pool or in a widget's callback would be killed when that thread ends.
    """
    answer = queue.SimpleQueue()

    def run():
        try:
            process = subprocess.Popen(command, **settings)
        except BaseException as error:
            answer.put(error)
            return
        answer.put(process)
        process.wait()

    threading.Thread(target=run, daemon=True, name="llama-server").start()
    if isinstance(found := answer.get(), BaseException):
        raise found
    return found


def _die_with_parent():
    # Linux: the kernel stops the server when Python goes, however it goes. Not by SIGTERM:
    # a graceful stop was seen to hang for minutes, and there is nothing to save.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
