import contextlib
import dataclasses
import http.server
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from helpers import _machine, runtime


def test_detect_describes_this_machine():
    here = runtime.detect()
    assert here.platform in ("colab", "kaggle", "runpod", "local")
    assert here.attention == "sdpa", "flash attention is asked for, never assumed"
    assert here.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert here.profile == ("gpu" if here.device == "cuda" else "cpu")
    assert here.compute_dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert here.memory_bytes > 2**30
    assert str(here.compute_dtype).removeprefix("torch.") in str(here)
    assert "<table>" in here._repr_html_()


@pytest.mark.parametrize(
    ("variable", "platform"),
    [
        ("COLAB_RELEASE_TAG", "colab"),
        ("RUNPOD_POD_ID", "runpod"),
        ("KAGGLE_KERNEL_RUN_TYPE", "kaggle"),
        (None, "local"),
    ],
)
def test_platform_is_read_from_the_environment(monkeypatch, variable, platform):
    for name in ("COLAB_RELEASE_TAG", "RUNPOD_POD_ID", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "x")
    assert runtime.detect().platform == platform


def test_start_makes_random_numbers_repeat():
    runtime.start(7)
    first = torch.rand(3)
    runtime.start(7)
    assert torch.equal(first, torch.rand(3))


def test_start_refuses_a_seed_that_is_no_number():
    with pytest.raises(TypeError, match="seed must be a whole number"):
        runtime.start("lucky")


def test_native_dtype_refuses_an_unknown_device():
    with pytest.raises(ValueError, match="'cpu', 'cuda', not 'tpu'"):
        runtime.native_dtype("tpu")


@pytest.mark.parametrize(
    ("flags", "vendor", "dtype", "words"),
    [
        ("avx2 fma", "AuthenticAMD", torch.float32, "no fast bfloat16"),
        ("avx2 avx512_bf16", "AuthenticAMD", torch.bfloat16, "AVX-512 BF16"),
        ("avx512_bf16", "GenuineIntel", torch.float32, "no fast bfloat16"),
        ("avx512_bf16 amx_bf16 amx_tile", "GenuineIntel", torch.float32, "HELPERS_DTYPE"),
        ("", "", torch.float32, "no fast bfloat16"),
    ],
)
def test_the_processors_dtype_follows_a_rule_and_never_a_race(
    monkeypatch, flags, vendor, dtype, words
):
    monkeypatch.delenv(runtime.DTYPE_VARIABLE, raising=False)
    monkeypatch.setattr(_machine, "processor", lambda: (set(flags.split()), vendor))
    assert runtime.native_dtype("cpu") == dtype
    assert words in runtime.native_dtype_reason("cpu")


def test_this_processor_is_read_as_the_system_lists_it():
    flags, vendor = _machine.processor()
    if Path("/proc/cpuinfo").is_file():
        assert vendor in Path("/proc/cpuinfo").read_text()
        assert flags == set() or {"fpu", "sse2"} <= flags


def test_the_variable_overrides_the_dtype_and_is_checked(monkeypatch):
    monkeypatch.setenv(runtime.DTYPE_VARIABLE, "bfloat16")
    here = runtime.detect()
    assert here.compute_dtype == torch.bfloat16
    assert "bfloat16 (HELPERS_DTYPE says so)" in str(here)
    for wrong in ("int8", "float16"):  # float16 needs a gradient scaler, and a card
        monkeypatch.setenv(runtime.DTYPE_VARIABLE, wrong)
        with pytest.raises(ValueError, match=rf"HELPERS_DTYPE must be one of .*not '{wrong}'"):
            runtime.native_dtype("cpu")


class Mirror(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status and after the delay of its class."""

    status, delay = 404, 0.0

    def do_GET(self):
        time.sleep(self.delay)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(self.status)
            self.end_headers()

    def log_message(self, *_):
        """Not into the test's output."""


@pytest.fixture
def mirror(monkeypatch):
    """A server on this machine that `HF_ENDPOINT` names, and nothing known yet."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    handler = type("OneMirror", (Mirror,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        runtime.hub_reachable.cache_clear()
        yield handler
        runtime.hub_reachable.cache_clear()
        server.shutdown()


@pytest.mark.parametrize("status", [200, 403, 404, 503])
def test_a_mirror_that_answers_is_the_hub(mirror, status):
    mirror.status = status
    assert runtime.hub_reachable() is True


@pytest.mark.parametrize(
    ("error", "there"),
    [
        (urllib.error.URLError(ssl.SSLCertVerificationError("unknown issuer")), True),
        (urllib.error.URLError(OSError("no route")), False),
        (http.client.BadStatusLine("a captive portal"), False),
    ],
)
def test_certificates_that_only_python_lacks_are_no_missing_hub(monkeypatch, mirror, error, there):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert runtime.hub_reachable() is there


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_variable_of_yours_is_not_undone(monkeypatch, mirror, name):
    monkeypatch.setenv(name, "1")
    assert runtime.hub_reachable() is False


def test_an_answer_that_comes_late_is_waited_for_once_more(mirror):
    mirror.delay = 0.6
    assert runtime.hub_reachable(timeout=0.4) is True
    runtime.hub_reachable.cache_clear()
    assert runtime.hub_reachable(timeout=0.1) is False


def test_nobody_there_is_offline_in_this_process_only_and_asked_again(mirror, monkeypatch):
    import datasets
    from huggingface_hub import constants

    there = os.environ["HF_ENDPOINT"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
    assert runtime.start().offline is True and constants.HF_HUB_OFFLINE is True
    assert datasets.config.HF_HUB_OFFLINE is True
    assert "HF_HUB_OFFLINE" not in os.environ, "no child inherits it"
    monkeypatch.setenv("HF_ENDPOINT", there)
    assert runtime.start().offline is False and constants.HF_HUB_OFFLINE is False
    assert datasets.config.HF_HUB_OFFLINE is False, "asked again, all agree"


def test_a_card_without_the_hub_says_loudly_which_model_it_gets():
    here = runtime.detect()
    card = dataclasses.replace(here, device="cuda", offline=True)
    assert "small embedded model" in str(card) and "✗" in card._repr_html_()
    for calm in (dataclasses.replace(card, offline=False), here):
        assert calm.warning == "" and "✗" not in calm._repr_html_()


# ── what a container leaves us ───────────────────────────────────────────────────────────
def control_group(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory_dot_max": "2000000000\n",
            "memory_dot_current": "1500000000\n",
            "memory_dot_stat": "anon 5\ninactive_file 500000000\n",
            "cpu_dot_max": "150000 100000\n",
        },
        {
            "memory__memory_dot_limit_in_bytes": "2000000000\n",
            "memory__memory_dot_usage_in_bytes": "1500000000\n",
            "memory__memory_dot_stat": "total_inactive_file 500000000\n",
            "cpu__cpu_dot_cfs_quota_us": "150000\n",
            "cpu__cpu_dot_cfs_period_us": "100000\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_containers_limits_are_respected(monkeypatch, tmp_path, files):
    monkeypatch.setattr(_machine, "CGROUP", control_group(tmp_path, **files))
    assert runtime.memory_bytes("cpu") == 2 * 10**9
    assert runtime.available_memory_bytes() == 10**9
    assert runtime.usable_cores() == 1


@pytest.mark.parametrize("text", ["max", "9223372036854771712", ""])
def test_no_limit_is_the_machines_own(monkeypatch, tmp_path, text):
    files = {"memory_dot_max": text, "cpu_dot_max": "max 100000"}
    monkeypatch.setattr(_machine, "CGROUP", control_group(tmp_path, **files))
    assert runtime.memory_bytes("cpu") == psutil.virtual_memory().total
    assert 0 < runtime.available_memory_bytes() <= psutil.virtual_memory().total
    assert 1 <= runtime.usable_cores() <= os.cpu_count()


# ── flash attention ──────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("card", "module", "words"),
    [
        (None, None, "needs a CUDA card"),
        ((7, 5), "", r"needs compute capability 8.0 .* has 7.5"),
        ((8, 9), None, "not installed"),
        (
            (8, 9),
            "raise ImportError('undefined symbol: _ZN3c10')",
            r"cannot be loaded .*_ZN3",
        ),
        ((9, 0), "", None),
    ],
)
def test_flash_attention_is_more_than_an_installed_package(
    monkeypatch, tmp_path, card, module, words
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    if module is not None:
        (tmp_path / "flash_attn.py").write_text(module)
        monkeypatch.syspath_prepend(tmp_path)
    problem = _machine.flash_attention_problem()
    sys.modules.pop("flash_attn", None)
    assert problem is None if words is None else re.search(words, problem)


def test_cache_folder_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv(runtime.CACHE_VARIABLE, str(tmp_path / "a" / "b"))
    assert runtime.cache_folder() == tmp_path / "a" / "b"
    assert runtime.cache_folder().is_dir()


def test_cache_folder_that_cannot_be_made_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(runtime.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=runtime.CACHE_VARIABLE):
        runtime.cache_folder()


def test_on_a_pod_the_cache_lies_on_the_volume(monkeypatch, tmp_path):
    monkeypatch.delenv(runtime.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.setenv("RUNPOD_POD_ID", "pod")
    monkeypatch.setattr(runtime, "POD_VOLUME", tmp_path)
    assert tmp_path in runtime.cache_folder().parents


def test_offline_is_believed_when_the_variable_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runtime.hub_reachable.cache_clear()
    assert runtime.hub_reachable() is False
    runtime.hub_reachable.cache_clear()


def test_import_helpers_is_light():
    code = (
        "import sys, helpers, helpers.runtime, helpers.models, helpers.memory, helpers.__main__;"
        "heavy = {'torch', 'transformers', 'trl', 'pandas'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or None)"
    )
    root = Path(runtime.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr


def test_helpers_knows_its_modules_and_nothing_else():
    import helpers

    assert helpers.runtime is runtime
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = helpers.nonsense


@pytest.mark.gpu
def test_on_a_card_the_dtype_is_native():
    major, _ = torch.cuda.get_device_capability()
    expected = torch.bfloat16 if major >= 8 else torch.float16
    assert runtime.detect().compute_dtype == expected
