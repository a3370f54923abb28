"""Test whether recently scored images have drifted from the images that the model was calibrated on.

The mix of products may change from day to day, and scored images have no class. So each image, recent or of the
calibration, is assigned to the class with the nearest image statistics, and images are compared within that class.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
from rich.table import Table
from rich.text import Text
from scipy import stats
from sklearn.covariance import ledoit_wolf

from vlmdiff.core.errors import InputError, explained
from vlmdiff.core.files import atomic_path, check_out, write_json
from vlmdiff.core.params import Monitor, Params
from vlmdiff.core.text import counted, plain
from vlmdiff.detection.calibration import Calibration
from vlmdiff.detection.settings import Settings
from vlmdiff.evaluation import pages
from vlmdiff.evaluation.decision import clopper_pearson
from vlmdiff.evaluation.judging import REFERENCE
from vlmdiff.evaluation.plots import draw_distributions
from vlmdiff.model.pipeline import verify_model
from vlmdiff.production.score import SCHEMA, find_model, folder_name

STATISTICS = ("brightness", "contrast", "sharpness", "red", "green", "blue", "width", "height")
MEASURED = ("score", *STATISTICS)
NEW, ALARMS = "new kinds", "alarms"
# Three questions share the false alarm rate evenly, and the tests of a question its share. Is each image like some
# class? Are the statistics of a class's images unchanged? Does the detector score as before?
QUESTIONS = ((NEW,), STATISTICS, ("score", ALARMS))
# Folds in which calibration images are compared with the others; points of the grid over possible alarm rates.
PARTS, GRID = 20, 200
JSON, PAGE = "monitor.json", "monitor.html"
USUAL = 0.95  # share of days with at most as many alarms as a check calls usual


class Answer(NamedTuple):
    """The result of one test, before correction; fields as in `DriftTest`."""

    statistic: float
    p: float
    then: float
    now: float
    why: str


@dataclass(frozen=True)
class DriftTest:
    """A test and its result.

    `corrected` is `p` times the number of questions and of the question's tests, at most 1. The test passes if that
    exceeds the false alarm rate. `then` and `now` are the compared values, `why` explains the result in a sentence.
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
class ClassAlarms:
    """How many of the recent images that are most like a class raised an alarm.

    low, high: the 95 % interval (Clopper-Pearson) of the share of alarms; then: the share among the normal calibration
    images that are most like the class, None if there are none.
    """

    class_name: str
    images: int
    alarms: int
    low: float
    high: float
    then: float | None


@dataclass(frozen=True)
class DriftCheck:
    """The result of a drift check: `images` recent images were compared with `reference` calibration images.

    unreadable: recent images that could not be read; repeated: recent images with the same bytes as another one, which
    count once; others: images scored by other models, which are ignored; classes: the alarms by class, which are shown
    and not tested one by one.
    """

    verdict: Literal["drift", "no drift", "too few photographs"]
    outcome: str
    images: int
    reference: int
    unreadable: int
    others: int
    false_alarm_rate: float
    tests: list[DriftTest]
    repeated: int = 0
    classes: list[ClassAlarms] = field(default_factory=list)

    @property
    def drift(self) -> bool:
        return self.verdict == "drift"

    @property
    def found(self) -> list[DriftTest]:
        """The failed tests, the smallest corrected p first."""
        return sorted((test for test in self.tests if not test.passed), key=lambda test: test.corrected)


def monitor(scores: Path, out: Path, params: Params, model: Path | None = None, last: int | None = None) -> DriftCheck:
    """Check the newest images of `scores` for drift, and write `monitor.json` and `monitor.html` into `out`.

    scores: a dataset that `vlmdiff score` wrote, or a folder of several; model: a detector's folder, instead of the
    champion; last: the number of images, instead of `monitor.last`. Raises InputError if an input is missing or
    invalid, or `out` holds other files.
    """
    check_out(out, (JSON, PAGE).__contains__)
    folder, name = find_model(model, params)
    names = {name, folder_name(folder)}
    reference, calibration = read_reference(folder)
    known = Known.of(reference)
    rows = read_scores(scores)
    ours = rows["model"].isin(names)
    newest = rows[ours].tail(last or params.monitor.last)
    readable = newest[newest["error"].isna()]
    unreadable, others = len(newest) - len(readable), int((~ours).sum())
    readable = readable.drop_duplicates("image_id", keep="last").reset_index(drop=True)
    found = check(readable, known, calibration, params.monitor, unreadable, others)
    repeated = len(newest) - unreadable - len(readable)
    found = feed_check(replace(found, repeated=repeated), len(newest))
    with atomic_path(out / PAGE) as temporary:
        temporary.write_text(page(found, readable, known), encoding="utf-8")
    write_json(out / JSON, {**asdict(found), "drift": found.drift})
    return found


def read_scores(path: Path) -> pd.DataFrame:
    """Read rows that `vlmdiff score` wrote, in the order of scoring, each file once per model.

    Raises InputError if the files are something else.
    """
    found = list(path.rglob("*.parquet")) if path.is_dir() else [path]
    # As for other readers of Parquet datasets: what begins with an underscore or a dot is something else.
    hidden = {file for file in found if any(name[0] in "._" for name in file.relative_to(path).parts)}
    files = sorted(str(file) for file in found if file.is_file() and file not in hidden)
    if not files:
        raise InputError(f"{path} has no Parquet files. Name a folder that `vlmdiff score` wrote")
    named = ["path", "model", "scored_at"]
    columns = [*named, "image_id", "score", "is_anomalous", "error", *STATISTICS]
    try:
        frame = pa.dataset.dataset(files, SCHEMA).to_table(columns=columns).to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} was not written by `vlmdiff score`: {error}") from error
    if (without := frame[named].isna().any(axis=1)).any():
        raise InputError(f"{path} was not written by `vlmdiff score`: {without.sum()} rows lack a path, model or time")
    readable = frame["error"].isna()
    if missing := frame.loc[readable & frame[["image_id", "is_anomalous"]].isna().any(axis=1), "path"].tolist():
        raise InputError(f"{path} is damaged: the row of {missing[0]} has no verdict. Score it again")
    _check_finite(frame[readable], ["score", *STATISTICS], "path", f"{path} is damaged", "Score it again")
    frame = frame.sort_values("scored_at", kind="stable")
    # A photograph that was scored twice counts once. Another file with the same bytes is another one.
    return frame.drop_duplicates(["path", "image_id", "model"], keep="last").reset_index(drop=True)


def _check_finite(frame: pd.DataFrame, columns: Sequence[str], name: str, what: str, remedy: str) -> None:
    """Raise InputError that names the first row and column with a value that is not a finite number."""
    values = frame[list(columns)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        where = f"the row of {frame[name].iloc[row]} has no {columns[column]} that is a finite number"
        raise InputError(f"{what}: {where}. {remedy}")


def read_reference(model: Path) -> tuple[pd.DataFrame, Calibration]:
    """Read the calibration images of a detector, one row each.

    Raises InputError if its folder does not have them, or a file in it has changed since it was written.
    """
    file = model / REFERENCE
    if not file.is_file():
        raise InputError(f"{model} has no {REFERENCE}, the list of its calibration images. Run `vlmdiff evaluate`")
    verify_model(model)
    calibration = Settings.read(model).calibration
    remedy = "Run `vlmdiff evaluate` again, or restore the folder"
    with explained(file, remedy):
        frame = pd.read_parquet(file, columns=["image_id", "class_name", *MEASURED])
    if frame.empty or frame["class_name"].isna().any():
        raise InputError(f"{file} is damaged: it has no images, or one without a class. {remedy}")
    _check_finite(frame, MEASURED, "image_id", f"{file} is damaged", remedy)
    return frame, calibration


@dataclass(frozen=True)
class Classes:
    """The classes in the space of image statistics: a mean for each class (C, S), and one covariance for all."""

    names: np.ndarray
    means: np.ndarray
    scale: np.ndarray
    precision: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray, classes: np.ndarray) -> "Classes":
        """Estimate the classes from image statistics (N, S) and class names (N,)."""
        names, members = np.unique(classes, return_inverse=True)
        means = np.array([values[members == i].mean(axis=0) for i in range(len(names))])
        around = values - means[members]
        deviation = around.std(axis=0)
        # A statistic that never varies, such as the width, keeps its own unit.
        scale = np.where(deviation > 0, deviation, 1.0)
        # Shrinkage, since images may be few and the means of the colours nearly determine the brightness.
        covariance, _ = ledoit_wolf(around / scale, assume_centered=True)
        return cls(names, means, scale, np.linalg.pinv(covariance, hermitian=True))

    def nearest(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest class of each image (N, S), and its Mahalanobis distance."""
        away = (values[:, None] - self.means) / self.scale
        squares = np.einsum("ncs,st,nct->nc", away, self.precision, away)
        return self.names[squares.argmin(axis=1)], np.sqrt(squares.min(axis=1))


@dataclass(frozen=True)
class Known:
    """The calibration images: their rows, nearest classes and distances."""

    rows: pd.DataFrame
    classes: Classes
    nearest: np.ndarray
    distance: np.ndarray

    @classmethod
    def of(cls, reference: pd.DataFrame) -> "Known":
        """Compare each image with the others only: otherwise it would look nearer than a new image does."""
        values, names = _values(reference), reference["class_name"].to_numpy(str)
        # An image without others has no class and an infinite distance.
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
    """Test recent images, one row each, against the calibration images.

    If nothing has changed but the mix of classes, the verdict is drift in at most a share `false_alarm_rate` of checks,
    on average over calibrations: Bonferroni's correction holds for dependent tests too. benchmarks/monitor.py measures
    this rate.
    """
    images = len(recent)
    facts = (images, len(known.rows), unreadable, others, params.false_alarm_rate)
    nearest, distance = known.classes.nearest(_values(recent)) if images else (np.empty(0, str), np.empty(0))
    classes = _by_class(recent, nearest, known)
    if images < params.min_images:
        outcome = f"{counted(images, 'image', 'are')} too few for a check: monitor.min_images is {params.min_images}"
        return DriftCheck("too few photographs", outcome, *facts, [], classes=classes)
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
        outcome = f"drift in the last {counted(images, 'image')}: {', '.join(failed)}"
        return DriftCheck("drift", outcome, *facts, tests, classes=classes)
    return DriftCheck("no drift", f"no drift in the last {counted(images, 'image')}", *facts, tests, classes=classes)


def _by_class(recent: pd.DataFrame, nearest: np.ndarray, known: Known) -> list[ClassAlarms]:
    """Count the alarms of the recent images by the class that they are most like, the highest share first."""
    alarmed, found = recent["is_anomalous"].to_numpy(bool), []
    for name in known.classes.names:
        ours, then = alarmed[nearest == name], (known.rows["score"] > 0.5).to_numpy()[known.nearest == name]
        images, alarms = len(ours), int(ours.sum())
        if images:
            interval = clopper_pearson(alarms, images)
            found.append(ClassAlarms(str(name), images, alarms, *interval, float(then.mean()) if len(then) else None))
    return sorted(found, key=lambda one: -one.alarms / one.images)


def feed_check(found: DriftCheck, newest: int) -> DriftCheck:
    """Return the check with the verdict drift if more than half of the newest files show nothing new.

    Files that cannot be read, and the same picture again and again, come from a camera or a disk that is broken.
    """
    faults = [
        (found.unreadable, "could not be read"),
        (found.repeated, "are the same picture as another one: is the camera frozen?"),
    ]
    said = [f"{count} of the last {newest} images {what}" for count, what in faults if 2 * count > newest]
    if not said:
        return found
    return replace(found, verdict="drift", outcome="; ".join([*said, *([found.outcome] if found.tests else [])]))


def _values(rows: pd.DataFrame) -> np.ndarray:
    return rows[list(STATISTICS)].to_numpy(np.float64)


def _shift(what: str, recent: pd.DataFrame, nearest: np.ndarray, known: Known) -> Answer:
    """Test whether a column has its distribution at calibration: Kolmogorov-Smirnov by class, combined by Fisher.

    Ties, such as a width that never varies, make the test conservative.
    """
    then, now = known.rows[what].to_numpy(np.float64), recent[what].to_numpy(np.float64)
    names = [name for name in np.unique(nearest) if (known.nearest == name).any()]
    if not names:
        return Answer(0.0, 1.0, float(then.mean()), float(now.mean()), "no image is like a calibration image")
    pairs = [(then[known.nearest == name], now[nearest == name]) for name in names]
    found = [stats.ks_2samp(*pair) for pair in pairs]
    both = stats.combine_pvalues(np.maximum([one.pvalue for one in found], np.finfo(float).tiny), method="fisher")
    # The mean of the calibration images, weighted by the recent mix of classes.
    mixed = np.average([pair[0].mean() for pair in pairs], weights=[len(pair[1]) for pair in pairs])
    mean = np.concatenate([pair[1] for pair in pairs]).mean()
    worst = int(np.argmin([one.pvalue for one in found]))
    why = f"the mean was {mixed:.4g} on similar products and is now {mean:.4g}"
    if apart := found[worst].statistic:
        why += f"; the largest difference is {apart:.0%} (Kolmogorov-Smirnov), in images like {names[worst]}"
    return Answer(float(both.statistic), float(both.pvalue), float(mixed), float(mean), why)


def _new_kinds(distance: np.ndarray, known: Known) -> Answer:
    """Test whether too many images are further from every class than the furthest 1 % at calibration.

    Without drift their number has a beta-binomial distribution, whatever the distribution of the distances.
    """
    reference, images = len(known.distance), len(distance)
    rank = math.ceil(reference / 100)
    limit = np.sort(known.distance)[-rank]
    count = int((distance > limit).sum())
    p = float(stats.betabinom.sf(count - 1, images, rank, reference + 1 - rank))
    then, now = rank / (reference + 1), count / images
    why = (
        f"{count} of {counted(images, 'image')} further from every class than all but {rank} of {reference} "
        f"calibration images; {then * images:.0f} expected"
    )
    return Answer(float(count), p, then, now, why)


def _alarms(
    recent: pd.DataFrame, nearest: np.ndarray, known: Known, calibration: Calibration, defect_rate: float
) -> Answer:
    """Test whether there are more alarms than the guaranteed false alarm rate and `defect_rate` explain.

    The guarantee holds for the mix of classes at calibration. For the recent mix, the rate of each class has the
    distribution that its calibration images allow: a beta distribution, as in `Calibration.rate_range`.
    """
    alarmed, images = (known.rows["score"] > 0.5).to_numpy(), len(recent)
    chances = np.ones(1)
    for name in np.unique(nearest):
        count, of_class = int((nearest == name).sum()), alarmed[known.nearest == name]
        above, below = int(of_class.sum()), int((~of_class).sum())
        # Without a calibration image below the threshold, any rate is possible.
        rates = stats.beta.ppf((np.arange(GRID) + 0.5) / GRID, above + 1, below) if below else np.ones(1)
        rates = rates + (1 - rates) * defect_rate
        of_count = stats.binom.pmf(np.arange(count + 1)[:, None], count, rates).mean(axis=1)
        chances = np.convolve(chances, of_count)
    alarms, usual = int(recent["is_anomalous"].sum()), int(np.searchsorted(chances.cumsum(), USUAL))
    p = min(1.0, float(chances[alarms:].sum()))
    then = calibration.guarantee + (1 - calibration.guarantee) * defect_rate
    why = (
        f"{counted(alarms, 'alarm')} in {counted(images, 'image')}; at most {then * images:.0f} are expected, with "
        f"{calibration.guarantee:.1%} false alarms and {defect_rate:.1%} defective images; up to {usual} are usual in "
        "this mix of products"
    )
    return Answer(float(alarms), p, then, alarms / images, why)


def check_table(found: DriftCheck) -> Table:
    """Return the check for a terminal: the outcome, and its tests, the smallest corrected p first."""
    title = Text(plain(found.outcome))
    table = Table("what", "then", "now", "p", "corrected", "as before", title=title, title_justify="left")
    for test in sorted(found.tests, key=lambda test: test.corrected):
        said = "yes" if test.passed else "[bold red]no"
        numbers = (f"{test.then:.4g}", f"{test.now:.4g}", f"{test.p:.2g}", f"{test.corrected:.2g}")
        table.add_row(test.what, *numbers, said)
    return table


def class_table(found: DriftCheck) -> Table:
    """Return the alarms by class for a terminal."""
    table = Table("most like", "images", "alarms", "share", "95 % interval", "normal images, then")
    for one in found.classes:
        share, then = f"{one.alarms / one.images:.1%}", "-" if one.then is None else f"{one.then:.1%}"
        interval, name = f"{one.low:.1%} to {one.high:.1%}", Text(plain(one.class_name))
        table.add_row(name, str(one.images), str(one.alarms), share, interval, then)
    return table


def page(found: DriftCheck, recent: pd.DataFrame, known: Known) -> str:
    """Return the check as one HTML page without scripts or external files."""
    charts = {}
    if found.tests:
        nearest, _ = known.classes.nearest(_values(recent))
        # Calibration images, weighted by the recent mix of classes.
        weights = np.array([(nearest == name).sum() / (known.nearest == name).sum() for name in known.nearest])
        order = [test.what for test in sorted(found.tests, key=lambda test: test.corrected)]
        for what in sorted(MEASURED, key=order.index):
            then, now = known.rows[what].to_numpy(np.float64), recent[what].to_numpy(np.float64)
            charts[what] = draw_distributions(then, now, weights, what, 0.5 if what == "score" else None)
    return pages.page("monitor.html", check=found, charts=charts)
