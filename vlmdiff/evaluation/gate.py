"""The promotion gate: criteria from params.yaml, what was measured, and why it passed or not."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import write_json
from vlmdiff.core.params import Gate
from vlmdiff.evaluation.judging import Evidence
from vlmdiff.evaluation.metrics import METRICS

Relation = Literal["at least", "more than", "at most"]


@dataclass(frozen=True)
class Criterion:
    """What was measured and what was required of it; `measured` is NaN where it is not defined, and never passes."""

    name: str
    measured: float
    relation: Relation
    required: float
    why: str

    @property
    def passed(self) -> bool:
        # Every comparison with NaN is false.
        match self.relation:
            case "at least":
                return self.measured >= self.required
            case "more than":
                return self.measured > self.required
            case "at most":
                return self.measured <= self.required


@dataclass(frozen=True)
class Override:
    """Who let a model pass that the gate did not, and why."""

    by: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The gate's word on a model, judged against the champion there was, if any.

    version: of the registered model, None for one that is not registered; rejudged: the champion was judged anew, as
    the test images are not those it was judged on.
    """

    version: int | None
    champion: int | None
    rejudged: bool
    is_champion: bool
    criteria: list[Criterion]
    override: Override | None = None

    @property
    def passed(self) -> bool:
        return all(criterion.passed for criterion in self.criteria)

    @property
    def reasons(self) -> list[str]:
        """A sentence a criterion, the broken ones first."""
        return [criterion.why for criterion in sorted(self.criteria, key=lambda criterion: criterion.passed)]

    @property
    def outcome(self) -> str:
        """The verdict in a sentence."""
        name = "the model" if self.version is None else f"version {self.version}"
        said = f"{name} {'passes' if self.passed else 'does not pass'} the gate"
        if self.override:
            said += f", is let through by {self.override.by} ({self.override.reason})"
        if self.is_champion:
            return f"{said} and is champion"
        return f"{said}; {'there is no champion' if self.champion is None else f'version {self.champion} is champion'}"

    def write(self, path: Path) -> None:
        """Write gate.json; a measure that is not defined is null."""
        rows = [{**asdict(c), "measured": _null(c.measured), "passed": c.passed} for c in self.criteria]
        write_json(path, {**asdict(self), "passed": self.passed, "outcome": self.outcome, "criteria": rows})

    @classmethod
    def read(cls, path: Path) -> "Verdict":
        """Read what `write` wrote. Raises InputError where the file is missing or is something else."""
        try:
            facts = json.loads(Path(path).read_text())
            criteria = [
                Criterion(row["name"], _number(row["measured"]), row["relation"], row["required"], row["why"])
                for row in facts["criteria"]
            ]
            override = facts["override"] and Override(**facts["override"])
            known = [facts[key] for key in ("version", "champion", "rejudged", "is_champion")]
            return cls(*known, criteria, override)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: run `vlmdiff gate` first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no verdict of the gate ({error!r}): run `vlmdiff gate`") from error


def judge(model: Evidence, champion: Evidence | InputError | None, params: Gate) -> list[Criterion]:
    """Judge a model by the floors and limits and, where there is a champion, by the comparison with it.

    The champion is an InputError where it could not be judged on the model's test images: that does not pass.
    """
    criteria = []
    for metric, floor in params.floors.items():
        title = METRICS[metric]
        values = {name: metrics[metric] for name, metrics in model.results.classes.items()}
        if floor.mean is not None:
            # The mean of Results leaves out what is not defined: a model must not pass for having less to show.
            mean = sum(values.values()) / len(values) if values else math.nan
            criteria.append(_bound(f"mean {title}", mean, "at least", floor.mean))
        if floor.every_class is not None:
            criteria += [
                _bound(f"{title} of {name}", value, "at least", floor.every_class)
                for name, value in sorted(values.items())
            ]
    for name, value, limit in (
        ("latency in ms", model.latency_ms, params.max_latency_ms),
        ("size in MB", model.size_mb, params.max_size_mb),
    ):
        if limit is not None:
            criteria.append(_bound(name, value, "at most", limit))
    if champion is not None:
        criteria += _compare(model, champion, params)
    return criteria


def _compare(model: Evidence, champion: Evidence | InputError, params: Gate) -> list[Criterion]:
    title = METRICS[params.metric]
    gain, fall = f"gain in mean {title}", f"largest fall of a class in {title}"
    if isinstance(champion, InputError):
        why = f"the champion could not be judged on these test images: {champion}"
        return [Criterion(gain, math.nan, "more than", params.margin, why)]
    if model.test_set != champion.test_set:
        raise ValueError("only models that were judged on the same test images can be compared")
    classes = model.results.classes
    falls = {
        # Rounded as the measures are: a fall of exactly what is allowed must not fail by its last bit.
        name: round(values[params.metric] - classes[name][params.metric], 9)
        for name, values in sorted(champion.results.classes.items())
        if name in classes and not math.isnan(values[params.metric])
    }
    undefined = [name for name, by in falls.items() if math.isnan(by)]
    if undefined or not falls:
        lower, worst = math.nan, ""
        why_gain = f"{title} of {', '.join(undefined) or 'any class of the champion'} is not defined"
    else:
        lower = round((model.resampled - champion.resampled).lower_bound(params.metric, params.confidence), 9)
        worst = max(falls, key=falls.get)
        gained = -sum(falls.values()) / len(falls) + 0.0  # not -0
        why_gain = (
            f"mean {title} differs from the champion's by {gained:+.4f}, with "
            f"{params.confidence:.0%} confidence by more than {lower:+.4f}; more than {params.margin:+.4f} required"
        )
    criteria = [Criterion(gain, lower, "more than", params.margin, why_gain)]
    if (limit := params.max_class_drop) is not None:
        by, why = math.nan, why_gain
        if worst:
            by, now = max(falls[worst], 0.0), classes[worst][params.metric]
            why = f"{title} of {worst} falls by {by:.4f} to {now:.4f}, at most {limit:g} allowed"
            why = why if by else f"no class falls in {title}"
        criteria.append(Criterion(fall, by, "at most", limit, why))
    return criteria


def _bound(name: str, value: float, relation: Relation, required: float) -> Criterion:
    said = "is not defined" if math.isnan(value) else f"is {value:.4f}"
    word = "required" if relation == "at least" else "allowed"
    return Criterion(name, value, relation, required, f"{name} {said}, {relation} {required:g} {word}")


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def verdict_table(verdict: Verdict) -> Group:
    """The gate's verdict for the terminal: the outcome, and a row a criterion."""
    headline = Text(verdict.outcome, "bold green" if verdict.passed else "bold red")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("criterion", overflow="fold")
    for title in ("measured", "required"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for c in verdict.criteria:
        measured = "not defined" if math.isnan(c.measured) else f"{c.measured:.4f}"
        state = Text("passed", "green") if c.passed else Text("failed", "red")
        table.add_row(c.name, measured, f"{c.relation} {c.required:g}", state)
    return Group(headline, table)
