"""Shared by all tests: one copy of the embedded model and its tokenizer per run."""

import os
import signal

import pytest

# Tests are many small operations: two processes of one thread each beat one process of
# two threads, and two of two would only wait for each other.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in the background deaf to Ctrl-C, and so would be what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


collect_ignore = ["era2024"]  # code of 2024, and a file that only 2024's run may find
LONGEST = [f"test_chapters_run_top_to_bottom[Chapter{number}]" for number in (5, 6, 3, 2, 1, 4)]


def pytest_collection_modifyitems(items):
    """The longest tests first: else one worker may begin Chapter 5 when the other is done."""
    items.sort(key=lambda item: LONGEST.index(item.name) if item.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def embedded():
    """The embedded model in float32, shared; do not change it (deepcopy instead)."""
    from helpers import models

    model = models.load_model(models.EMBEDDED, device="cpu", attention="sdpa")
    return model.requires_grad_(False)


@pytest.fixture
def tokenizer():
    """A fresh copy of the embedded model's tokenizer, as shipped."""
    from helpers import models

    return models.load_tokenizer(models.EMBEDDED)


@pytest.fixture(autouse=True)
def own_progress(monkeypatch, tmp_path):
    """Exercises solved by a test are not written into the progress of whoever runs it."""
    from helpers.course.exercises import _progress

    monkeypatch.setattr(_progress, "path", lambda: tmp_path / _progress.FILE)
