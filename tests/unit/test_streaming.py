"""Metrics from one pass: within their bound of the exact ones, the same to the last bit however they are merged."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdiff.core.errors import InputError
from vlmdiff.evaluation.metrics import METRICS, evaluate_classes
from vlmdiff.evaluation.streaming import StreamingMetrics


@st.composite
def judged(draw):
    """Classes, maps, masks (some not known), image scores and truths of a few images, at any scale, often with ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, side = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    names = [f"class {i}" for i in rng.integers(0, draw(st.integers(1, 3)), count)]
    masks = rng.random((count, side, side)) < draw(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]))
    masks[rng.random(count) < 0.3] = False
    kind = draw(st.sampled_from(["normal", "ties", "constant", "near", "wide"]))
    maps = {
        "normal": lambda: rng.normal(size=masks.shape) + masks,
        "ties": lambda: rng.integers(-2, 3, masks.shape) + masks,
        "constant": lambda: np.ones(masks.shape),
        "near": lambda: 1 + 1e-6 * rng.random(masks.shape),
        "wide": lambda: np.exp(rng.normal(0, 40, masks.shape).clip(-80, 18)) * rng.choice([-1, 1], masks.shape),
    }[kind]() * draw(st.sampled_from([1e-30, 1.0, 1e30]))
    maps = maps.astype(draw(st.sampled_from([np.float32, np.float64])))
    truths = [bool(mask.any()) for mask in masks]
    known = [None if truth and rng.random() < 0.2 else mask for mask, truth in zip(masks, truths, strict=True)]
    return names, list(maps), known, maps.max((1, 2)).tolist(), truths


def counted(images, max_fpr, order=None) -> StreamingMetrics:
    metrics = StreamingMetrics(max_fpr)
    rows = list(zip(*images, strict=True))
    for i in range(len(rows)) if order is None else order:
        metrics.add(*rows[i])
    return metrics


@settings(max_examples=300, deadline=None)
@given(judged(), st.sampled_from([0.01, 0.3, 1.0]))
def test_every_metric_is_within_its_bound_of_the_exact_one(images, max_fpr):
    names, maps, masks, scores, truths = images
    exact = evaluate_classes(names, maps, masks, scores, max_fpr, is_anomalous=truths).classes
    metrics = counted(images, max_fpr)
    results, errors = metrics.results().classes, metrics.errors()
    assert list(results) == list(exact)
    for name, metric in itertools.product(exact, METRICS):
        value, error = results[name][metric], errors[name][metric]
        assert math.isnan(value) == math.isnan(exact[name][metric])
        if not math.isnan(value):
            assert abs(value - exact[name][metric]) <= error


def test_the_bound_is_small_for_scores_as_a_detector_gives_them():
    rng = np.random.default_rng(0)
    masks = np.zeros((60, 64, 64), bool)
    masks[::2, 20:30, 20:40] = True
    maps = (rng.gamma(4, 1, masks.shape) + 2 * masks).astype(np.float32)
    maps /= maps + 8
    metrics = counted((["nut"] * 60, maps, masks, maps.max((1, 2)), masks.any((1, 2))), 0.3)
    errors = metrics.errors()["nut"]
    assert errors["au_pro"] < 1e-3 and errors["pixel_auroc"] < 1e-3


def state(metrics, file) -> bytes:
    metrics.save(file)
    return file.read_bytes()


@settings(max_examples=60, deadline=None)
@given(judged(), st.data())
def test_shards_merge_to_the_same_bits_in_any_order(tmp_path_factory, images, data):
    folder = tmp_path_factory.getbasetemp()
    count = len(images[0])
    whole = counted(images, 0.3)
    order = data.draw(st.permutations(range(count)))
    cut = data.draw(st.integers(0, count))
    shards = [counted(images, 0.3, order[:cut]), counted(images, 0.3, order[cut:])]
    if data.draw(st.booleans()):
        shards.reverse()
    merged = StreamingMetrics(0.3)
    for shard in shards:
        merged.merge(shard)
    assert repr(merged.results()) == repr(whole.results())
    assert repr(merged.errors()) == repr(whole.errors())
    assert state(merged, folder / "merged.npz") == state(whole, folder / "whole.npz")


def test_a_shard_travels_by_file(tmp_path):
    rng = np.random.default_rng(1)
    masks = rng.random((4, 8, 8)) < 0.2
    metrics = counted((["nut", "bolt"] * 2, rng.random(masks.shape), masks, rng.random(4), masks.any((1, 2))), 0.3)
    metrics.save(tmp_path / "shard.npz")
    again = StreamingMetrics.load(tmp_path / "shard.npz")
    assert repr((again.results(), again.errors())) == repr((metrics.results(), metrics.errors()))


@pytest.mark.parametrize("content", [b"", b"no counts", None])
def test_a_file_without_counts_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "shard.npz").write_bytes(content)
    with pytest.raises(InputError, match="has no counts"):
        StreamingMetrics.load(tmp_path / "shard.npz")


def test_the_state_of_a_class_does_not_grow_and_is_below_twenty_megabytes():
    rng = np.random.default_rng(2)
    metrics = StreamingMetrics()
    for scale in (1e-20, 1.0, -1.0, 1e20):
        for _ in range(20):
            metrics.add("nut", scale * rng.random((32, 32)), rng.random((32, 32)) < 0.1, 1.0)
    assert sum(array.nbytes for array in metrics.classes["nut"].arrays().values()) < 20 * 2**20


def test_what_cannot_be_counted_names_the_image():
    metrics = StreamingMetrics()
    empty = np.zeros((2, 2), bool)
    with pytest.raises(InputError, match=r"the score of a\.png is nan"):
        metrics.add("nut", np.zeros((2, 2)), empty, math.nan, name="of a.png")
    with pytest.raises(InputError, match=r"map of a\.png holds NaN"):
        metrics.add("nut", np.full((2, 2), np.nan), empty, 0.0, name="of a.png")
    with pytest.raises(InputError, match=r"map of a\.png has shape"):
        metrics.add("nut", np.zeros((2, 3)), empty, 0.0, name="of a.png")
    assert metrics.results().classes == {}


def test_other_limits_do_not_add_up():
    with pytest.raises(InputError, match="cannot merge"):
        StreamingMetrics(0.3).merge(StreamingMetrics(0.1))
    with pytest.raises(InputError, match="max_fpr"):
        StreamingMetrics(0.0)
