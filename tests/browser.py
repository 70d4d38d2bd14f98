"""A real browser for the tests: the system's Chromium, driven by Playwright."""

import contextlib
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def _missing():
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed (requirements.txt has it)"
    return "" if CHROMIUM else "there is no Chromium here (Debian: apt-get install chromium)"


needs_browser = pytest.mark.skipif(bool(_missing()), reason=_missing() or "all is there")


@contextlib.contextmanager
def open_page(*, width=1400, height=1000):
    """A page of a headless Chromium, closed afterwards; nothing of it stays on disk."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()
