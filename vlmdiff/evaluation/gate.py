"""The promotion gate: judge a model by the criteria of params.yaml."""

import math

import numpy as np

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Gate
from vlmdiff.core.text import counted
from vlmdiff.evaluation.decision import DECISION, PER_CLASS_DECISION, POOLED, mcnemar, upper_bound
from vlmdiff.evaluation.evidence import Evidence
from vlmdiff.evaluation.metrics import METRICS
from vlmdiff.evaluation.verdict import Criterion, Relation


def judge(model: Evidence, champion: Evidence | InputError | None, params: Gate) -> list[Criterion]:
    """Judge a model by floors and limits and, if there is a champion, by the comparison with it.

    champion: an InputError if the champion could not be evaluated on the model's test images; the comparison then
    fails. Raises ValueError if the two were evaluated on different test images.
    """
    criteria = []
    for metric, floor in params.floors.items():
        title = METRICS.get(metric) or DECISION[metric]
        by_class = model.results.classes if metric in METRICS else model.decisions.metrics[PER_CLASS_DECISION]
        values = {name: metrics[metric] for name, metrics in by_class.items()}
        if floor.pooled is not None:
            pooled = model.decisions.metrics[POOLED][POOLED][metric]
            criteria.append(_bound(f"pooled {title}", pooled, "at least", floor.pooled))
        if floor.mean is not None:
            # NaN of one class makes the mean NaN: a model must not pass because a class has no result.
            mean = sum(values.values()) / len(values) if values else math.nan
            criteria.append(_bound(f"mean {title}", mean, "at least", floor.mean))
        if floor.every_class is not None:
            criteria += [
                _bound(f"{title} of {name}", value, "at least", floor.every_class)
                for name, value in sorted(values.items())
            ]
    if (limit := params.max_false_alarm_rate) is not None:
        alarms, images = model.decisions.counts()[POOLED][POOLED]["normal"]
        criteria.append(_false_alarms(alarms, images, params.confidence, limit))
    for name, value, limit in (
        ("latency in ms", model.latency_ms, params.max_latency_ms),
        ("size in MB", model.size_mb, params.max_size_mb),
    ):
        if limit is not None:
            criteria.append(_bound(name, value, "at most", limit))
    if champion is not None:
        criteria += _compare(model, champion, params)
    if isinstance(champion, Evidence) and params.no_worse_verdicts:
        criteria.append(_compare_verdicts(model, champion, params.confidence))
    return criteria


def _false_alarms(alarms: int, images: int, confidence: float, limit: float) -> Criterion:
    bound = upper_bound(alarms, images, confidence)
    said = f"is at most {bound:.4f} with {confidence:.0%} confidence" if images else "is not defined"
    why = f"{alarms} of {images} normal test images raise an alarm: the rate {said}, at most {limit:g} allowed"
    return Criterion("upper bound of the false-alarm rate", bound, "at most", limit, why)


def _compare_verdicts(model: Evidence, champion: Evidence, confidence: float) -> Criterion:
    """Return whether the verdicts are no worse than the champion's on the same images (McNemar)."""
    ours, theirs = (
        # Both list the same images; one that is there twice has the same verdict twice.
        evidence.scores.sort_values(["class_name", "image_id", "is_anomalous", "verdict"], ignore_index=True)
        for evidence in (model, champion)
    )
    truth = ours["is_anomalous"].to_numpy(bool)
    own, other = (table["verdict"].to_numpy(bool) == truth for table in (ours, theirs))
    won, lost = own & ~other, other & ~own
    p, required = mcnemar(int(lost.sum()), int(won.sum())), round(1 - confidence, 9)

    def by_truth(images: np.ndarray) -> str:
        return f"{(images & truth).sum()} defective and {counted((images & ~truth).sum(), 'normal image')}"

    why = (
        f"only this model is right about {by_truth(won)}, only the champion about {by_truth(lost)}: exact McNemar "
        f"p = {p:.4f} for being worse, more than {required:g} required"
    )
    return Criterion("verdicts no worse than the champion's, p", p, "more than", required, why)


def _compare(model: Evidence, champion: Evidence | InputError, params: Gate) -> list[Criterion]:
    title = METRICS[params.metric]
    gain, fall = f"gain in mean {title}", f"largest fall of a class in {title}"
    if isinstance(champion, InputError):
        why = f"the champion could not be evaluated on these test images: {champion}"
        return [Criterion(gain, math.nan, "more than", params.margin, why)]
    if model.test_set != champion.test_set:
        raise ValueError("only models that were evaluated on the same test images can be compared")
    classes = model.results.classes
    falls = {
        # Rounded as the metrics are: a drop of exactly the allowed amount must not fail by its last bit.
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
        worst = max(falls, key=falls.__getitem__)
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
