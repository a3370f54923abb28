"""What is left of a mask at the model's resolution: no defect vanishes, and finding one never costs."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from vlmdiff.core.params import Validate
from vlmdiff.data.images import load_mask, shrink
from vlmdiff.data.rules import mask_faults
from vlmdiff.evaluation.bootstrap import Statistics
from vlmdiff.evaluation.metrics import evaluate_classes
from vlmdiff.evaluation.streaming import StreamingMetrics

LIMIT, SIZE = 10**9, 64


def square(side: int, mark: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[side // 2 + 3 : side // 2 + 3 + mark, side // 3 : side // 3 + mark] = True
    return mask


@pytest.mark.parametrize(("side", "mark"), [(1024, 1), (1024, 4), (1024, 11), (1024, 12), (4096, 16), (4096, 46)])
def test_a_small_defect_in_a_large_photograph_keeps_a_pixel_where_it_is(tmp_path, side, mark):
    Image.fromarray(square(side, mark)).save(tmp_path / "mask.png")
    kept = load_mask(tmp_path / "mask.png", SIZE, LIMIT)
    assert 1 <= kept.sum() <= 4
    rows, columns = np.nonzero(kept)
    assert abs(rows - (side // 2 + 3 + mark / 2) * SIZE / side + 0.5).max() <= 1
    assert abs(columns - (side // 3 + mark / 2) * SIZE / side + 0.5).max() <= 1


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("blob", [0, 40])
def test_a_scratch_thinner_than_a_pixel_stays_whole(slope, blob):
    mask = np.zeros((1024, 1024), bool)
    for x in range(100, 900):
        y = 60 + round(slope * (x - 100))
        mask[y : y + 4, x] = True
    mask[60 : 60 + blob, 60 : 60 + blob + 40] |= bool(blob)
    kept, small = shrink(mask, SIZE)
    # Beside a blob, a pixel of it may be missing, as at its ends.
    assert ndimage.label(kept, np.ones((3, 3)))[1] <= 1 + bool(blob) and small == (blob == 0)
    assert 47 <= len(np.unique(np.nonzero(kept)[1])) <= 53


@pytest.mark.parametrize("shape", [(300, 300), (625, 256), (64, 200), (40, 1000), (20, 30)])
def test_every_region_keeps_a_pixel_and_those_that_fill_half_of_one_are_as_before(shape):
    rng = np.random.default_rng(sum(shape))
    mask = ndimage.binary_dilation(rng.random(shape) < 0.002, iterations=2) | (rng.random(shape) < 0.002)
    kept, _ = shrink(mask, SIZE)
    share = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BOX))
    assert kept[share >= 0.5].all()
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    rows, columns = ((2 * np.arange(n) + 1) * SIZE // (2 * n) for n in shape)
    assert set(labels[mask & kept[rows][:, columns]]) == set(range(1, count + 1))


def test_a_mask_of_the_models_size_and_large_defects_stay_as_they_are():
    mask = np.zeros((256, 256), bool)
    mask[32:96, 64:192] = True
    kept, small = shrink(mask, SIZE)
    assert not small and (kept.repeat(4, axis=0).repeat(4, axis=1) == mask).all()
    assert shrink(kept, SIZE) == (pytest.approx(kept), 0) and shrink(mask & False, SIZE)[1] == 0


def judged(found: bool, masks_of_small: list[np.ndarray]) -> dict[str, float]:
    """Metrics of ten normal images, four large defects that are found, and small ones that are found or missed."""
    rng = np.random.default_rng(0)
    maps, masks, scores = [], [], []
    for i in range(14 + len(masks_of_small)):
        anomaly_map = (0.1 * rng.random((SIZE, SIZE))).astype(np.float32)
        mask = np.zeros((SIZE, SIZE), bool)
        if 10 <= i < 14:
            mask[10:30, 10:30] = True
            anomaly_map[mask] = 0.9
        elif i >= 14:
            mask = masks_of_small[i - 14]
            if found:
                anomaly_map[40:42, 40:42] = 0.95
        maps.append(anomaly_map)
        masks.append(mask)
        scores.append(0.1 if i < 10 or (i >= 14 and not found) else 0.9)
    truths = [i >= 10 for i in range(len(maps))]
    classes = ["nut"] * len(maps)
    streamed = StreamingMetrics()
    for each in zip(classes, maps, masks, scores, truths, strict=True):
        streamed.add(*each)
    values = evaluate_classes(classes, maps, masks, scores, is_anomalous=truths).classes["nut"]
    assert streamed.results().classes["nut"] == pytest.approx(values, abs=1e-3)
    drawn = Statistics.of(maps, masks, scores, truths).metrics(np.ones((1, len(maps))), 0.3)
    assert {metric: value[0] for metric, value in drawn.items()} == pytest.approx(values, abs=1e-3)
    return values


@pytest.mark.parametrize("vanished", [False, True], ids=["shrunk here", "empty"])
def test_a_model_that_finds_small_defects_is_never_judged_worse_than_one_that_misses_them(vanished):
    mask = np.zeros((1024, 1024), bool)
    mask[652:663, 650:661] = True
    masks = [mask[::16, ::16] & False if vanished else shrink(mask, SIZE)[0]] * 16
    found, missed = judged(True, masks), judged(False, masks)
    assert all(found[metric] >= missed[metric] for metric in found), pd.DataFrame([found, missed])
    assert found["image_auroc"] > missed["image_auroc"]
    assert vanished or found["au_pro"] > missed["au_pro"] + 0.3


def test_the_contract_warns_of_defects_that_are_too_small_for_the_model():
    mask = square(1024, 4)
    mask[:4, :4] = mask[900:950, 900:950] = True
    said = mask_faults(Image.fromarray(mask), (1024, 1024), True, "m.png", SIZE)
    assert said == {"mask_small": "2 defects of less than half of a pixel at 64 x 64"}
    assert not mask_faults(Image.fromarray(mask), (1024, 1024), True, "m.png", 1024)
    from vlmdiff.data.contract import image_rules

    (rule,) = (rule for rule in image_rules(Validate(), False) if rule.name == "mask_small")
    assert rule.severity == "warning" and "raise first_stage.image_size" in rule.remedy
