"""llama.cpp's server: started, asked, always stopped; clear words for what goes wrong."""

import contextlib
import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from chat_families import FAMILIES, conversations, tokenizer

from helpers import models, serving
from helpers.course import notebooks
from helpers.serving import gguf, llamacpp, parity
from helpers.serving.server import GREEDY, HOST

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def tiny_gguf(family, folder):
    """A random one-layer model that speaks a family's format, as GGUF."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tokenizer(family)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "vocab_size": len(made)}
    ends = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    config = LlamaConfig(**shape, **ends, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    if FAMILIES[family].get("bos"):
        # llama.cpp adds BOS by a flag in the file, the tokenizer by a processor; the
        # converter recognizes a tokenizer by what it does without one.
        made.backend_tokenizer.post_processor = models.load_tokenizer(
            models.EMBEDDED
        ).backend_tokenizer.post_processor
    made.save_pretrained(folder)
    if FAMILIES[family].get("bos"):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    return gguf.convert_model(folder, folder / f"{family}.gguf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gguf("chatml", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def embedded_f16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    return gguf.convert_model(models.embedded_folder(), folder / "f16.gguf")


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


# ── asked ────────────────────────────────────────────────────────────────────────────────
def test_it_answers_on_this_machine_only_and_is_gone_afterwards(embedded_f16):
    with serving.LlamaServer(embedded_f16) as server:
        assert server.get("/health") == {"status": "ok"}
        assert "Paris" in server.chat(QUESTION)
        prompt = server.apply_template(QUESTION)
        assert prompt.endswith("<|im_start|>assistant\n")
        assert "Paris" in server.complete(prompt)
        ids = server.tokenize(prompt)
        assert server.complete(ids) == server.complete(prompt)
        process = psutil.Process(server._process.pid)
        places = {c.laddr.ip for c in process.net_connections() if c.status == "LISTEN"}
        assert places == {"127.0.0.1"}
    assert not process.is_running()
    assert not listening(server.port)
    with pytest.raises(RuntimeError, match="not running"):
        server.chat(QUESTION)


def test_five_hundred_requests_thirty_two_at_a_time(embedded_f16, tmp_path):
    """None lost, none mixed up: every answer carries its own prompt back."""
    small = gguf.quantize(embedded_f16, tmp_path / "q8.gguf", "Q8_0")
    questions = [f"Write the number {n}." for n in range(100, 150)]
    prompts = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in questions]

    def ask(prompt):
        payload = GREEDY | {"prompt": prompt, "n_predict": 4}
        return server.post("/completion", payload)

    with serving.LlamaServer(small, context=256, slots=8) as server:
        alone = {prompt: ask(prompt)["content"] for prompt in prompts}
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(ask, prompts * 10))
        assert server.get("/health") == {"status": "ok"}
    assert len(answers) == 500
    for prompt, answer in zip(prompts * 10, answers, strict=True):
        assert questions[prompts.index(prompt)] in answer["prompt"]
        assert answer["tokens_predicted"] > 0
    # Batched with others, a close call may fall the other way; a mix-up would be many.
    same = sum(a["content"] == alone[p] for p, a in zip(prompts * 10, answers, strict=True))
    assert same >= 450, Counter(a["content"] for a in answers).most_common(5)
    assert len(set(alone.values())) > 10, "the answers tell the prompts apart"


def test_an_unknown_path_and_bad_json_are_errors_of_the_request(tiny):
    with serving.LlamaServer(tiny) as server:
        with pytest.raises(ConnectionError, match=r"/no-such-page: HTTP 404"):
            server.get("/no-such-page")
        with pytest.raises(ConnectionError, match=r"HTTP [45]\d\d"):
            server.post("/v1/chat/completions", {"messages": "none"})
        assert server.get("/health") == {"status": "ok"}, "it is still there"


def test_a_client_that_hangs_up_does_not_stop_it(tiny):
    with serving.LlamaServer(tiny) as server:
        for _ in range(5):
            client = http.client.HTTPConnection(HOST, server.port, timeout=5)
            body = json.dumps({"prompt": "Once", "n_predict": 500})
            client.request("POST", "/completion", body, {"Content-Type": "application/json"})
            client.close()
        assert server.complete("Once", max_tokens=3) is not None


# ── safe ─────────────────────────────────────────────────────────────────────────────────
def test_nobody_asks_without_the_key_and_no_page_from_elsewhere(tiny):
    with serving.LlamaServer(tiny) as server, serving.LlamaServer(tiny) as other:
        assert server.key != other.key and len(server.key) > 20
        for headers in ({}, {"Authorization": f"Bearer {other.key}"}):
            client = http.client.HTTPConnection(HOST, server.port, timeout=10)
            client.request("GET", "/v1/models", headers=headers)
            assert client.getresponse().status == 401
            client.close()
        assert server.get("/v1/models")["data"], "with the key it answers"
        client = http.client.HTTPConnection(HOST, server.port, timeout=10)
        client.request("GET", "/health", headers={"Origin": "https://example.com"})
        answer = client.getresponse()
        assert answer.status == 200 and "Access-Control-Allow-Origin" not in answer.headers
        client.close()
        command = psutil.Process(server._process.pid).cmdline()
        assert server.key not in " ".join(command), "other users can read a command line"
        said = server.log(10_000)
    assert "security" not in said and "CORS allows" not in said


# ── a processor that refuses llama.cpp's fastest kernels ─────────────────────────────────
REFUSES = """#!/bin/sh
case "$*" in
  *--version* | *--list-devices* | *--no-repack*) exec '{real}' "$@" ;;
esac
kill -ILL $$
"""


@pytest.mark.skipif(os.name == "nt", reason="shell scripts and signals")
def test_quantized_files_are_measured_and_served_all_the_same(
    embedded_f16, tmp_path, monkeypatch, capsys
):
    """What a cloud machine does that lists AMX and refuses it, imitated."""
    for name in llamacpp.PROGRAMS:
        text = REFUSES.format(real=llamacpp.binary(name))
        if name == "llama-quantize":  # computes nothing with these kernels
            text = text.replace("kill -ILL $$", f"exec '{llamacpp.binary(name)}' \"$@\"")
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv(llamacpp.VARIABLE, str(tmp_path))
    small = gguf.quantize(embedded_f16, tmp_path / "q8.gguf", "Q8_0")
    table = gguf.fidelity(embedded_f16, {"Q8_0": small}, "Once upon a time. " * 12)
    assert table.loc["Q8_0", "mean KL"] < 0.1
    with serving.LlamaServer(small) as server:
        assert "France" in server.chat(QUESTION)
    assert "SIGILL" in llamacpp.trouble() and "SIGILL" in capsys.readouterr().out


def test_a_server_that_is_killed_says_by_what(tiny):
    with serving.LlamaServer(tiny) as server:
        os.kill(server._process.pid, signal.SIGKILL)
        server._process.wait(10)
        with pytest.raises(RuntimeError, match="killed by SIGKILL: most likely"):
            server.get("/health")


# ── always stopped ───────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_stops_when_the_block_fails(tiny, error):
    with pytest.raises(error), serving.LlamaServer(tiny) as server:
        raise error
    assert not listening(server.port)
    server.stop()  # once more does nothing


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_it_does_not_outlive_its_python(tiny, how):
    code = (
        "import sys, time; from helpers import serving\n"
        "with serving.LlamaServer(sys.argv[1]) as server:\n"
        "    print(server._process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny)],
        cwd=notebooks.root(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(how)
    parent.wait(20)
    parent.stdout.close()
    child.wait(20)
    assert not child.is_running()


def test_it_outlives_the_thread_that_started_it(tiny):
    """Linux counts a parent's death by the thread that started the child."""
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(1) as pool:
            server = pool.submit(stack.enter_context, serving.LlamaServer(tiny)).result()
        time.sleep(0.5)  # that thread is gone
        assert server.get("/health") == {"status": "ok"}
    assert not listening(server.port)


# ── said in words ────────────────────────────────────────────────────────────────────────
def test_a_taken_port_is_named(tiny):
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port} cannot be used.*port=0"):
            serving.LlamaServer(tiny, port=port)


@pytest.mark.parametrize("port", [-1, 65536, "8080", True, None])
def test_a_port_of_another_kind_is_named(tiny, port):
    with pytest.raises((TypeError, ValueError), match="port must be"):
        serving.LlamaServer(tiny, port=port)


def test_a_port_taken_in_the_last_moment_ends_with_the_server_s_words(tiny):
    server = serving.LlamaServer(tiny)
    with (
        socket.create_server((HOST, server.port)),
        pytest.raises(RuntimeError, match="instead of serving"),
        server,
    ):
        pytest.fail("two servers on one port")
    assert server._process.poll() is not None


@pytest.mark.parametrize("share", [0.2, 0.999])
def test_a_truncated_model_is_refused_before_anything_starts(tiny, tmp_path, share):
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny.read_bytes()[: int(tiny.stat().st_size * share)])
    with pytest.raises(ValueError, match="cut short or damaged"):
        serving.LlamaServer(short)
    with pytest.raises(ValueError, match="cut short or damaged"):
        serving.LlamaServer(tiny, adapter=short)


def test_a_missing_or_other_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such"):
        serving.LlamaServer(tmp_path / "no-such.gguf")
    (tmp_path / "page.gguf").write_text("<html>not a model</html>")
    with pytest.raises(ValueError, match=r"no GGUF file: it begins with b'<htm'"):
        serving.LlamaServer(tmp_path / "page.gguf")


def test_a_template_that_cannot_be_parsed_ends_with_the_server_s_words(tiny):
    with (
        pytest.raises(RuntimeError, match="Its last words"),
        serving.LlamaServer(tiny, template="{% for m in messages %}"),
    ):
        pytest.fail("it should not have started")


# ── the prompts of training ──────────────────────────────────────────────────────────────
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_exact_on_200_conversations_text_and_tokens(family, tmp_path):
    path = tiny_gguf(family, tmp_path)
    with serving.LlamaServer(path) as server:
        report = serving.template_parity(tokenizer(family), conversations(200), server=server)
    assert report.exact, str(report)
    assert report.conversations == 200


TRAPS = {
    "double_bos": lambda t: "{{ '<|im_start|>' }}" + t,
    "missing_generation_prompt": lambda t: t.replace("add_generation_prompt", "false"),
    "trailing_newline": lambda t: t + "{{ '\n' }}",
    "different_text": lambda t: t.replace("message['role'] +", "'human' +", 1),
}


@pytest.mark.parametrize("code", TRAPS)
def test_each_trap_is_caught_at_the_server(code, tiny):
    ours = tokenizer("chatml")
    wrong = TRAPS[code](ours.chat_template)
    assert wrong != ours.chat_template
    with serving.LlamaServer(tiny, template=wrong) as server:
        report = serving.template_parity(ours, conversations(6), server=server)
    assert code in report.codes, str(report)
    assert parity.WHY[code] in str(report)


# ── the same answers at every station ────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A quick adapter on the embedded model: saved, merged, and what it answers."""
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig

    from helpers import chat, data, generation, runtime, training

    folder = tmp_path_factory.mktemp("tuned")
    here = runtime.start()
    ours = models.load_tokenizer(models.EMBEDDED)
    ours.chat_template = chat.chatml_template()
    chat.prepare_tokenizer(ours)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(models.load_model(models.EMBEDDED, attention="eager"), lora)
    settings = {"max_steps": 24, "learning_rate": 2e-3, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 4, "warmup_steps": 4}
    trainer = training.LeanSFTTrainer(
        model=chat.prepare_model(model, ours),
        args=SFTConfig(str(folder / "run"), **settings, **training.machine_settings(here)),
        train_dataset=data.load_yoda("train").shuffle(seed=0).select(range(96)),
        processing_class=ours,
        callbacks=[training.LiveLoss()],
    )
    trainer.train()
    model.save_pretrained(folder / "adapter")
    ours.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(folder / "merged")
    ours.save_pretrained(folder / "merged")
    talks = [row["prompt"] for row in data.load_yoda("test").select(range(60))]
    prompts = [generation.chat_prompt(ours, talk) for talk in talks]
    answers = generation.generate(merged, ours, prompts, max_new_tokens=32)
    return folder, ours, talks, answers


@pytest.mark.parametrize("way", ["merged", "adapter"])
def test_greedy_answers_are_pytorch_s(way, tuned):
    folder, ours, talks, answers = tuned
    if way == "merged":
        path, options = gguf.convert_model(folder / "merged", folder / "merged.gguf"), {}
    else:
        base = models.embedded_folder()
        path = gguf.convert_model(base, folder / "base.gguf")
        adapter = gguf.convert_adapter(folder / "adapter", base, folder / "adapter.gguf")
        options = {"adapter": adapter, "template": ours.chat_template}
    with serving.LlamaServer(path, **options) as server, ThreadPoolExecutor(2) as pool:
        served = list(pool.map(lambda talk: server.chat(talk, max_tokens=32).strip(), talks))
    differing = [(a, b) for a, b in zip(answers, served, strict=True) if a != b]
    assert len(differing) <= 0.05 * len(talks), differing
    assert len(set(served)) > 40, "real answers, not one for all"


# ── the web page ─────────────────────────────────────────────────────────────────────────
def test_the_web_page_is_there_or_its_absence_is_known(tiny):
    with serving.LlamaServer(tiny) as server:
        client = http.client.HTTPConnection(HOST, server.port, timeout=10)
        client.request("GET", "/", headers={"Accept-Encoding": "gzip"})
        answer = client.getresponse()
        page = answer.read()
        client.close()
    if os.environ.get(llamacpp.VARIABLE) or not llamacpp.has_web_page():
        pytest.skip("these programs were built without the page: llamacpp.build(web_page=True)")
    assert answer.status == 200, page[:200]
    if answer.headers["Content-Encoding"] == "gzip":
        page = gzip.decompress(page)
    assert b"<html" in page.lower()


def test_starting_takes_turns_on_free_ports(tiny):
    start = time.monotonic()
    with serving.LlamaServer(tiny) as one, serving.LlamaServer(tiny) as two:
        assert one.port != two.port
        assert one.get("/health") == two.get("/health") == {"status": "ok"}
    assert time.monotonic() - start < 120
