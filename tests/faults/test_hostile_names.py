"""Names, captions and reasons that are markup show as they are: in the terminal, on pages and in artifacts."""

import io
import re
from datetime import UTC, datetime
from pathlib import Path

import mistune
import pandas as pd
import pytest
from prefect import flow
from rich.console import Console

from flows import pages
from tests.hostile import NAMES, elements
from vlmdiff.core.console import say
from vlmdiff.core.params import Prepare, Validate
from vlmdiff.core.text import markdown, plain
from vlmdiff.data import manifest
from vlmdiff.data.contract import check_dataset
from vlmdiff.evaluation.decision import Decisions
from vlmdiff.evaluation.metrics import METRICS, Results
from vlmdiff.evaluation.plots import draw_histograms
from vlmdiff.evaluation.results import decision_table, results_table
from vlmdiff.evaluation.verdict import Criterion, Override, Verdict, verdict_table
from vlmdiff.production.monitor import ClassAlarms, DriftCheck, DriftTest, check_table, class_table
from vlmdiff.production.score import Scored, scores_table
from vlmdiff.setup.doctor import Requirement, report
from vlmdiff.setup.init import Found, table

ACTIVE = {"img", "script", "meta", "svg", "a", "iframe", "b", "strong", "em", "code", "h1", "table"}


def results(names) -> Results:
    return Results({name: dict.fromkeys(METRICS, 0.5) for name in names})


def decisions(name: str) -> Decisions:
    facts = {"class_name": name, "defect": None, "is_anomalous": False, "score": 0.1, "verdict": False}
    return Decisions.of(pd.DataFrame([facts, {**facts, "defect": name, "is_anomalous": True}]))


def verdict(name: str) -> Verdict:
    criterion = Criterion(f"au_pro of {name}", 0.5, "at least", 0.9, f"{name} is too low")
    return Verdict(3, 2, False, True, [criterion], Override(name, name))


def drift(name: str) -> DriftCheck:
    test = DriftTest("score", 1.0, 0.01, 0.01, False, 0.1, 0.2, f"in images like {name}")
    return DriftCheck(
        "drift",
        f"drift in the last 9 images: {name}",
        9,
        9,
        0,
        0,
        0.01,
        [test],
        0,
        [ClassAlarms(name, 9, 1, 0.1, 0.4, 0.1)],
    )


def scored(name: str) -> Scored:
    row = {"path": f"/new/{name}", "score": 0.7, "is_anomalous": True, "verdict": name, "regions": [], "error": None}
    return Scored(Path("out"), "m", 1, 0, 1, 0, 1, 1.0, [row], [])


def found(name: str) -> Found:
    record = {"image_id": "0", "path": f"{name}/0.png", "class_name": name, "split": "train", "is_anomalous": False}
    frame = pd.DataFrame([{**record, "defect": None, "mask_path": None}])
    return Found(Prepare(layout="folder", root=Path(name)), frame, [(f"{name}/0.png", f"{name}/1.png")])


TABLES = {
    "results": lambda name: results_table(results([name])),
    "verdict": lambda name: verdict_table(verdict(name)),
    "decision": lambda name: decision_table(decisions(name)),
    "drift": lambda name: check_table(drift(name)),
    "alarms by class": lambda name: class_table(drift(name)),
    "doctor": lambda name: report([Requirement(name, name, name, False, name)]),
    "scores": lambda name: scores_table(scored(name)),
    "init": lambda name: table(found(name)),
}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_in_the_terminal_shows_a_name_as_it_is(kind, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system="truecolor")
    console.print(TABLES[kind](name))
    shown = console.file.getvalue()
    # What rich itself writes to colour the text.
    text = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text
    # Titles wrap at the width of their table.
    text = "".join(text.split())
    assert all("".join(line.split()) in text for line in plain(name).splitlines())


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_line_in_the_terminal_does_not_steer_it(name, capsys):
    say(name)
    shown = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_in_markdown_is_text(name):
    page = elements(mistune.html(f"- {markdown(name)}"))
    assert not page.tags.keys() & ACTIVE and not page.attributes
    assert page.text.split() == name.split()


def test_a_name_with_dollars_is_no_formula_in_a_chart():
    rows = [{"class_name": "$\\evil{$", "truth": "good", "score": 0.1, "images": 3}]
    assert "evil{" in draw_histograms(rows, ["$\\evil{$"])


def docs(folder: Path, names) -> str:
    """The Data Docs of a dataset whose every rule that names files names these."""
    rows = [
        {
            **{"image_id": str(i // 2), "path": f"{name}.png", "class_name": name, "split": "train", "defect": name},
            **{"is_anomalous": True, "mask_path": f"{name}.bmp", "width": 0, "height": 0, "mode": name},
            "problem": f"{name} cannot be decoded",
        }
        for i, name in enumerate(names)
    ]
    data = Prepare(layout="folder", root=folder)
    result = check_dataset(pd.DataFrame(rows)[manifest.SCHEMA.names], data, Validate(), 64, folder / "report")
    broken = {finding.rule: finding for finding in result.findings if not finding.passed}
    assert broken["readable"].files == sorted(f"{name}.png" for name in names)[:10]
    return "".join(page.read_text() for page in sorted((folder / "report/docs").rglob("*.html")))


def test_data_docs_show_names_as_they_are(tmp_path):
    names = [name for name in NAMES if "/" not in name and "\n" not in name]
    names += ["<img src=x onerror=alert(1)>", "<script>1<\\script>"]
    hostile = elements(docs(tmp_path, names))
    harmless = elements(docs(tmp_path, [f"name{i}" for i in range(len(names))]))
    assert hostile.tags == harmless.tags and hostile.attributes == harmless.attributes
    assert "<img src=x onerror=alert(1)>.png" in hostile.text


def test_prefects_artifacts_show_names_as_they_are(tmp_path, recorded):
    began = datetime.now(UTC)
    columns = {"score": 0.7, "is_anomalous": True, "verdict": "anomalous", "heatmap": None, "scored_at": began}
    rows = [{"path": f"/new/{name}", **columns, "error": f"{name} cannot be decoded"} for name in NAMES]
    (tmp_path / "![x](y)").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "![x](y)/part-0.parquet")

    @flow
    def show() -> None:
        pages.show_scores(tmp_path / "![x](y)", began, f"score: {NAMES[8]}")
        for name in NAMES:
            pages.show_verdict(verdict(name))
            pages.show_drift(drift(name), tmp_path)

    show()
    artifacts = recorded("artifacts")
    assert {each["key"] for each in artifacts} == {
        "scores",
        "score-summary",
        "gate",
        "verdict",
        "monitor",
        "monitor-page",
    }
    for each in artifacts:
        # The page shows the cells of a table as text.
        texts = [each["description"], *([each["data"]] if each["type"] == "markdown" else [])]
        for text in texts:
            page = elements(mistune.html(text))
            is_link = each["key"] in ("verdict", "monitor-page") and text == each["data"]
            assert page.tags["a"] == is_link and not page.tags.keys() & (ACTIVE - {"a", "strong", "table"}), text
