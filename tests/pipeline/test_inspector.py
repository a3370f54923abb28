"""The inspector's page in a real browser."""

import shutil

import pytest
from playwright.sync_api import Page, expect

from tests.browser import CHROMIUM, PATIENCE, chromium, inspector, open_page
from vlmdiff.data.images import load_rgb
from vlmdiff.detection.detector import Detector

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture
def page(workspace):
    """The page of the workspace's detector; its data are as those of somebody's own."""
    shutil.copytree(workspace.path / "data/made", workspace.path / "data/raw/photos")
    workspace.set_params(prepare={"layout": "mvtec_ad", "root": "data/raw/photos"}, validate={"masks": "optional"})
    with inspector(workspace, "--model", "models/detector") as url, chromium() as browser:
        page = open_page(browser)
        page.goto(url)
        yield page


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
    expect(page.get_by_text("The next retrain uses it")).to_be_visible(timeout=PATIENCE)
    assert (workspace.path / "data/feedback.jsonl").read_text().count('"normal"') == 1
    added = [file for file in (workspace.path / "data/raw/photos").rglob("*.png") if file.read_bytes()[-1:] == b"\0"]
    assert len(added) == 1 and added[0].parent.name == "good"


def test_what_is_no_photograph_is_a_sentence_and_the_page_lives_on(workspace, page):
    (workspace.path / "text.png").write_text("no image")
    drop(page, workspace.path / "text.png")
    expect(page.get_by_test_id("stAlert")).to_contain_text("text.png", timeout=PATIENCE)
    drop(page, next((workspace.path / "data/made/cable/test/good").glob("*.png")))
    expect(page.get_by_test_id("stMetricValue")).to_contain_text("0.", timeout=PATIENCE)
