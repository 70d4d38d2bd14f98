"""The course in a real browser: JupyterLab, stored pages as HTML, the server's web page."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from browser import needs_browser, open_page

from helpers import models, serving
from helpers.course import notebooks
from helpers.serving import gguf, llamacpp

pytestmark = [pytest.mark.slow, needs_browser]
ROOT = notebooks.root()


# ── JupyterLab ───────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def jupyterlab(folder, tmp_path):
    """JupyterLab on `folder`, this machine only; yields the address of a notebook."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # Otherwise only the cells in view are on the page.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip", "127.0.0.1"]
    command += ["--port", str(port), f"--IdentityProvider.token={token}"]
    command += ["--expose-app-in-browser", f"--ServerApp.root_dir={folder}"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    environment |= {"JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    with open(tmp_path / "lab.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{address}/api?token={token}"), 180, "JupyterLab")
        yield lambda name: f"{address}/lab/tree/{name}?token={token}"
    finally:
        process.terminate()
        process.wait(30)


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} took more than {seconds} s"
        time.sleep(0.3)


@pytest.fixture
def desk(tmp_path):
    """A folder with the library in it, where notebooks may write."""
    folder = tmp_path / "desk"
    folder.mkdir()
    (folder / "helpers").symlink_to(ROOT / "helpers")
    return folder


def put(desk, name, change=lambda code: code, keep=lambda index, cell: True):
    """A copy of a notebook without outputs; `change` edits code, `keep` picks cells."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    notebook.cells = [c for i, c in enumerate(notebook.cells) if keep(i, c)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = change(cell.source)
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, desk / f"{name}.ipynb")
    return sum(cell.cell_type == "code" for cell in notebook.cells)


def run_all(page, address, cells, seconds=900):
    """Open a notebook, press "Run All Cells", wait for the last one; fails on an error."""
    page.goto(address, wait_until="domcontentloaded", timeout=180_000)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=180_000)
    idle = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status"
    wait_for(lambda: page.evaluate(idle) == "idle", 180, "the kernel")
    page.evaluate("window.jupyterapp.commands.execute('runmenu:run-all')")

    def ended():
        failed = page.locator(".jp-RenderedText[data-mime-type$='stderr']")
        failed = failed.filter(has_text="Traceback")
        assert failed.count() == 0, failed.first.inner_text()
        prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
        return sum(bool(re.fullmatch(r"\[\d+\]:", text)) for text in prompts) == cells

    wait_for(ended, seconds, "the notebook")


def broken_images(page):
    return page.evaluate(
        "[...document.images].filter(i => !i.complete || i.naturalWidth === 0)"
        ".map(i => i.src.slice(0, 80)).filter(s => !s.startsWith('https://'))"
    )


def shorter(code):
    """Chapter 0 with four updates and six sentences: the page is tested, not the model."""
    code = code.replace('"num_train_epochs": 1', '"num_train_epochs": 1, "max_steps": 4')
    code = code.replace('"logging_steps": 20', '"logging_steps": 1')
    code = code.replace("live.table().iloc[::3]", "live.table()")
    code = code.replace("range(16)", "range(4)")
    return code.replace('load_yoda("test")', 'load_yoda("test").select(range(8))')


def test_chapter_0_in_jupyterlab(desk, tmp_path):
    cells = put(desk, "Chapter0", shorter)
    with jupyterlab(desk, tmp_path) as address, open_page() as page:
        run_all(page, address("Chapter0.ipynb"), cells)
        text = page.locator(".jp-Notebook").inner_text()
        assert "The adapter lies in outputs/chapter0/adapter" in text
        assert "Exactly the translations are trained" in text
        outputs = page.locator(".jp-OutputArea-output img")
        assert outputs.count() >= 2, "the loss and the picture of what changed"
        assert not broken_images(page)
        assert page.locator("table:has-text('platform')").count() == 1
        assert page.locator("text=no problems found").count() == 1, "the mask's X-ray"
    assert (desk / "outputs/chapter0/adapter/adapter_model.safetensors").is_file()


def test_chapter_4_and_its_widget_in_jupyterlab(desk, tmp_path):
    def until_the_playground(index, cell):
        return index <= last

    source = nbformat.read(ROOT / "Chapter4.ipynb", as_version=4).cells
    last = next(i for i, c in enumerate(source) if "template_playground(" in c.source)
    cells = put(desk, "Chapter4", keep=until_the_playground)
    with jupyterlab(desk, tmp_path) as address, open_page() as page:
        run_all(page, address("Chapter4.ipynb"), cells)
        area = page.locator(".widget-textarea textarea").last
        area.wait_for(timeout=120_000)
        drawn = page.locator(".widget-html-content").last
        assert "Jabberwocky" not in drawn.inner_text()
        area.fill(area.input_value().replace("<|im_start|>", "Jabberwocky "))
        area.blur()
        wait_for(lambda: "Jabberwocky" in drawn.inner_text(), 240, "the widget")
        assert not broken_images(page)


def test_the_planner_widget_of_chapter_5(desk, tmp_path):
    def planner(index, cell):
        return "here = runtime.start()" in cell.source or "memory_planner(" in cell.source

    cells = put(desk, "Chapter5", keep=planner)
    with jupyterlab(desk, tmp_path) as address, open_page() as page:
        run_all(page, address("Chapter5.ipynb"), cells)
        choice = page.locator("select").filter(has_text="nf4").first
        choice.wait_for(timeout=120_000)
        drawn = page.locator(".widget-html-content").last
        before = drawn.inner_html()
        assert "data:image/png" in before, "a bar against the card's line"
        choice.select_option("none")
        wait_for(lambda: drawn.inner_html() != before, 300, "the new prediction")
        assert not broken_images(page)


# ── stored pages ─────────────────────────────────────────────────────────────────────────
def test_stored_notebooks_show_all_their_figures_as_html(tmp_path):
    names = notebooks.written()
    paths = [str(ROOT / f"{name}.ipynb") for name in names]
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--output-dir"]
    subprocess.run([*command, str(tmp_path), *paths], check=True, capture_output=True)
    with open_page() as page:
        for name in names:
            notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
            figures = sum(
                "image/png" in output.get("data", {}) or "image/svg+xml" in output.get("data", {})
                for cell in notebook.cells
                for output in cell.get("outputs", [])
                if "text/html" not in output.get("data", {})
            )
            page.goto((tmp_path / f"{name}.html").as_uri(), wait_until="domcontentloaded")
            page.wait_for_timeout(300)
            assert not broken_images(page), name
            shown = page.locator(".jp-OutputArea-output img, .jp-OutputArea-output svg").count()
            assert shown >= figures, f"{name}: {shown} of {figures} figures"
            assert notebook.cells[0].source.lstrip("# ").splitlines()[0] in page.inner_text("body")


# ── the page of llama.cpp's server ───────────────────────────────────────────────────────
@pytest.mark.skipif(
    not (ROOT / "outputs/chapter0/adapter/adapter_model.safetensors").is_file(),
    reason="Chapter 0 has not been run here: no adapter to serve",
)
def test_the_servers_web_page_translates_a_sentence(tmp_path):
    if not (os.environ.get(llamacpp.VARIABLE) or llamacpp.has_web_page()):
        if not shutil.which("npm"):
            pytest.skip("npm, which makes the page, is not there")
        llamacpp.build(web_page=True)  # only a cold cache; .ci/run has asked for it before
    adapter = ROOT / "outputs/chapter0/adapter"
    base = models.embedded_folder()
    f16 = gguf.convert_model(base, tmp_path / "base.gguf")
    lora = gguf.convert_adapter(adapter, base, tmp_path / "adapter.gguf")
    template = models.load_tokenizer(adapter).chat_template
    with (
        serving.LlamaServer(f16, adapter=lora, template=template) as server,
        open_page() as page,
    ):
        page.set_extra_http_headers({"Authorization": f"Bearer {server.key}"})
        page.goto(server.url, wait_until="domcontentloaded", timeout=180_000)
        box = page.locator("textarea").first
        box.wait_for(timeout=120_000)
        box.fill("The old key opened a hidden door.")
        box.press("Enter")
        answer = re.compile(r"(hidden door|old key), ", re.IGNORECASE)
        wait_for(lambda: answer.search(page.inner_text("body")), 300, "the answer")
        assert json.loads(json.dumps(server.get("/health"))) == {"status": "ok"}
