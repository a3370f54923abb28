"""Choose one caption per class: the most typical caption of its normal images."""

from collections import Counter, defaultdict
from collections.abc import Sequence


def class_captions(captions: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Return, by class, the caption whose words are most similar to those of the other captions of the class.

    `captions` and `classes` hold one entry per image. The result is the medoid by cosine similarity of the sets of
    lower-case words. Among equals, the first in alphabetical order wins, so the order of the images has no effect.
    """
    by_class = defaultdict(list)
    for caption, name in zip(captions, classes, strict=True):
        by_class[name].append(caption)
    return {name: _medoid(by_class[name]) for name in sorted(by_class)}


def _medoid(captions: list[str]) -> str:
    # The mean of the similarities is the similarity to the mean: one pass instead of all pairs.
    mean = Counter()
    for caption in captions:
        words = _words(caption)
        for word in words:
            mean[word] += len(words) ** -0.5

    def similarity(caption: str) -> float:
        words = _words(caption)
        # Sorted, because the rounding of the sum must not depend on the order of a set.
        return sum(mean[word] for word in sorted(words)) / max(len(words), 1) ** 0.5

    return min(set(captions), key=lambda caption: (-similarity(caption), caption))


def _words(caption: str) -> set[str]:
    return set(caption.lower().split())
