"""One caption for a class: the medoid, by an oracle that compares every pair."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlmdiff.detection.class_captions import class_captions

CAPTIONS = st.lists(st.lists(st.sampled_from("abcdef"), max_size=5).map(" ".join), min_size=1, max_size=8)


def mean_similarity(caption, captions):
    def cosine(a, b):
        return len(a & b) / np.sqrt(len(a) * len(b)) if a and b else 0.0

    return np.mean([cosine(set(caption.split()), set(other.split())) for other in captions])


@given(CAPTIONS)
def test_the_caption_of_a_class_is_the_most_like_its_others(captions):
    found = class_captions(captions, ["thing"] * len(captions))["thing"]
    assert found in captions
    best = max(mean_similarity(caption, captions) for caption in captions)
    np.testing.assert_allclose(mean_similarity(found, captions), best, rtol=1e-9)


@given(CAPTIONS, st.randoms(use_true_random=False))
def test_the_order_of_the_images_plays_no_part(captions, random):
    pairs = [(caption, "even" if i % 2 == 0 else "odd") for i, caption in enumerate(captions)]
    before = class_captions(*zip(*pairs, strict=True))
    random.shuffle(pairs)
    assert class_captions(*zip(*pairs, strict=True)) == before


def test_classes_do_not_mix():
    captions = ["a red ball", "a red ball on white", "a red ball here", "green stripes", "green stripes", "blue"]
    classes = ["ball"] * 3 + ["fabric"] * 3
    assert class_captions(captions, classes) == {"ball": "a red ball", "fabric": "green stripes"}
