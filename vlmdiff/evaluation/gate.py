"""The promotion gate: criteria from params.yaml, what was measured, and why it passed or not."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vlmdiff.errors import InputError
from vlmdiff.evaluation.metrics import METRICS, Results
from vlmdiff.files import write_json
from vlmdiff.params import Gate


@dataclass(frozen=True)
class Criterion:
    """What was measured and what was required of it; `measured` is NaN where it is not defined, and never passes."""

    name: str
    measured: float
    required: float
    why: str

    @property
    def passed(self) -> bool:
        # A comparison with NaN is false.
        return self.measured >= self.required


@dataclass(frozen=True)
class Verdict:
    """The gate's word on a version of the registered model, judged against the champion there was, if any."""

    version: int
    metric: str
    champion: int | None
    is_champion: bool
    criteria: list[Criterion]

    @property
    def passed(self) -> bool:
        return all(criterion.passed for criterion in self.criteria)

    @property
    def reasons(self) -> list[str]:
        """A sentence a criterion, the broken ones first."""
        return [criterion.why for criterion in sorted(self.criteria, key=lambda criterion: criterion.passed)]

    def write(self, path: Path) -> None:
        """Write gate.json; a measure that is not defined is null."""
        rows = [
            {**asdict(c), "measured": None if math.isnan(c.measured) else c.measured, "passed": c.passed}
            for c in self.criteria
        ]
        write_json(path, {**asdict(self), "passed": self.passed, "criteria": rows})

    @classmethod
    def read(cls, path: Path) -> "Verdict":
        """Read what `write` wrote. Raises InputError where the file is missing or is something else."""
        try:
            facts = json.loads(Path(path).read_text())
            criteria = [
                Criterion(
                    row["name"],
                    math.nan if row["measured"] is None else row["measured"],
                    row["required"],
                    row["why"],
                )
                for row in facts["criteria"]
            ]
            return cls(facts["version"], facts["metric"], facts["champion"], facts["is_champion"], criteria)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: run `vlmdiff promote` first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no verdict of the gate ({error!r}): run `vlmdiff promote`") from error


def judge(results: Results, champion: Results | None, params: Gate) -> list[Criterion]:
    """Judge a model's results by the floors and, where there is a champion, by the gain over its results.

    The gain is that of the mean over the classes that both were judged on; it is not defined where they share none.
    """
    title = METRICS[params.metric]
    values = {name: metrics[params.metric] for name, metrics in results.classes.items()}
    # The mean of Results leaves out what is not defined: a model must not pass for having less to show.
    mean = sum(values.values()) / len(values) if values else math.nan
    criteria = [_floor("mean", f"mean {title}", mean, params.min_mean)]
    criteria += [_floor(name, f"{title} of {name}", value, params.min_class) for name, value in sorted(values.items())]
    if champion is not None:
        shared = sorted(values.keys() & champion.classes.keys())
        gains = [values[name] - champion.classes[name][params.metric] for name in shared]
        gain = sum(gains) / len(gains) if gains else math.nan
        if math.isnan(gain):
            why = f"the gain over the champion in mean {title} is not defined: they share no class that defines it"
        else:
            # Rounded as the measures are: a gain of exactly what is required must not fail by its last bit.
            gain = round(gain, 9)
            why = (
                f"gain over the champion in mean {title}: {gain:+.4f}, at least {params.min_improvement:+.4f} required"
            )
        criteria.append(Criterion("improvement", gain, params.min_improvement, why))
    return criteria


def _floor(name: str, title: str, value: float, required: float) -> Criterion:
    if math.isnan(value):
        return Criterion(name, value, required, f"{title} is not defined, at least {required:.3f} required")
    return Criterion(name, value, required, f"{title} is {value:.4f}, at least {required:.3f} required")


def verdict_table(verdict: Verdict) -> Group:
    """The gate's verdict for the terminal: the outcome, and a row a criterion."""
    outcome = "passes the gate" if verdict.passed else "does not pass the gate"
    if verdict.is_champion:
        outcome += " and is champion"
    elif verdict.champion is not None:
        outcome += f"; version {verdict.champion} stays champion"
    else:
        outcome += "; there is no champion"
    headline = Text(f"version {verdict.version} {outcome}", "bold green" if verdict.passed else "bold red")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("criterion", overflow="fold")
    for title in ("measured", "required"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for c in verdict.criteria:
        measured = "not defined" if math.isnan(c.measured) else f"{c.measured:.4f}"
        state = Text("passed", "green") if c.passed else Text("failed", "red")
        table.add_row(c.name, measured, f"{c.required:.4f}", state)
    return Group(headline, table)
