"""The promotion gate's verdict as data: criteria, what was measured, and why each passed or failed."""

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
from vlmdiff.core.text import plain

Relation = Literal["at least", "more than", "at most"]


@dataclass(frozen=True)
class Criterion:
    """One criterion: the measured value and the required one. A value that is not defined is NaN and never passes."""

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
    """The person who promotes a model that the gate refuses, and the reason."""

    by: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on a model, compared with the champion of that time, if there was one.

    version: the registered version, None for a model that is not registered; rejudged: whether the champion was
    evaluated again, because the test images have changed since its own evaluation.
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
        """One sentence per criterion, failed criteria first."""
        return [criterion.why for criterion in sorted(self.criteria, key=lambda criterion: criterion.passed)]

    @property
    def outcome(self) -> str:
        """The verdict as one sentence."""
        name = "the model" if self.version is None else f"version {self.version}"
        said = f"{name} {'passes' if self.passed else 'does not pass'} the gate"
        if self.override:
            said += f", was promoted by {self.override.by} ({self.override.reason})"
        if self.is_champion:
            return f"{said} and is champion"
        return f"{said}; {'there is no champion' if self.champion is None else f'version {self.champion} is champion'}"

    def write(self, path: Path) -> None:
        """Write the verdict as JSON; a value that is not defined becomes null."""
        rows = [
            {**asdict(c), "measured": None if math.isnan(c.measured) else c.measured, "passed": c.passed}
            for c in self.criteria
        ]
        write_json(path, {**asdict(self), "passed": self.passed, "outcome": self.outcome, "criteria": rows})

    @classmethod
    def read(cls, path: Path) -> "Verdict":
        """Read what `write` wrote. Raises InputError if the file is missing or invalid."""
        try:
            facts = json.loads(Path(path).read_text(encoding="utf-8"))
            criteria = [
                Criterion(row["name"], measured, row["relation"], row["required"], row["why"])
                for row in facts["criteria"]
                for measured in [math.nan if row["measured"] is None else float(row["measured"])]
            ]
            override = facts["override"] and Override(**facts["override"])
            known = {key: facts[key] for key in ("version", "champion", "rejudged", "is_champion")}
            return cls(**known, criteria=criteria, override=override)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist. Run `vlmdiff gate` first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a valid verdict ({error!r}). Run `vlmdiff gate` again") from error


def verdict_table(verdict: Verdict) -> Group:
    """Return the verdict for the terminal: the outcome, and one row per criterion."""
    headline = Text(plain(verdict.outcome), "bold green" if verdict.passed else "bold red")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("criterion", overflow="fold")
    for title in ("measured", "required"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for c in verdict.criteria:
        measured = "not defined" if math.isnan(c.measured) else f"{c.measured:.4f}"
        state = Text("passed", "green") if c.passed else Text("failed", "red")
        table.add_row(Text(plain(c.name)), measured, f"{c.relation} {c.required:g}", state)
    return Group(headline, table)
