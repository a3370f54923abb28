"""The tables of results for the terminal."""

import math
from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text

from vlmdiff.core.text import plain
from vlmdiff.evaluation.decision import DECISION, OF_CLASS, PER_CLASS_DECISION, POOLED, Decisions
from vlmdiff.evaluation.metrics import METRICS, Results

# Beside the counts that recall and the false-alarm rate are made of; what fits a terminal of 80 columns.
SHORT = {"recall_at_1": "recall\nat 1 %", "recall_at_5": "recall\nat 5 %"}
RATED = [metric for metric in OF_CLASS if metric not in ("recall", "false_alarm_rate", "balanced_accuracy")]


def results_table(results: Results) -> Table:
    """Return a table with one row per class and the mean over classes; a dash marks undefined metrics."""
    left_out = sorted({name for names in results.left_out.values() for name in names})
    caption = Text(plain(f"- is not defined; the mean omits {', '.join(left_out)}")) if left_out else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("class", overflow="fold")
    for title in METRICS.values():
        table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, values in results.classes.items():
        table.add_row(Text(plain(name)), *_cells(values, METRICS))
    table.add_section()
    table.add_row("mean", *_cells(results.mean, METRICS), style="bold")
    return table


def decision_table(decisions: Decisions) -> Table:
    """Return a table of the verdicts at the model's threshold: one row per class, and all classes together."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("class", overflow="fold")
    titles = {"found": "defects\nfound", "alarms": "false\nalarms"}
    titles |= {metric: SHORT.get(metric, DECISION[metric].replace(" ", "\n")) for metric in RATED}
    for title in titles.values():
        table.add_column(title, justify="right", no_wrap=True)
    metrics, counts = decisions.metrics, decisions.counts()

    def cells(key: str, name: str) -> list[str]:
        row = counts[key][name]
        shares = ["{} of {}".format(*row[kind]) for kind in ("defective", "normal")]
        return [*shares, *_cells(metrics[key][name], RATED)]

    for name in metrics[PER_CLASS_DECISION]:
        table.add_row(Text(plain(name)), *cells(PER_CLASS_DECISION, name))
    table.add_section()
    table.add_row("all together", *cells(POOLED, POOLED), style="bold")
    return table


def _cells(values: dict[str, float], metrics: Iterable[str]) -> list[str]:
    return ["-" if math.isnan(values[metric]) else f"{values[metric]:.3f}" for metric in metrics]
