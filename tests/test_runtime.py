import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import runtime


def test_detect_describes_this_machine():
    here = runtime.detect()
    assert here.platform in ("colab", "runpod", "local")
    assert here.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert here.profile == ("gpu" if here.device == "cuda" else "cpu")
    assert here.compute_dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert here.memory_bytes > 2**30
    assert str(here.compute_dtype).removeprefix("torch.") in str(here)
    assert "<table>" in here._repr_html_()


@pytest.mark.parametrize(
    ("variable", "platform"),
    [("COLAB_RELEASE_TAG", "colab"), ("RUNPOD_POD_ID", "runpod"), (None, "local")],
)
def test_platform_is_read_from_the_environment(monkeypatch, variable, platform):
    for name in ("COLAB_RELEASE_TAG", "RUNPOD_POD_ID"):
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
    with pytest.raises(TypeError, match="seed must be an int"):
        runtime.start("lucky")


def test_native_dtype_refuses_an_unknown_device():
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        runtime.native_dtype("tpu")


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
        "import sys, helpers, helpers.runtime, helpers.models, helpers.notebooks;"
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
