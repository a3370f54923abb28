"""What a person sees of a run: tables, pictures, links and progress in Prefect's pages, tables in the terminal."""

import base64
import contextlib
import io
import json
from collections.abc import Generator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pandas as pd
from PIL import Image
from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectHTTPStatusError
from rich.console import Console
from rich.text import Text

from flows import servers
from vlmdiff.core import workspace as w
from vlmdiff.core.params import Registry
from vlmdiff.core.text import markdown, plain
from vlmdiff.evaluation.decision import PER_CLASS_DECISION, POOLED
from vlmdiff.evaluation.evidence import Evidence
from vlmdiff.evaluation.metrics import METRICS, Results
from vlmdiff.evaluation.results import decision_table, results_table
from vlmdiff.evaluation.verdict import Verdict, verdict_table

if TYPE_CHECKING:
    from vlmdiff.production.monitor import DriftCheck

REPORT = w.EVALUATION / "report.html"
DATA_DOCS = w.DATA_REPORT / "docs/index.html"
# The stages that judge a contract, and their reports.
CONTRACTS = {"validate": w.DATA_REPORT, "caption": w.CAPTION_REPORT}
PICTURES, PICTURE_WIDTH = 8, 720
# Rows of the table of the highest scores, and errors that the summary lists.
WORST = 20


class Progress:
    """How many steps of a run are done. A step is a task of the flow."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.artifact: Any = None
        with _published():
            self.artifact = create_progress_artifact(0.0, key="progress", description=f"0 of {steps} steps")

    def step(self, name: str) -> None:
        """Count a step that is done."""
        self.done += 1
        with _published():
            if self.artifact:
                text = f"{self.done} of {self.steps} steps; last: {name}"
                update_progress_artifact(self.artifact, 100 * self.done / self.steps, text)


def show_contract(stage: str) -> None:
    """Show the rules that the data breaks, and the files, if the stage judges a contract."""
    file = CONTRACTS.get(stage, Path()) / "validation.json"
    if not file.is_file():
        return
    broken = [finding for finding in json.loads(file.read_text(encoding="utf-8"))["findings"] if not finding["passed"]]
    rows = [
        {
            "rule": finding["rule"],
            "severity": finding["severity"],
            "what holds of good data": finding["what"],
            "broken by": finding["count"],
            "files": ", ".join(finding["files"]) + (", …" if finding["count"] > len(finding["files"]) else ""),
            "to do": finding["remedy"],
        }
        for finding in sorted(broken, key=lambda finding: finding["severity"])
    ]
    if rows:
        with _published():
            create_table_artifact(rows, key="contract", description=f"Rules of stage {stage!r} that the data breaks.")
            _link("data-docs", "Data Docs", servers.address(file.with_name("docs") / "index.html"), "Rule by rule.")


def show_model(version: int, registry: Registry) -> None:
    """Show the metrics of a registered version, its heatmaps, and where its reports are."""
    from vlmdiff.registry.store import tracking_uri

    evidence = Evidence.read(w.EVALUATION)
    results, counts = evidence.results, evidence.decisions.counts()
    shares = counts[PER_CLASS_DECISION]
    rows = [{"class": name, **_metrics(values), **_shares(shares[name])} for name, values in results.classes.items()]
    rows.append({"class": "mean", **_metrics(results.mean), **_shares(counts[POOLED][POOLED])})
    store, server = tracking_uri(registry), servers.find("mlflow")
    page = store if store.startswith("http") else server and server.url
    with _published():
        create_table_artifact(rows, key="metrics", description="Metrics and verdicts by class; - is not defined.")
        create_markdown_artifact(
            _heatmaps(results),
            key="heatmaps",
            description="Photograph, reconstruction, anomaly map and mask; the class with the lowest AU-PRO first.",
        )
        _link("report", "Evaluation report", servers.address(REPORT), "Metrics by class, curves, photographs.")
        _link("data-docs", "Data Docs", servers.address(DATA_DOCS), "What the data contract asks, rule by rule.")
        if page:
            link = f"{page}/#/models/{registry.model_name}/versions/{version}?workflowType=machine_learning"
            _link("registry", f"Version {version} in the registry", link, "Its model card, its origin, its files.")


def show_verdict(verdict: Verdict) -> None:
    """Show each criterion of the gate, failed ones first."""
    rows = [
        {
            "criterion": criterion.name,
            "measured": f"{criterion.measured:.4f}" if criterion.measured == criterion.measured else "not defined",
            "required": f"{criterion.relation} {criterion.required:g}",
            "passed": "yes" if criterion.passed else "no",
            "why": criterion.why,
        }
        for criterion in sorted(verdict.criteria, key=lambda criterion: criterion.passed)
    ]
    with _published():
        create_table_artifact(rows, key="gate", description=f"**{markdown(verdict.outcome)}**")
        _link("verdict", verdict.outcome, servers.address(w.GATE_PAGE), "The verdict and its reasons.")


def print_summary(verdict: Verdict) -> None:
    """Print the results, the verdict and where to go from there."""
    console = Console()
    console.print()
    evidence = Evidence.read(w.EVALUATION)
    console.print(results_table(evidence.results))
    console.print(decision_table(evidence.decisions))
    console.print(verdict_table(verdict))
    for criterion in verdict.criteria:
        if not criterion.passed:
            console.print(Text(plain(f"  {criterion.why}")))
    console.print()
    for what, where in {
        "Report": w.GATE_PAGE,
        "Data Docs": DATA_DOCS,
        "Web pages": "make up  (runs, schedules, the model registry)",
        "Score images": "vlmdiff score IMAGE... --out DIR  (in .venv/bin)",
    }.items():
        console.print(f"{what:<16}{where}", highlight=False)


def show_scores(folder: Path, began: datetime, summary: str) -> None:
    """Show the photographs that a run has scored: the highest scores as a table, and counts of all."""
    columns = ["path", "score", "is_anomalous", "verdict", "heatmap", "error", "scored_at"]
    frame = pd.read_parquet(folder, columns=columns, filters=[("scored_at", ">=", began)])
    unreadable = frame[frame["error"].notna()]
    worst = frame[frame["error"].isna()].nlargest(WORST, "score")
    rows = [
        {
            "photograph": row.path,
            "score": f"{row.score:.3f}",
            "verdict": row.verdict or ("anomalous" if row.is_anomalous else "normal"),
            "heatmap": str((folder / row.heatmap).absolute()) if isinstance(row.heatmap, str) else "",
        }
        for row in worst.itertuples()
    ]
    lines = [
        "| | photographs of this run |",
        "| --- | --- |",
        f"| judged | {len(frame) - len(unreadable)} |",
        f"| alarms | {int(frame['is_anomalous'].fillna(False).sum())} |",
        f"| unreadable | {len(unreadable)} |",
        "",
        *(f"- {markdown(error)}" for error in unreadable["error"].head(WORST)),
        "",
        markdown(summary),
        "",
        f"All scores, also of earlier runs: pandas.read\\_parquet({markdown(repr(str(folder.absolute())))})",
    ]
    with _published():
        create_table_artifact(rows, key="scores", description="The highest scores of this run; the threshold is 0.5.")
        create_markdown_artifact("\n".join(lines), key="score-summary", description="The run in numbers.")


def show_drift(found: "DriftCheck", out: Path) -> None:
    """Show each test of a check for drift, the clearest first."""
    rows = [
        {
            "what": test.what,
            "then": f"{test.then:.4g}",
            "now": f"{test.now:.4g}",
            "corrected p": f"{test.corrected:.2g}",
            "as before": "yes" if test.passed else "no",
            "why": test.why,
        }
        for test in sorted(found.tests, key=lambda test: test.corrected)
    ]
    with _published():
        create_table_artifact(rows, key="monitor", description=f"**{markdown(found.outcome)}**")
        _link("monitor-page", found.outcome, servers.address(out / "monitor.html"), "At calibration and now.")


@contextlib.contextmanager
def _published() -> Generator[None]:
    """Let the run go on if Prefect's server is away: artifacts are only for a person to look at."""
    try:
        yield
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        get_run_logger().warning(f"Prefect's server did not accept what this run shows: {error}")


def _link(key: str, text: str, address: str, description: str) -> None:
    create_link_artifact(address, link_text=markdown(text), key=key, description=description)


def _metrics(values: dict[str, float]) -> dict[str, str]:
    return {title: f"{values[key]:.3f}" if values[key] == values[key] else "-" for key, title in METRICS.items()}


def _shares(counts: dict[str, list[int]]) -> dict[str, str]:
    titles = {"defective": "defects found", "normal": "false alarms"}
    return {title: "{} of {}".format(*counts[kind]) for kind, title in titles.items()}


def _heatmaps(results: Results) -> str:
    """Return the heatmaps of the hardest classes as Markdown; classes without an AU-PRO come last."""
    files = {file.stem: file for file in (w.EVALUATION / "heatmaps").glob("*.png")}

    def hardest(name: str) -> tuple[bool, float, str]:
        value = results.classes[name]["au_pro"]
        return value != value, value, name

    parts = []
    for name in sorted(files.keys() & results.classes.keys(), key=hardest)[:PICTURES]:
        with Image.open(files[name]) as picture:
            picture.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH))
            data = io.BytesIO()
            picture.save(data, "JPEG", quality=85)
        encoded = base64.b64encode(data.getvalue()).decode()
        title = f"{markdown(name)}: AU-PRO {_metrics(results.classes[name])[METRICS['au_pro']]}"
        parts.append(f"**{title}**\n\n![{title}](data:image/jpeg;base64,{encoded})")
    return "\n\n".join(parts) or "No class has an anomalous test image."
