"""The inspector's page in a real browser."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from vlmdiff.data.images import load_rgb
from vlmdiff.detection.detector import Detector

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
PATIENCE = 60_000


@pytest.fixture
def page(workspace):
    """The page of the workspace's detector; its data are as those of somebody's own."""
    shutil.copytree(workspace.path / "data/made", workspace.path / "data/raw/photos")
    workspace.set_params(prepare={"layout": "mvtec_ad", "root": "data/raw/photos"}, validate={"masks": "optional"})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "vlmdiff.cli", "inspect", "--model", "models/detector", "--port", port]
    server = subprocess.Popen(command, cwd=workspace.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, server.stdout.read().decode()
                time.sleep(0.1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1200})
            page.set_default_timeout(PATIENCE)
            page.goto(f"http://127.0.0.1:{port}")
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def drop(page: Page, file) -> None:
    page.locator("input[type=file]").set_input_files(file)


def test_an_inspector_sees_what_the_detector_says_and_says_what_it_is(workspace, page):
    photograph = next((workspace.path / "data/raw/photos/cable/test/missing").glob("*.png"))
    (found,) = Detector.from_pretrained(workspace.path / "models/detector").detect([load_rgb(photograph, None, 10**8)])
    drop(page, photograph)
    expect(page.get_by_test_id("stMetricValue")).to_have_text(f"{found.score:.3f}", timeout=PATIENCE)
    said = "Anomalous" if found.is_anomalous else "Normal"
    expect(page.get_by_test_id("stAlert")).to_contain_text(said)
    expect(page.get_by_text("Most similar normal image")).to_contain_text("train/good")
    expect(page.get_by_test_id("stImage").locator("img")).to_have_count(3)

    first = page.get_by_test_id("stImage").locator("img").first
    before = first.get_attribute("src")
    page.get_by_role("slider").press("Home")
    expect(first).not_to_have_attribute("src", before, timeout=PATIENCE)

    elsewhere = workspace.path / "taken.png"
    shutil.copy(next((workspace.path / "data/made/cable/test/good").glob("*.png")), elsewhere)
    with elsewhere.open("ab") as stream:
        stream.write(b"\0")  # other bytes: another photograph
    drop(page, elsewhere)
    expect(page.get_by_text("taken.png, sha256")).to_be_visible(timeout=PATIENCE)  # the whole page is the new one's
    page.get_by_role("button", name="It is normal: learn from it").click()
    expect(page.get_by_text("the next retrain has it")).to_be_visible(timeout=PATIENCE)
    assert (workspace.path / "data/feedback.jsonl").read_text().count('"normal"') == 1
    added = [file for file in (workspace.path / "data/raw/photos").rglob("*.png") if file.read_bytes()[-1:] == b"\0"]
    assert len(added) == 1 and added[0].parent.name == "good"


def test_what_is_no_photograph_is_a_sentence_and_the_page_lives_on(workspace, page):
    (workspace.path / "text.png").write_text("no image")
    drop(page, workspace.path / "text.png")
    expect(page.get_by_test_id("stAlert")).to_contain_text("text.png", timeout=PATIENCE)
    drop(page, next((workspace.path / "data/made/cable/test/good").glob("*.png")))
    expect(page.get_by_test_id("stMetricValue")).to_contain_text("0.", timeout=PATIENCE)
