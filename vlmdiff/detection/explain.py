"""Say a verdict in words: how unusual, where, how that differs from normal images, and which one is the most similar.

`explain` makes the sentences for Python, `score`, the served model and the inspector's page.
"""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

# Regions that a sentence lists, and differences between captions.
LISTED = 3
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Words that say nothing without the next one.
SMALL = frozenset({"a", "an", "and", "at", "fills", "in", "is", "it", "its", "of", "on", "or", "the", "to", "with"})
# Words after a difference that say what it is about.
CONTEXT = 3
# Normal captions that are compared word by word: those that share the most words.
COMPARED = 8
# Captions less alike than this differ in too much to list.
ALIKE = 0.5


@dataclass(frozen=True)
class Region:
    """A connected part of the map above the threshold: its box (x1, y1 exclusive), area in pixels, and highest value.

    share: its part, from 0 to 1, of the evidence: of what exceeds the threshold anywhere in the map.
    """

    x0: int
    y0: int
    x1: int
    y1: int
    area: int
    peak: float
    share: float = 1.0


def find_regions(anomaly_map: np.ndarray, threshold: float = 0.5) -> list[Region]:
    """Return the 8-connected parts of a map (H, W) above the threshold, the highest peak first."""
    labels, _ = ndimage.label(anomaly_map > threshold, np.ones((3, 3)))
    # On the scale of the evidence itself, where the map's 0.5 is 1 (`detector.normalised`).
    evidence = anomaly_map / np.maximum(1 - anomaly_map.astype(np.float64), 1e-7)
    excess = np.where(labels > 0, evidence - threshold / max(1 - threshold, 1e-12), 0)
    total = max(float(excess.sum()), 1e-12)
    regions = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == label
        peak = float(anomaly_map[rows, columns][inside].max())
        share = float(excess[rows, columns][inside].sum()) / total
        regions.append(Region(columns.start, rows.start, columns.stop, rows.stop, int(inside.sum()), peak, share))
    return sorted(regions, key=lambda region: -region.peak)


def scaled(regions: Sequence[Region], shape: tuple[int, ...], size: tuple[int, int]) -> list[Region]:
    """Return the regions of a map (H, W) in the pixels of its photograph, whose width and height are `size`."""
    x, y = size[0] / shape[1], size[1] / shape[0]
    boxes = [(round(r.x0 * x), round(r.y0 * y), round(r.x1 * x), round(r.y1 * y)) for r in regions]
    return [Region(*box, round(r.area * x * y), r.peak, r.share) for box, r in zip(boxes, regions, strict=True)]


def explain(
    verdict: str,
    score: float,
    regions: Sequence[Region],
    size: tuple[int, int],
    words: str | None = None,
    nearest: str | None = None,
    product: str | None = None,
    p_value: float | None = None,
    normal_images: int | None = None,
) -> str:
    """Return what is known of a photograph, as sentences.

    verdict: `normal`, `anomalous`, or another word; regions: in pixels of the photograph, whose width and height are
    `size`; words: from `difference`; nearest: the path of the most similar normal training image; p_value: among
    `normal_images` normal images, each by what is usual for its product.
    """
    said = [f"{verdict[:1].upper()}{verdict[1:]}, score {score:.3f}."]
    if product is not None:
        said.append(f"Product: {product}.")
    if p_value is not None:
        # The p-value counts the image too.
        share = f"{100 * (1 - p_value):.1f} % of normal images"
        if normal_images is not None:
            share = f"{round((1 - p_value) * (normal_images + 1))} of {normal_images} normal images"
        # Images of all products count, each by what is usual for its own.
        said.append(
            f"More unusual than {share}."
            if product is None
            else f"More unusual for its product than {share} are for theirs."
        )
    if regions:
        # The same order and the same words whatever the order of equal peaks.
        largest = sorted(regions, key=lambda region: (-region.share, region.y0, region.x0))[:LISTED]
        listed = [f"{region.area} px {_place(region, size)}" for region in largest]
        if len(regions) > 1:
            shares = [_percent(region.share) for region in largest]
            shares[0] += " of the evidence"
            listed = [f"{place} ({share})" for place, share in zip(listed, shares, strict=True)]
        more = "" if len(regions) <= LISTED else ", the largest"
        noun = "region" if len(regions) == 1 else "regions"
        said.append(f"{_number(len(regions)).capitalize()} {noun}{more}: {_enumerated(listed)}.")
    if words is not None:
        said.append(f"In words: {words}.")
    if nearest is not None:
        said.append(f"Most similar normal training image: {nearest}.")
    return " ".join(said)


def difference(caption: str, normal: Sequence[str]) -> str | None:
    """Return how a photograph's caption differs from the most similar of its product's normal captions.

    For example "eight parts expected, seven seen". None if there are no normal captions, one of them is the same, or
    none is alike.
    """
    ours = words_of(caption)
    theirs = list(dict.fromkeys(tuple(words_of(text)) for text in normal))
    if not theirs or tuple(ours) in theirs:
        return None
    count = Counter(ours)
    theirs.sort(key=lambda tokens: -2 * (Counter(tokens) & count).total() / (len(tokens) + len(ours)))
    matches = [(difflib.SequenceMatcher(None, tokens, ours, autojunk=False), tokens) for tokens in theirs[:COMPARED]]
    closest, expected = max(matches, key=lambda match: match[0].ratio())
    if closest.ratio() < ALIKE:
        return None
    said = []
    for kind, a0, a1, b0, b1 in closest.get_opcodes():
        wanted, there = _phrase(expected[a0:a1]), _phrase(ours[b0:b1])
        if kind == "equal" or not (wanted or there):
            continue
        # What is counted or described: "eight red parts", "blue parts".
        words, end = (expected, a1) if wanted else (ours, b1)
        after = () if words[end - 1] in SMALL else words[end : end + CONTEXT]
        noun = " ".join(["", *itertools.takewhile(lambda word: word not in SMALL, after)])
        if wanted and there:
            said.append(f"{wanted}{noun} expected, {there} seen")
        else:
            said.append(f"{wanted}{noun} expected, not seen" if wanted else f"{there}{noun} seen, not expected")
    more = f" and {len(said) - LISTED} more" if len(said) > LISTED else ""
    return "; ".join(said[:LISTED]) + more


def _phrase(words: Sequence[str]) -> str:
    """Return words without the small ones around them."""
    kept = [i for i, word in enumerate(words) if word not in SMALL]
    return " ".join(words[kept[0] : kept[-1] + 1]) if kept else ""


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, in order."""
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.casefold())


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _percent(share: float) -> str:
    # 100 % means all of it, 0 % none.
    return f"{min(max(round(100 * share), 1), 99 if share < 1 - 1e-6 else 100)} %"


def _place(region: Region, size: tuple[int, int]) -> str:
    x, y = ((a + b) / 2 / side for a, b, side in ((region.x0, region.x1, size[0]), (region.y0, region.y1, size[1])))
    across = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    down = "upper" if y < 1 / 3 else "lower" if y > 2 / 3 else ""
    match down, across:
        case "", "":
            return "in the centre"
        case "", _:
            return f"at the {across}"
        case _, "":
            return f"at the {'top' if down == 'upper' else 'bottom'}"
        case _:
            return f"at the {down} {across}"


def _enumerated(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
