"""The report as a file that a browser opens, the pictures in it, and the choice of photographs."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vlmdiff.errors import InputError
from vlmdiff.evaluation.bootstrap import Resampled
from vlmdiff.evaluation.metrics import METRICS, Results, evaluate_classes
from vlmdiff.evaluation.plots import curves
from vlmdiff.evaluation.report import Example, heatmap, pick_examples, write_report

NOTHING = {"pro": [], "roc": [], "precision_recall": []}


class Page(HTMLParser):
    """A page's text, tags and their attributes; an unbalanced tag is an error."""

    void = ("meta", "img", "wbr", "br", "link")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.images = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def example(seed=0, side=24, **changes):
    rng = np.random.default_rng(seed)
    mask = np.zeros((side, side), bool)
    mask[3:9, 4:12] = True
    values = {
        "path": f"nut/test/cut/{seed:03d}.png",
        "class_name": "nut",
        "defect": "cut",
        "score": 1.25,
        "is_anomalous": True,
        "verdict": True,
        "image": rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        "reconstruction": rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        "anomaly_map": rng.random((side, side)).astype(np.float32),
        "mask": mask,
    }
    return Example(**(values | changes))


def small_results():
    rng = np.random.default_rng(0)
    masks = np.zeros((8, 16, 16), bool)
    masks[::2, 4:8, 4:8] = True
    names, maps = ["nut"] * 4 + ["bolt"] * 4, rng.random(masks.shape) + masks
    return evaluate_classes(names, maps, masks, maps.max((1, 2))), curves(names, maps, masks)


def drawn(results) -> Resampled:
    """Samples that are all the same: that much is certain."""
    rows = {**results.classes, None: results.mean}
    return Resampled(
        {name: {metric: np.full(3, values[metric]) for metric in METRICS} for name, values in rows.items()}
    )


def written(path, results=None, examples=(), rows=NOTHING, provenance=None):
    results = results or small_results()[0]
    write_report(path, results, drawn(results), examples, rows, provenance or {})
    return path.read_text()


def picture(url):
    kind, data = url.split(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_the_report_shows_results_curves_photographs_and_what_made_it(tmp_path):
    results, rows = small_results()
    examples = [
        example(0, verdict=False, caption="A steel nut on felt."),
        example(1, class_name="bolt", defect="good", is_anomalous=False, path="bolt/test/good/7.png"),
    ]
    provenance = {"git revision": "0a1b2c3", "parameters": {"train": {"steps": 600, "channels": [64, 96]}}}
    page = Page(written(tmp_path / "report.html", results, examples, rows, provenance))
    for metric, title in METRICS.items():
        assert title in page.text
        assert f"{results.mean[metric]:.3f}" in page.text
        assert all(f"{values[metric]:.3f}" in page.text for values in results.classes.values())
    assert page.tags.count("polyline") == 6  # three curves, two classes
    assert len(page.images) == 8
    for text in (
        "Missed",
        "False alarms",
        "A steel nut on felt.",
        "score 1.25",
        "0a1b2c3",
        "steps 600",
        "64, 96",
    ):
        assert text in page.text
    assert "Passed" not in page.text and "Found" not in page.text
    assert "nut/test/cut/000.png" in page.text.replace(" ", "") and "bolt/test/good/7.png" in page.text.replace(" ", "")


def test_the_report_needs_no_network_and_no_script(tmp_path):
    results, rows = small_results()
    html = written(tmp_path / "report.html", results, [example()], rows)
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert all(image["src"].startswith("data:") for image in page.images)
    without_pictures = re.sub(r"data:image/webp;base64,[\w+/=]+", "", html)
    assert not re.search(r"https?:|url\(|@import|//\w", without_pictures)
    assert "default-src 'none'" in html


def test_markup_in_names_and_captions_is_shown_not_obeyed(tmp_path):
    hostile = "<script>alert(1)</script>\"'&"
    results = Results({hostile: dict.fromkeys(METRICS, 0.5)})
    shown = example(class_name=hostile, caption=hostile, path=hostile, defect=hostile)
    rows = NOTHING | {"roc": [{"class_name": hostile, "fpr": x, "tpr": x} for x in (0.0, 1.0)]}
    page = Page(written(tmp_path / "report.html", results, [shown], rows, {hostile: {hostile: [hostile]}}))
    assert "script" not in page.tags
    assert page.text.count("alert(1)") >= 8


def test_undefined_metrics_empty_curves_and_no_photographs_make_a_report(tmp_path):
    results = Results({"nut": dict.fromkeys(METRICS, float("nan"))})
    page = Page(written(tmp_path / "report.html", results))
    assert "nan" not in page.text.lower().split()
    assert "its mean leaves the class out" in page.text
    assert page.text.count("not defined for any class") == 3
    assert Page(written(tmp_path / "none.html", Results({}))).images == []


def test_the_same_input_gives_the_same_bytes(tmp_path):
    results, rows = small_results()
    examples = [example(0), example(1)]
    first = written(tmp_path / "a.html", results, examples, rows, {"x": 1})
    assert first == written(tmp_path / "b.html", results, examples, rows, {"x": 1})
    assert list(tmp_path.glob(".*")) == []


def test_many_large_photographs_stay_below_8_megabytes(tmp_path):
    examples = [example(seed, side=400) for seed in range(28)]  # noise: nothing compresses worse
    html = written(tmp_path / "report.html", examples=examples)
    assert 2e6 < len(html.encode()) < 8e6
    sides = {max(picture(image["src"]).shape) for image in Page(html).images[:8]}
    assert len(sides) == 1 and 64 < sides.pop() < 320


def test_pictures_are_photograph_reconstruction_map_and_truth(tmp_path):
    image, reconstruction = np.full((480, 640, 3), 200, np.uint8), np.full((64, 64, 3), 100, np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    shown = example(image=image, reconstruction=reconstruction, mask=mask, anomaly_map=mask.astype(float))
    images = Page(written(tmp_path / "report.html", examples=[shown])).images
    assert [image["alt"] for image in images] == ["photograph", "reconstruction", "anomaly map", "truth"]
    photograph, copy, heat, truth = (picture(image["src"]) for image in images)
    assert abs(photograph - 200).max() <= 3 and abs(copy - 100).max() <= 3
    assert photograph.shape == heat.shape == truth.shape == (240, 320, 3) and copy.shape == (64, 64, 3)
    assert heat[120, 160, 0] > heat[120, 160, 2] + 50 and np.ptp(heat[4, 4]) <= 6  # hot inside, grey outside
    assert abs(truth[120, 160] - 200).max() <= 6 and truth[4, 4].max() < 120


def test_maps_of_a_class_share_their_scale(tmp_path):
    weak, strong = np.full((32, 32), 0.1), np.full((32, 32), 1.0)
    grey = np.full((32, 32, 3), 128, np.uint8)
    shown = [example(image=grey, anomaly_map=scores, mask=scores > 2) for scores in (weak, strong, weak)]
    heat = [picture(image["src"]) for image in Page(written(tmp_path / "r.html", examples=shown)).images[2::4]]
    assert heat[1].mean() > heat[0].mean() + 60
    assert (heat[0] == heat[2]).all()


def test_the_worst_mistakes_come_first_then_typical_cases():
    # score, anomalous, judged anomalous
    nuts = [
        (0.40, True, False),
        (0.10, True, False),
        (0.30, True, False),
        (0.70, False, True),
        (0.90, False, True),
        (5.0, True, True),
        (2.0, True, True),
        (3.0, True, True),
        (0.00, False, False),
        (0.20, False, False),
        (0.21, False, False),
    ]
    scores, truth, verdicts = zip(*nuts, strict=True)
    assert pick_examples(["nut"] * 11, scores, truth, verdicts, 2) == [1, 2, 4, 3, 7, 6, 9, 10]
    assert pick_examples(["nut"] * 11, scores, truth, verdicts, 0) == []
    by_class = pick_examples(["nut"] * 8 + ["bolt"] * 3, scores, np.array(truth), np.array(verdicts), 1)
    assert by_class == [9, 1, 4, 7]


def test_a_heatmap_is_grey_where_nothing_is_and_bright_at_the_peak():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    scores = np.zeros((20, 30), np.float32)
    scores[5, 5], scores[6, 6], scores[7, 7] = 0.5, 1.0, 80.0
    heat = heatmap(image, scores, 1.0)
    assert heat.shape == image.shape and heat.dtype == np.uint8
    assert (np.ptp(heat[10:], axis=-1) == 0).all()
    assert (heat[10:] <= 128).all()
    assert heat[6, 6].astype(int).sum() > heat[5, 5].astype(int).sum() + 100
    assert (heat[6, 6] == heat[7, 7]).all()
    assert (heatmap(image, scores * -1, 0.0) == heatmap(image, scores * 0, 1.0)).all()


def test_a_map_smaller_than_its_photograph_is_scaled_to_it():
    scores = np.zeros((8, 8))
    scores[4:, :4] = 1.0  # bottom left
    heat = heatmap(np.zeros((64, 96, 3), np.uint8), scores, 1.0).astype(int)
    assert heat.shape == (64, 96, 3)
    assert heat[60, 10].sum() > 500
    assert heat[10, 10].sum() == heat[60, 90].sum() == heat[10, 90].sum() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_heatmap_of_what_is_not_finite_is_refused(bad):
    with pytest.raises(InputError, match="NaN or infinity"):
        heatmap(np.zeros((4, 4, 3), np.uint8), np.full((4, 4), bad), 1.0)
