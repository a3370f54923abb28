"""Are the photographs of today like those that the model was calibrated on? What `vlmdiff score` wrote, tested.

The mix of products may be another each day, and nobody says what a photograph shows. So each one, of today and of
calibration alike, is put with the class that it is nearest to in its statistics, and compared within that class only.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
from rich.table import Table
from scipy import stats
from sklearn.covariance import ledoit_wolf

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_folder, write_json
from vlmdiff.core.params import Monitor, Params
from vlmdiff.detection.calibration import Calibration
from vlmdiff.detection.detector import SETTINGS
from vlmdiff.evaluation import pages
from vlmdiff.evaluation.judging import REFERENCE
from vlmdiff.evaluation.plots import draw_distributions

STATISTICS = ("brightness", "contrast", "sharpness", "red", "green", "blue", "width", "height")
MEASURED = ("score", *STATISTICS)
NEW, ALARMS = "new kinds", "alarms"
# Three questions share the false alarms evenly, and the tests of one its share: is each photograph like some class, are
# a class's photographs as they were, does the detector judge as it did?
QUESTIONS = ((NEW,), STATISTICS, ("score", ALARMS))
# A photograph of calibration is judged by the others, in so many parts; and the grid over what a rate may be.
PARTS, GRID = 20, 200
USUAL = 0.95  # of days have no more alarms than a check calls no surprise


class Answer(NamedTuple):
    """What a test says by itself; as in `DriftTest`."""

    statistic: float
    p: float
    then: float
    now: float
    why: str


@dataclass(frozen=True)
class DriftTest:
    """A question to the photographs, and its answer.

    `statistic` and `p` are as the test gives them; `corrected` is p times the number of questions and of a question's
    tests, at most 1, and the test is passed where that is above the false alarm rate. `then` and `now` are what it
    compares, `why` a sentence.
    """

    what: str
    statistic: float
    p: float
    corrected: float
    passed: bool
    then: float
    now: float
    why: str


@dataclass(frozen=True)
class DriftCheck:
    """What a check found. `images` of today were compared with `reference` images of calibration.

    `unreadable`: of the newest photographs; `others`: judged by other models than this one, and left out.
    """

    verdict: Literal["drift", "no drift", "too few photographs"]
    outcome: str
    images: int
    reference: int
    unreadable: int
    others: int
    false_alarm_rate: float
    tests: list[DriftTest]

    @property
    def drift(self) -> bool:
        return self.verdict == "drift"

    @property
    def found(self) -> list[DriftTest]:
        """The tests that were not passed, the clearest first."""
        return sorted((test for test in self.tests if not test.passed), key=lambda test: test.corrected)


def monitor(scores: Path, out: Path, params: Params, model: Path | None = None, last: int | None = None) -> DriftCheck:
    """DriftCheck the newest photographs of `scores`, and write the folder `out`: `monitor.json`, `monitor.html`.

    scores: the dataset that `vlmdiff score` writes, or a folder of several; model: a detector's folder, instead of the
    champion; last: how many photographs, instead of `monitor.last`. Raises InputError where something is missing or
    something else.
    """
    folder, names = _model(model, params)
    reference, calibration = read_reference(folder)
    known = Known.of(reference)
    rows = read_scores(scores)
    ours = rows["model"].isin(names)
    newest = rows[ours].tail(last or params.monitor.last)
    readable = newest[newest["error"].isna()].reset_index(drop=True)
    unreadable, others = len(newest) - len(readable), int((~ours).sum())
    found = check(readable, known, calibration, params.monitor, unreadable, others)
    with atomic_folder(out) as temporary:
        write_json(temporary / "monitor.json", {**asdict(found), "drift": found.drift})
        (temporary / "monitor.html").write_text(page(found, readable, known), encoding="utf-8")
    return found


def _model(folder: Path | None, params: Params) -> tuple[Path, set[str]]:
    """A detector's folder, and what `vlmdiff score` calls it."""
    names = set()
    if folder is None:
        from vlmdiff.registry.promotion import champion

        version, folder = champion(params)
        names.add(f"{params.registry.model_name}/{version}")
    elif not (folder / SETTINGS).is_file():
        raise InputError(f"{folder} is not a detector's folder: it has no {SETTINGS} (the evaluate stage writes it)")
    return folder, names | {f"sha256:{hashlib.sha256((folder / SETTINGS).read_bytes()).hexdigest()[:16]}"}


def read_scores(path: Path) -> pd.DataFrame:
    """The rows of what `vlmdiff score` wrote, by when they were judged, each photograph once by each model.

    Raises InputError where it is something else.
    """
    found = path.rglob("*.parquet") if path.is_dir() else [path]
    files = sorted(str(file) for file in found if file.is_file() and not file.name.startswith("."))
    if not files:
        raise InputError(f"{path} has no Parquet files: name what `vlmdiff score` wrote")
    columns = ["image_id", "score", "is_anomalous", "model", "error", "scored_at", *STATISTICS]
    try:
        frame = pa.dataset.dataset(files).to_table(columns=columns).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not what `vlmdiff score` writes: {error}") from error
    frame = frame.sort_values("scored_at", kind="stable")
    # One photograph that comes twice is no further evidence; one that does not exist has no hash.
    again = frame["image_id"].notna() & frame.duplicated(["image_id", "model"], keep="last")
    return frame[~again].reset_index(drop=True)


def read_reference(model: Path) -> tuple[pd.DataFrame, Calibration]:
    """What a detector was calibrated on, a row a photograph. Raises InputError where the folder does not say."""
    file = model / REFERENCE
    if not file.is_file():
        raise InputError(f"{model} has no {REFERENCE}, which says what it was calibrated on: run `vlmdiff evaluate`")
    calibration = Calibration(**json.loads((model / SETTINGS).read_text())["calibration"])
    return pd.read_parquet(file, columns=["image_id", "class_name", *MEASURED]), calibration


@dataclass(frozen=True)
class Classes:
    """Where photographs of each class lie by their statistics: the classes' means (C, S), and one spread for all."""

    names: np.ndarray
    means: np.ndarray
    scale: np.ndarray
    precision: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray, classes: np.ndarray) -> "Classes":
        """From photographs (N, S) of these classes (N,)."""
        names, members = np.unique(classes, return_inverse=True)
        means = np.array([values[members == i].mean(axis=0) for i in range(len(names))])
        around = values - means[members]
        deviation = around.std(axis=0)
        # What never varies, as the width may, counts in its own unit.
        scale = np.where(deviation > 0, deviation, 1.0)
        # Shrunk, for there may be few photographs, and the colours' means all but determine the grey's.
        covariance, _ = ledoit_wolf(around / scale, assume_centered=True)
        return cls(names, means, scale, np.linalg.pinv(covariance, hermitian=True))

    def nearest(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The class that each photograph (N, S) is nearest to, and how far away it lies, in deviations."""
        away = (values[:, None] - self.means) / self.scale
        squares = np.einsum("ncs,st,nct->nc", away, self.precision, away)
        return self.names[squares.argmin(axis=1)], np.sqrt(squares.min(axis=1))


@dataclass(frozen=True)
class Known:
    """The photographs of calibration: their rows, the class that each is nearest to, how far it lies from it."""

    rows: pd.DataFrame
    classes: Classes
    nearest: np.ndarray
    distance: np.ndarray

    @classmethod
    def of(cls, reference: pd.DataFrame) -> "Known":
        """Each is judged by the others, as one of today is: else it would look nearer than that one."""
        values, names = _values(reference), reference["class_name"].to_numpy(str)
        # Beside no other, none is like it, and nothing is further away.
        nearest, distance = np.full_like(names, ""), np.full(len(names), np.inf)
        order = np.random.default_rng(0).permutation(len(names))
        for part in np.array_split(order, min(len(names), PARTS)):
            others = np.setdiff1d(order, part)
            if len(others):
                nearest[part], distance[part] = Classes.fit(values[others], names[others]).nearest(values[part])
        return cls(reference, Classes.fit(values, names), nearest, distance)


def check(
    recent: pd.DataFrame, known: Known, calibration: Calibration, params: Monitor, unreadable: int = 0, others: int = 0
) -> DriftCheck:
    """DriftTest photographs of today, a row each, against those of calibration.

    Where nothing has changed but the mix of the classes, the verdict is drift in a share `false_alarm_rate` of checks
    at most, over calibrations: Bonferroni's correction holds however the tests depend on each other. Classes that look
    alike are put together alike then and now; benchmarks/monitor.py measures what comes of it.
    """
    images = len(recent)
    facts = (images, len(known.rows), unreadable, others, params.false_alarm_rate)
    if images < params.min_images:
        outcome = f"{images} photographs are too few to say anything: monitor.min_images is {params.min_images}"
        return DriftCheck("too few photographs", outcome, *facts, [])
    nearest, distance = known.classes.nearest(_values(recent))
    tests = []
    for question in QUESTIONS:
        count = len(QUESTIONS) * len(question)
        for what in question:
            if what == NEW:
                found = _new_kinds(distance, known)
            elif what == ALARMS:
                found = _alarms(recent, nearest, known, calibration, params.defect_rate)
            else:
                found = _shift(what, recent, nearest, known)
            corrected = min(1.0, found.p * count)
            passed = corrected > params.false_alarm_rate
            tests.append(DriftTest(what, corrected=corrected, passed=passed, **found._asdict()))
    failed = [test.what for test in sorted(tests, key=lambda test: test.corrected) if not test.passed]
    if failed:
        return DriftCheck("drift", f"drift in the last {images} photographs: {', '.join(failed)}", *facts, tests)
    return DriftCheck("no drift", f"no drift in the last {images} photographs", *facts, tests)


def _values(rows: pd.DataFrame) -> np.ndarray:
    return rows[list(STATISTICS)].to_numpy(np.float64)


def _shift(what: str, recent: pd.DataFrame, nearest: np.ndarray, known: Known) -> Answer:
    """Whether a column is distributed as at calibration: Kolmogorov and Smirnov's test in each class, by Fisher's
    method in all. Ties, such as a width that never varies, make it the more cautious."""
    then, now = known.rows[what].to_numpy(np.float64), recent[what].to_numpy(np.float64)
    names = [name for name in np.unique(nearest) if (known.nearest == name).any()]
    if not names:
        return Answer(0.0, 1.0, float(then.mean()), float(now.mean()), "no photograph is like one of calibration")
    pairs = [(then[known.nearest == name], now[nearest == name]) for name in names]
    found = [stats.ks_2samp(*pair) for pair in pairs]
    both = stats.combine_pvalues(np.maximum([one.pvalue for one in found], np.finfo(float).tiny), method="fisher")
    # The mean that photographs of calibration would have in today's mix.
    mixed = np.average([pair[0].mean() for pair in pairs], weights=[len(pair[1]) for pair in pairs])
    mean = np.concatenate([pair[1] for pair in pairs]).mean()
    worst = int(np.argmin([one.pvalue for one in found]))
    why = f"its mean was {mixed:.4g} in photographs of like products and is {mean:.4g}"
    if apart := found[worst].statistic:
        why += f"; it differs most in those like {names[worst]}, of which {apart:.0%} lie apart"
    return Answer(float(both.statistic), float(both.pvalue), float(mixed), float(mean), why)


def _new_kinds(distance: np.ndarray, known: Known) -> Answer:
    """Whether more photographs than by chance lie further from every class than the last hundredth at calibration.

    How many of today's do so has, where nothing has changed, a beta-binomial distribution, whatever that of distances.
    """
    reference, images = len(known.distance), len(distance)
    rank = math.ceil(reference / 100)
    limit = np.sort(known.distance)[-rank]
    count = int((distance > limit).sum())
    p = float(stats.betabinom.sf(count - 1, images, rank, reference + 1 - rank))
    then, now = rank / (reference + 1), count / images
    why = (
        f"{count} of {images} photographs are further from every class than the last {rank} of {reference} at "
        f"calibration; {then * images:.0f} are to be expected"
    )
    return Answer(float(count), p, then, now, why)


def _alarms(
    recent: pd.DataFrame, nearest: np.ndarray, known: Known, calibration: Calibration, defect_rate: float
) -> Answer:
    """Whether there are more alarms than the calibration's guarantee and defective photographs explain.

    The guarantee is of the classes' mix at calibration. In today's, each class has the rate that its own photographs
    then leave possible: a beta distribution, as in `Calibration.rate_range`.
    """
    alarmed, images = (known.rows["score"] > 0.5).to_numpy(), len(recent)
    chances = np.ones(1)
    for name in np.unique(nearest):
        count, of_class = int((nearest == name).sum()), alarmed[known.nearest == name]
        above, below = int(of_class.sum()), int((~of_class).sum())
        # Without a photograph below the threshold any rate is possible.
        rates = stats.beta.ppf((np.arange(GRID) + 0.5) / GRID, above + 1, below) if below else np.ones(1)
        rates = rates + (1 - rates) * defect_rate
        of_count = stats.binom.pmf(np.arange(count + 1)[:, None], count, rates).mean(axis=1)
        chances = np.convolve(chances, of_count)
    alarms, usual = int(recent["is_anomalous"].sum()), int(np.searchsorted(chances.cumsum(), USUAL))
    p = min(1.0, float(chances[alarms:].sum()))
    then = calibration.guarantee + (1 - calibration.guarantee) * defect_rate
    why = (
        f"{alarms} alarms in {images} photographs; {then * images:.0f} are to be expected at most, where "
        f"{calibration.guarantee:.1%} of good ones are guaranteed and {defect_rate:.1%} are defective; in this mix of "
        f"products up to {usual} are no surprise"
    )
    return Answer(float(alarms), p, then, alarms / images, why)


def check_table(found: DriftCheck) -> Table:
    """The check for a terminal: its tests, the clearest first, under its outcome."""
    table = Table("what", "then", "now", "p", "corrected", "as before", title=found.outcome, title_justify="left")
    for test in sorted(found.tests, key=lambda test: test.corrected):
        said = "yes" if test.passed else "[bold red]no"
        numbers = (f"{test.then:.4g}", f"{test.now:.4g}", f"{test.p:.2g}", f"{test.corrected:.2g}")
        table.add_row(test.what, *numbers, said)
    return table


def page(found: DriftCheck, recent: pd.DataFrame, known: Known) -> str:
    """The check as one HTML page that needs neither a network nor a script."""
    charts = {}
    if found.tests:
        nearest, _ = known.classes.nearest(_values(recent))
        # Photographs of calibration in today's mix.
        weights = np.array([(nearest == name).sum() / (known.nearest == name).sum() for name in known.nearest])
        order = [test.what for test in sorted(found.tests, key=lambda test: test.corrected)]
        for what in sorted(MEASURED, key=order.index):
            then, now = known.rows[what].to_numpy(np.float64), recent[what].to_numpy(np.float64)
            charts[what] = draw_distributions(then, now, weights, what, 0.5 if what == "score" else None)
    return pages.page("monitor.html", check=found, charts=charts)
