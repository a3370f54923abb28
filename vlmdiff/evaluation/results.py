"""The table of results for the terminal."""

import math

from rich import box
from rich.table import Table
from rich.text import Text

from vlmdiff.core.text import plain
from vlmdiff.evaluation.metrics import METRICS, Results


def results_table(results: Results) -> Table:
    """Return a table with one row per class and the mean over classes; a dash marks undefined metrics."""
    left_out = sorted({name for names in results.left_out.values() for name in names})
    caption = Text(plain(f"- is not defined; the mean omits {', '.join(left_out)}")) if left_out else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("class", overflow="fold")
    for title in METRICS.values():
        table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, values in results.classes.items():
        table.add_row(Text(plain(name)), *_cells(values))
    table.add_section()
    table.add_row("mean", *_cells(results.mean), style="bold")
    return table


def _cells(values: dict[str, float]) -> list[str]:
    return ["-" if math.isnan(values[metric]) else f"{values[metric]:.3f}" for metric in METRICS]
