"""A real browser for the tests of pages, and the inspector's page to open in it."""

import contextlib
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

from playwright.sync_api import Browser, Page, sync_playwright

from tests.conftest import Workspace
from tests.processes import wait_for
from tests.services import free_ports

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 60_000


@contextlib.contextmanager
def chromium(*options: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *options])
        yield browser
        browser.close()


def open_page(browser: Browser, width: int = 1280, height: int = 1200) -> Page:
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    return page


@contextlib.contextmanager
def inspector(workspace: Workspace, *options: str, **environment: str) -> Iterator[str]:
    """The address of `vlmdiff inspect` in a workspace."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "vlmdiff.cli", "inspect", *options, "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=workspace.path, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def answers() -> bool:
        assert server.poll() is None, server.stdout.read().decode()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/about", timeout=5).close()
        except OSError:
            return False
        return True

    try:
        wait_for(answers, PATIENCE / 1000)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
