"""What a person sees of a run in a browser: Prefect's pages and MLflow's, Data Docs, the report, the inspector.

VLMDIFF_SCREENSHOTS names a folder that gets a picture of each page.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
import yaml
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser import CHROMIUM, PATIENCE, chromium, inspector
from tests.services import Services, services
from vlmdiff.evaluation.metrics import METRICS

pytestmark = [pytest.mark.services, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]

OUTCOME = "version 1 passes the gate and is champion"
CLASSES = ("blister", "cable", "circuit", "fabric", "flange", "tiles")


@dataclass(frozen=True)
class Ran:
    """`make up`, and the run of `retrain` that was asked for there and has ended."""

    services: Services
    run: UUID
    name: str

    def address(self, server: str) -> str:
        return f"http://127.0.0.1:{self.services.ports[server]}"


@pytest.fixture(scope="module")
def ran(tiny_line, tmp_path_factory) -> Iterator[Ran]:
    with services(tmp_path_factory.mktemp("pages") / "workspace", tiny_line) as here:
        here.workspace.set_params(gate={"floors": {"au_pro": {"mean": 0.0}}})
        here.workspace.commit()
        here.up()
        run = here.trigger()
        ended = here.end(run)
        assert ended.state.is_completed(), here.logs(run)
        yield Ran(here, run, ended.name)


@pytest.fixture(scope="module")
def browser(ran) -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with chromium() as browser:
        yield browser


@pytest.fixture
def troubles(page) -> list[str]:
    """What goes wrong in the page from now on: requests that fail, what its console calls an error."""
    found: list[str] = []
    page.on("console", lambda message: message.type == "error" and found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("requestfailed", lambda request: found.append(f"{request.url}: {request.failure}"))
    page.on("response", lambda answer: answer.status >= 400 and found.append(f"{answer.url}: {answer.status}"))
    return found


@pytest.fixture(scope="module")
def shoot(tmp_path_factory) -> Callable[..., None]:
    chosen = os.environ.get("VLMDIFF_SCREENSHOTS")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    return lambda page, name, **options: page.screenshot(path=folder / f"{name}.png", **options)


def load(pictures: Locator, count: int) -> None:
    """Wait for this many pictures to be there and to have loaded."""
    expect(pictures).to_have_count(count)
    for picture in pictures.all():
        expect(picture).not_to_have_js_property("naturalWidth", 0)


def open_artifacts(page: Page, ran: Ran) -> None:
    page.goto(f"{ran.address('prefect')}/runs/flow-run/{ran.run}")
    page.get_by_role("tablist").get_by_text("Artifacts", exact=True).click()


def open_artifact(page: Page, ran: Ran, key: str) -> None:
    open_artifacts(page, ran)
    page.get_by_role("link", name=re.compile(rf"^(table|markdown) {key} ")).click()
    expect(page.get_by_role("banner")).to_contain_text(key)


def test_the_page_of_a_run_shows_its_tasks_and_what_it_made(ran, page, shoot):
    page.goto(f"{ran.address('prefect')}/runs/flow-run/{ran.run}")
    banner = page.get_by_role("banner")
    expect(banner).to_contain_text(ran.name)
    expect(banner).to_contain_text("Completed")
    expect(page.get_by_text("Finished in state Completed").last).to_be_visible()
    shoot(page, "run")

    tabs = page.get_by_role("tablist")
    tabs.get_by_text("Task Runs", exact=True).click()
    stages = yaml.safe_load((ran.services.workspace.path / "dvc.yaml").read_text())["stages"]
    for task in (*stages, "register", "promote"):
        expect(page.get_by_role("link", name=task, exact=True)).to_be_visible()
    shoot(page, "run_tasks", full_page=True)

    tabs.get_by_text("Artifacts", exact=True).click()
    for key in ran.services.artifacts(ran.run):
        expect(page.get_by_role("link", name=re.compile(rf"^(progress|table|markdown) {key} "))).to_be_visible()
    expect(page.get_by_text(re.compile(r"^(\d+) of \1 steps"))).to_be_visible()
    shoot(page, "run_artifacts", full_page=True)


def test_a_run_shows_metrics_and_verdict_as_tables(ran, page, shoot):
    open_artifact(page, ran, "metrics")
    for title in METRICS.values():
        expect(page.get_by_role("columnheader", name=title, exact=True)).to_be_attached()
    for name in (*CLASSES, "mean"):
        row = page.get_by_role("row").filter(has=page.get_by_text(name, exact=True))
        expect(row.get_by_role("cell").nth(1)).to_have_text(re.compile(r"^\s*[01]\.\d{3}\s*$"))
    shoot(page, "artifact_metrics")

    open_artifact(page, ran, "gate")
    expect(page.get_by_text(OUTCOME)).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="mean AU-PRO")).to_contain_text("yes")
    shoot(page, "artifact_gate")


def test_a_run_shows_a_picture_of_each_class(ran, page, shoot):
    open_artifact(page, ran, "heatmaps")
    load(page.get_by_role("img", name=re.compile("AU-PRO")), len(CLASSES))
    shoot(page, "artifact_heatmaps")


@pytest.mark.parametrize(
    ("key", "link", "heading"),
    [
        ("report", "Evaluation report", "VLMDiff evaluation"),
        ("verdict", OUTCOME, OUTCOME.capitalize()),
        ("data-docs", "Data Docs", "Validation Results"),
        ("registry", "Version 1 in the registry", "Version 1"),
    ],
)
def test_a_link_of_a_run_leads_there(ran, page, shoot, key, link, heading):
    open_artifact(page, ran, key)
    shoot(page, f"artifact_{key}")
    with page.expect_popup() as opened:
        page.get_by_role("link", name=link, exact=True).click()
    expect(opened.value.get_by_role("heading", name=heading, exact=True)).to_be_visible()
    opened.value.close()


def test_the_deployment_has_its_schedule_and_a_form_that_explains_itself(ran, page, shoot):
    page.goto(f"{ran.address('prefect')}/deployments")
    row = page.get_by_role("row", name=re.compile("retrain"))
    expect(row).to_contain_text("Ready")
    shoot(page, "deployments")

    row.get_by_role("link", name="retrain").first.click()
    expect(page.get_by_text("weekly", exact=True)).to_be_visible()
    expect(page.get_by_role("link", name=ran.name)).to_be_visible()
    expect(page.get_by_text("vlmdiff: drift starts retrain")).to_be_visible()
    shoot(page, "deployment")

    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    with ran.services.client() as client:
        asked = client.read_deployment_by_name("retrain/retrain").parameter_openapi_schema["properties"]
    assert asked
    for name, parameter in asked.items():
        expect(page.get_by_text(re.compile(rf"^{name}\b"))).to_be_visible()
        expect(page.get_by_text(parameter["description"])).to_be_visible()
    expect(page.get_by_role("button", name="Submit")).to_be_enabled()
    shoot(page, "deployment_form")


def test_the_registry_shows_card_verdict_and_champion(ran, page, shoot):
    page.goto(f"{ran.address('mlflow')}/#/models/vlmdiff")
    expect(page.get_by_role("link", name="Version 1")).to_be_visible()
    shoot(page, "mlflow_model")

    page.goto(f"{ran.address('mlflow')}/#/models/vlmdiff/versions/1")
    expect(page.get_by_text("@ champion")).to_be_visible()
    for heading in ("Use", "Threshold", "Results", "Training data", "Limits", "Licences"):
        expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
    expect(page.get_by_text(re.compile(r"AU-PRO 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)")).first).to_be_visible()
    expect(page.get_by_role("row", name=re.compile(r"^gate\.verdict passed"))).to_be_attached()
    shoot(page, "mlflow_version")
    page.set_viewport_size({"width": 1280, "height": 2800})
    shoot(page, "mlflow_version_all")


def test_the_run_in_mlflow_shows_metrics_parameters_and_the_report(ran, page, shoot):
    page.goto(f"{ran.address('mlflow')}/#/models/vlmdiff/versions/1")
    page.get_by_role("main").locator("a[href*='/runs/']").click()
    expect(page.get_by_text("Finished", exact=True)).to_be_visible()
    expect(page.get_by_text(re.compile(r"^Metrics \(\d+\)"))).to_be_visible()
    expect(page.get_by_text(re.compile(r"^Parameters \(\d+\)"))).to_be_visible()
    shoot(page, "mlflow_run")

    page.get_by_role("tab", name="Model metrics").click()
    expect(page.get_by_role("heading", name="blister", exact=True).first).to_be_visible()
    shoot(page, "mlflow_run_metrics")

    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("gate", exact=True).click()
    page.get_by_text("gate.html").click()
    expect(page.frame_locator("iframe").get_by_role("heading", name=OUTCOME.capitalize())).to_be_visible()
    shoot(page, "mlflow_run_artifacts")


def test_data_docs_lead_from_the_contract_to_each_rule_and_back(ran, page, troubles, shoot):
    page.goto(f"{ran.address('reports')}/data/docs/index.html")
    expect(page.get_by_text("Data Docs | dataset")).to_be_visible()
    shoot(page, "data_docs")
    for table, rule in (
        ("images", "no image is in two splits"),
        ("classes", "every class has at least 4 train, 1 validation, 2 test images"),
    ):
        page.get_by_role("link", name=table, exact=True).first.click()
        expect(page.get_by_text("Status: Succeeded")).to_be_visible()
        expect(page.get_by_role("row", name="Success Percent 100%")).to_be_visible()
        expect(page.get_by_text(rule)).to_be_visible()
        shoot(page, f"data_docs_{table}")
        page.get_by_role("link", name=table, exact=True).click()
        expect(page.get_by_role("heading", name=f"Expectations / {table}")).to_be_visible()
        expect(page.get_by_text(rule)).to_be_visible()
        page.get_by_role("link", name="Data Docs").click()
        expect(page.get_by_role("heading", name="Validation Results")).to_be_visible()
    assert troubles == []


@pytest.mark.parametrize("width", [1200, 420])
def test_the_report_says_the_verdict_first_and_shows_its_pictures(ran, page, troubles, shoot, width):
    page.set_viewport_size({"width": width, "height": 1000})
    page.goto(f"{ran.address('reports')}/gate.html")
    expect(page.get_by_role("heading", level=2).first).to_have_text(OUTCOME.capitalize())
    expect(page.get_by_role("row", name=re.compile(r"mean AU-PRO 0\.\d{4} at least 0 yes"))).to_be_visible()
    for name in CLASSES:
        expect(page.get_by_role("row").filter(has=page.get_by_role("link", name=name))).to_be_visible()
    pictures = page.get_by_role("figure").get_by_role("img", name=re.compile("photograph|reconstruction|map|truth"))
    load(pictures, pictures.count())
    assert pictures.count() > 3 * len(CLASSES)
    # A narrow page scrolls down, its wide tables for themselves.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width > 1000:
        tables = page.locator(".wide")
        assert tables.evaluate_all("boxes => boxes.filter(box => box.scrollWidth > box.clientWidth).length") == 0
    shoot(page, f"report_{width}")
    shoot(page, f"report_{width}_all", full_page=True)
    assert troubles == []


def test_the_inspector_judges_by_the_champion(ran, page, troubles, shoot):
    workspace = ran.services.workspace
    photograph = next((workspace.path / "data/made/cable/test/missing").glob("*.png"))
    with inspector(workspace, MLFLOW_TRACKING_URI=ran.address("mlflow")) as url:
        page.goto(url)
        page.locator("#bring").set_input_files(photograph)
        page.wait_for_selector('body[data-shown]:not([data-shown=""])')
        expect(page.locator("#text")).to_contain_text(re.compile(r"(Anomalous|Normal), score 0\.\d{3}\."))
        expect(page.locator("#text")).to_contain_text("Most similar normal training image:")
        load(page.locator("figure:visible img"), 5)
        judge = page.locator("label", has=page.locator("#bring"))
        expect(judge).to_have_attribute("title", "It is judged by version 1 of vlmdiff, the champion.")
        shoot(page, "inspector")
        page.goto("about:blank")
    assert troubles == []
