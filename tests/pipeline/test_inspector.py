"""The inspector's page in a real browser, and against a page of another origin."""

import http.client
import json
import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser import CHROMIUM, PATIENCE, chromium, inspector, open_page
from tests.tiny import SIZE, save_tiny_detector
from vlmdiff import stages
from vlmdiff.core import workspace as w
from vlmdiff.core.files import seal, sha256
from vlmdiff.core.params import load
from vlmdiff.data import manifest
from vlmdiff.production.inspector import Inspector
from vlmdiff.production.score import score

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
HOSTILE = "<img src=x onerror=document.title='owned'>.png"
ALARMS = 14


@dataclass
class Place:
    """A folder with a dataset of one product, a detector, and scores of new photographs that are all alarms."""

    path: Path

    def manifest(self) -> pd.DataFrame:
        stages.prepare(load().prepare, w.MADE, w.MANIFEST)
        return manifest.read(w.MANIFEST).set_index("image_id")

    def log(self) -> list[dict]:
        return [json.loads(line) for line in w.FEEDBACK.read_text().splitlines()] if w.FEEDBACK.exists() else []


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("filled")
    save_tiny_detector(path / "detector")
    # Lower, so that every photograph is an alarm.
    settings = json.loads((path / "detector/detector.json").read_text())
    settings["calibration"]["threshold"] -= 50
    (path / "detector/detector.json").write_text(json.dumps(settings))
    seal(path / "detector")
    (path / "params.yaml").write_text(
        yaml.safe_dump({"prepare": {"layout": "folder"}, "validate": {"masks": "optional"}})
    )
    # What the detector has learned.
    noise = np.random.default_rng(1).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)
    (path / "data/raw/thing/good").mkdir(parents=True)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(path / f"data/raw/thing/good/{i}.png")
    (path / "new").mkdir()
    new = np.random.default_rng(2).integers(0, 256, (ALARMS, 2 * SIZE, 3 * SIZE, 3), dtype=np.uint8)
    for i, pixels in enumerate(new):
        Image.fromarray(pixels).save(path / "new" / (HOSTILE if i == ALARMS - 1 else f"{i}.png"))
    return path


@pytest.fixture
def place(filled, tmp_path, monkeypatch) -> Place:
    shutil.copytree(filled, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    place = Place(tmp_path / "place")
    place.manifest()
    scored = score(["new"], w.SCORES, load(), Path("detector"))
    assert scored is not None and scored.alarms == ALARMS
    return place


@pytest.fixture
def url(place):
    with inspector(place, "--model", "detector") as url:
        yield url


def opened(browser, url: str, name: str | None = "Ada Lovelace") -> Page:
    page = open_page(browser)
    page.goto(url)
    shown(page)
    if name is not None:
        page.locator("#by").fill(name)
        page.locator("#by").press("Enter")
    return page


def shown(page: Page, other_than: str = "") -> str:
    """The id of the photograph on screen, once it is another one than this."""
    page.wait_for_selector(f'body[data-shown]:not([data-shown="{other_than}"])')
    return page.locator("body").get_attribute("data-shown") or ""


def saved(page: Page, image_id: str, *words: str) -> None:
    for each in words:
        expect(page.locator(f'[data-id="{image_id}"] small')).to_contain_text(each, timeout=PATIENCE)


@needs_browser
def test_an_inspector_works_through_the_alarms_by_keyboard(place, url, record_property):
    files = {sha256(file): file for file in Path("new").iterdir()}
    with chromium() as browser:
        page = opened(browser, url, None)
        expect(page.locator("#text")).to_contain_text("Anomalous, score")
        expect(page.locator("figure:visible")).to_have_count(4)
        # Whoever has not said a name is asked for it.
        page.keyboard.press("n")
        page.keyboard.type("Ada Lovelace")
        page.keyboard.press("Enter")
        page.keyboard.press("d")
        page.keyboard.type("crack")
        page.keyboard.press("Enter")
        said, seconds = {}, []
        for i in range(10):
            here = shown(page)
            if i % 2:
                page.keyboard.press("r")
            page.keyboard.press("a" if i % 2 else "n")
            said[here] = "crack" if i % 2 else None
            began = page.evaluate("() => performance.now()")
            shown(page, other_than=here)
            seconds.append(page.evaluate("() => performance.now()") - began)
        for here, defect in said.items():
            saved(page, here, "anomalous (crack)" if defect else "normal", "Ada Lovelace")
        most = f"{statistics.median(seconds):.0f}, {max(seconds):.0f}"
        record_property("milliseconds to the next photograph, median and most", most)
        assert statistics.median(seconds) < 300 and max(seconds) < 3000

        # One more is drawn on, and the last answer is taken back and given again.
        here = shown(page)
        page.keyboard.press("m")
        box = page.locator("[data-kind=photograph] .inner").bounding_box()
        x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + box["width"] / 8, y, steps=4)
        page.mouse.up()
        page.keyboard.press("a")
        saved(page, here, "anomalous")
        page.keyboard.press("u")
        expect(page.locator(f'[data-id="{here}"] small')).not_to_contain_text("anomalous", timeout=PATIENCE)
        assert shown(page) == here and [row["truth"] for row in place.log()][-2:] == ["anomalous", "withdrawn"]
        page.keyboard.press("a")
        saved(page, here, "anomalous")
        said[here] = "crack"

        # The last three at once.
        for _ in range(ALARMS - len(said)):
            page.keyboard.press("x")
            page.keyboard.press("j")
        page.keyboard.press("n")
        rest = set(files) - set(said)
        for each in rest:
            saved(page, each, "normal", "Ada Lovelace")
        said |= dict.fromkeys(rest)
        assert page.title() != "owned"

    dataset = place.manifest()
    assert len(said) == ALARMS and set(said) <= set(dataset.index)
    for image_id, defect in said.items():
        row = dataset.loc[image_id]
        assert (row["defect"], bool(row["is_anomalous"])) == (defect, defect is not None)
        assert row["split"] in (("test",) if defect else ("train", "validation", "test"))
    drawn = np.asarray(Image.open(Path("data/raw", dataset.loc[here, "mask_path"])))
    assert drawn.shape == (2 * SIZE, 3 * SIZE)
    rows, columns = np.nonzero(drawn)
    assert abs(rows.mean() / drawn.shape[0] - 0.5) < 0.05 and abs(columns.mean() / drawn.shape[1] - 0.3125) < 0.05
    assert 0 < len(rows) < 0.2 * drawn.size
    # What was asked is not asked again.
    with inspector(place, "--model", "detector") as url, chromium() as browser:
        page = open_page(browser)
        page.goto(url)
        expect(page.locator("#empty")).to_contain_text("Nothing to do", timeout=PATIENCE)


@needs_browser
def test_the_second_of_two_inspectors_learns_what_the_first_said(url):
    with chromium() as browser:
        first, second = opened(browser, url), opened(browser, url, "Grace Hopper")
        here = shown(first)
        assert shown(second) == here
        first.keyboard.press("n")
        saved(first, here, "normal", "Ada Lovelace")
        second.keyboard.press("a")
        expect(second.locator("#message")).to_contain_text("Ada Lovelace said at", timeout=PATIENCE)
        expect(second.locator("#message")).to_contain_text("that it is normal")
        # Both look at the same one again, and agree.
        there = shown(first, other_than=here)
        first.keyboard.press("n")
        saved(first, there, "normal", "Ada Lovelace")
        second.locator(f'[data-id="{there}"]').click()
        second.keyboard.press("n")
        saved(second, there, "normal", "Ada Lovelace")


@needs_browser
def test_a_photograph_that_a_person_brings_is_judged_and_taken(place, url):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save("taken.png")
    Path("text.png").write_text("no image")
    with chromium() as browser:
        page = opened(browser, url)
        page.locator("#bring").set_input_files("text.png")
        expect(page.locator("#message")).to_contain_text("text.png is not an image", timeout=PATIENCE)
        before = shown(page)
        page.locator("#bring").set_input_files("taken.png")
        assert shown(page, other_than=before) == sha256(Path("taken.png"))
        page.keyboard.press("n")
        saved(page, sha256(Path("taken.png")), "normal")
    assert sha256(Path("taken.png")) in place.manifest().index


@needs_browser
def test_a_dataset_that_requires_masks_asks_for_one(place):
    Path("params.yaml").write_text(yaml.safe_dump({"prepare": {"layout": "folder"}}))
    with inspector(place, "--model", "detector") as url, chromium() as browser:
        page = opened(browser, url)
        here = shown(page)
        page.keyboard.press("a")
        expect(page.locator("#message")).to_contain_text("needs a mask")
        page.keyboard.press("r")
        page.keyboard.press("a")
        saved(page, here, "anomalous")


def request(url: str, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request(method, path, body.encode(), headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def test_pages_of_other_origins_and_requests_that_are_none_get_nothing(place, url):
    port = urlsplit(url).port
    answer = json.dumps({"source": "scores", "ids": ["0"], "by": "Ada", "truth": "normal", "class_name": "thing"})
    for path in ("/", "/queue", "/answers", "/about", "/page.js"):
        assert request(url, "GET", path)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
            assert request(url, "GET", path, Host=host)[0] == 403
    for origin in ("http://evil.example", f"http://evil.example:{port}", "null", f"http://127.0.0.1:{port + 1}"):
        assert request(url, "POST", "/answer", answer, Origin=origin)[0] == 403
        assert request(url, "POST", "/judge?name=a.png", "x", Origin=origin)[0] == 403
    assert not place.log()
    status, said = request(url, "POST", "/answer", answer, Origin=url)
    assert status == 200 and "not in the scores" in said
    for path, body in (
        ("/answer", "no json"),
        ("/answer", "[]"),
        ("/answer", "{}"),
        ("/answer", json.dumps({"source": "scores", "ids": [1], "by": "A", "truth": "normal"})),
        ("/answer", json.dumps({"source": "scores", "ids": ["0"] * 1000, "by": "A"})),
        ("/answer", json.dumps({"source": "scores", "ids": ["0"], "by": ""})),
        ("/answer", json.dumps({"source": "../..", "ids": ["0"], "by": "A"})),
        ("/undo", json.dumps({"source": "scores", "ids": "0", "by": {}})),
        ("/answer", "x" * 9_000_000),
        ("/judge?name=a.png", ""),
    ):
        status, said = request(url, "POST", path, body)
        assert 400 <= status < 500 and json.loads(said)["error"], (path, body[:80])
    for path in ("/picture/scores/0/photograph", "/picture/other/0/map", "/picture/scores/..%2f..%2fparams.yaml/map"):
        assert request(url, "GET", path)[0] == 404
    assert request(url, "GET", "/queue?date=%00&product='&show=<b>")[0] == 200
    assert request(url, "GET", "/queue")[0] == 200 and os.listdir("data/raw") == ["thing"]


def test_an_answer_about_a_photograph_that_has_changed_is_refused(place):
    page = Inspector(load(), w.SCORES, None)
    first, second = (item["id"] for item in page.listed("scores")["items"][:2])
    files = {sha256(file): file for file in Path("new").iterdir()}
    shutil.copy(files[second], files[first])
    body = {"source": "scores", "by": "Ada", "truth": "normal", "class_name": "thing"}
    found = page.answer(body | {"ids": [first, second]})
    assert "has changed since it was judged" in found["problems"][first] and found["said"][first] is None
    assert second not in found["problems"] and found["said"][second]["by"] == "Ada"
