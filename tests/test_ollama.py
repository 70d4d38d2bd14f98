"""Modelfiles: each family's template comes out equal; what cannot be said is refused."""

import functools
import json
import re
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from chat_families import FAMILIES, conversations, tokenizer

from helpers import serving
from helpers.serving import _anatomy

shared = functools.cache(tokenizer)  # for tests that change nothing about it


@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_renders_like_jinja(family):
    made = shared(family)
    template = _anatomy.parse_template(made)
    bos = made.bos_token if _anatomy.adds_bos(made) else ""
    assert bool(bos) == ("bos" in FAMILIES[family])
    for talk in conversations(50, seed=1):
        expected = made.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert bos + template.render(talk) == expected


STOPS = {
    "chatml": "<|im_end|>",
    "qwen": "<|im_end|>",
    "phi-3": "<|end|>",
    "llama-3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_modelfile_has_what_ollama_needs(family):
    text = serving.ollama_modelfile(
        shared(family), "./yoda.gguf", parameters={"temperature": 0, "num_ctx": 1024}
    )
    assert text.startswith("FROM ./yoda.gguf\nTEMPLATE ")
    stops = [json.loads(s) for s in re.findall(r"^PARAMETER stop (.+)$", text, re.M)]
    assert STOPS[family] in stops and FAMILIES[family]["eos"] in stops
    assert "PARAMETER temperature 0\nPARAMETER num_ctx 1024\n" in text
    assert ("SYSTEM" in text) == (family == "qwen")
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1]
    if bos := FAMILIES[family].get("bos"):
        assert bos not in template, "the server adds BOS: twice would be one too many"
    assert "ADAPTER" not in text


def test_adapter_comes_with_its_caveat():
    text = serving.ollama_modelfile(shared("chatml"), "smollm2", adapter="yoda.gguf")
    assert re.search(r"# .*refuse.*\nADAPTER yoda.gguf\n", text)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}<{{ m.content | replace('{', '(') }}>{% endfor %}",
        "{{ messages[-1].content }}",
        "{{ raise_exception('no') }}",
        '{% for m in messages %}"""{{ m.content }}"""{% endfor %}',
        None,
    ],
)
def test_templates_that_go_cannot_say_are_refused(template):
    made = tokenizer("chatml")
    made.chat_template = template
    with pytest.raises(ValueError, match="raw") as error:
        serving.ollama_modelfile(made, "x.gguf")
    assert "tokenizer" in str(error.value)


def test_a_bad_parameter_is_named():
    with pytest.raises(TypeError, match=r"parameters\['seed'\]"):
        serving.ollama_modelfile(shared("chatml"), "x", parameters={"seed": None})


# ── the client, against a server that records what it is asked ───────────────────────────
@pytest.fixture
def recorder():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            found = body["model"] == "yoda"
            reply = {"message": {"content": "Hmm."}} if found else {"error": "not found"}
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_client_speaks_ollamas_rest_dialect(recorder, monkeypatch):
    address, asked = recorder
    monkeypatch.setenv("OLLAMA_HOST", address)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    messages = [{"role": "user", "content": "Hello"}]
    assert serving.ollama_chat("yoda", messages, temperature=0) == "Hmm."
    payload = {"model": "yoda", "messages": messages, "stream": False}
    assert asked == [("/api/chat", payload | {"options": {"temperature": 0}})]
    with pytest.raises(ConnectionError, match="not found"):
        serving.ollama_chat("vader", messages)


# What Ollama's Python client makes of them (its _parse_host). Beyond it: a place to listen
# on is called at its loopback; an IPv6 address without brackets and quotes are understood.
FORMS = {
    "": "http://127.0.0.1:11434",
    "127.0.0.1": "http://127.0.0.1:11434",
    "0.0.0.0": "http://127.0.0.1:11434",
    "0.0.0.0:11500": "http://127.0.0.1:11500",
    ":11500": "http://127.0.0.1:11500",
    "example.com": "http://example.com:11434",
    "example.com:56789/path/": "http://example.com:56789/path",
    "http://example.com": "http://example.com:80",
    "http://0.0.0.0:11434": "http://127.0.0.1:11434",
    "https://example.com": "https://example.com:443",
    "HTTPS://Example.com/": "https://example.com:443",
    "::1": "http://[::1]:11434",
    "[::]:11500": "http://[::1]:11500",
    "[2001:db8::1]/path": "http://[2001:db8::1]:11434/path",
    "https://[2001:db8::1]:56789": "https://[2001:db8::1]:56789",
    ' "localhost:11434"\n': "http://localhost:11434",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_address_is_read_as_ollamas_client_reads_it(form, monkeypatch):
    asked = []

    def refuse(opener, request, timeout):
        asked.append(request.full_url)
        raise OSError("nobody")

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    monkeypatch.setenv("OLLAMA_HOST", form)
    with pytest.raises(ConnectionError, match="nobody"):
        serving.ollama_chat("yoda", [])
    assert asked == [f"{FORMS[form]}/api/chat"]


@pytest.mark.parametrize(
    "form", ["host:port", "host:99999", "ftp://host", "ftp://host:80", "a:b:c", "[::1"]
)
def test_an_address_of_no_form_is_named(form):
    with pytest.raises(ValueError, match="OLLAMA_HOST") as error:
        serving.ollama_chat("yoda", [], address=form)
    assert repr(form) in str(error.value)


def test_client_says_how_to_get_ollama():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="ollama serve"):
            serving.ollama_chat("yoda", [], address=address)
