"""One caption for a class: what its normal images' captions have in common, in the words of one of them."""

from collections import Counter, defaultdict
from collections.abc import Sequence


def class_captions(captions: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """By class, the caption whose words are most like those of the class's others.

    captions, classes: one an image. It is the medoid by cosine similarity of the captions' sets of words, case apart:
    of equals, the first in the alphabet, so that the images' order plays no part.
    """
    by_class = defaultdict(list)
    for caption, name in zip(captions, classes, strict=True):
        by_class[name].append(caption)
    return {name: _medoid(by_class[name]) for name in sorted(by_class)}


def _medoid(captions: list[str]) -> str:
    # The similarities' mean is that to the mean: one pass instead of every pair.
    mean = Counter()
    for caption in captions:
        words = _words(caption)
        for word in words:
            mean[word] += len(words) ** -0.5

    def similarity(caption: str) -> float:
        words = _words(caption)
        # In the alphabet's order: a sum must not depend on that of a set.
        return sum(mean[word] for word in sorted(words)) / max(len(words), 1) ** 0.5

    return min(set(captions), key=lambda caption: (-similarity(caption), caption))


def _words(caption: str) -> set[str]:
    return set(caption.lower().split())
