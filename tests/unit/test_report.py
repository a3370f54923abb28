"""The report as a file that a browser opens, the pictures in it, and the choice of photographs."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlmdiff.core.errors import InputError
from vlmdiff.core.files import write_json
from vlmdiff.core.params import Costs, Decision
from vlmdiff.detection.calibration import Calibration
from vlmdiff.detection.heatmap import heatmap
from vlmdiff.evaluation.bootstrap import Resampled
from vlmdiff.evaluation.decision import Decisions, clopper_pearson, summarise
from vlmdiff.evaluation.metrics import METRICS, Results, evaluate_classes
from vlmdiff.evaluation.plots import curves
from vlmdiff.evaluation.report import Example, compose, pick_examples, read_content, render, worst_mistakes
from vlmdiff.evaluation.verdict import Criterion, Override, Verdict

NOTHING = {"pro": [], "roc": [], "precision_recall": []}
NO_COSTS = Decision()
CALIBRATION = Calibration(1.0, [1.0], 1.0, 39, 0.05, 0.4)


class Page(HTMLParser):
    """A page's text, tags and their attributes; an unbalanced tag is an error."""

    void = ("meta", "img", "wbr", "br", "link")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.images, self.classes = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.classes.append(dict(attributes).get("class"))
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
        "kind": "A fair sample",
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
    return Resampled(
        {name: {metric: np.full(3, values[metric]) for metric in METRICS} for name, values in results.classes.items()}
    )


def scored(*rows) -> pd.DataFrame:
    frame = pd.DataFrame(rows or [("nut", True, 0.7)], columns=["class_name", "is_anomalous", "score"])
    return frame.assign(verdict=frame["score"] > 0.5, defect=["cut" if bad else None for bad in frame["is_anomalous"]])


def content(
    results=None,
    examples=(),
    rows=NOTHING,
    provenance=None,
    scores=None,
    calibration=CALIBRATION,
    worst=(),
    costs=NO_COSTS,
):
    results = results or small_results()[0]
    scores = scored() if scores is None else scores
    decision = summarise(Decisions.of(scores), costs, samples=10)
    found = drawn(results), examples, rows, scores, calibration, provenance or {}, decision, worst, costs
    return compose(results, *found)


def page(*arguments, **options) -> Page:
    return Page(render(content(*arguments, **options)))


def picture(url):
    kind, data = url.split(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_the_report_shows_results_curves_photographs_and_what_made_it():
    results, rows = small_results()
    examples = [
        example(0, verdict=False, kind="Missed", caption="A steel nut on felt."),
        example(1, class_name="bolt", defect="good", is_anomalous=False, kind="False alarms", path="bolt/good/7.png"),
    ]
    provenance = {"git revision": "0a1b2c3", "parameters": {"train": {"steps": 600, "channels": [64, 96]}}}
    shown = page(results, examples, rows, provenance)
    for metric, title in METRICS.items():
        assert title in shown.text
        assert f"{results.mean[metric]:.3f}" in shown.text
        assert all(f"{values[metric]:.3f}" in shown.text for values in results.classes.values())
    assert [shown.classes.count(f"line c{i}") for i in (0, 1, 2)] == [3, 3, 0]  # three curves, two classes
    assert len(shown.images) == 8
    for text in (
        "Missed",
        "False alarms",
        "A steel nut on felt.",
        "score 1.25",
        "0a1b2c3",
        "steps 600",
        "64, 96",
        "nut/test/cut/000.png",
        "bolt/good/7.png",
    ):
        assert text.replace(" ", "") in shown.text.replace(" ", "")
    assert "A fair sample" not in shown.text and "Compared with the champion" not in shown.text


def test_the_verdict_comes_first_with_every_criterion():
    criteria = [
        Criterion("mean AU-PRO", 0.9, "at least", 0.85, "it is high enough"),
        Criterion("latency in ms", 120.0, "at most", 100.0, "it is too slow"),
        Criterion("gain in mean AU-PRO", float("nan"), "more than", 0.0, "it is not defined"),
    ]
    verdict = Verdict(4, 3, True, True, criteria, Override("Ada", "it is urgent"))
    text = Page(render(content(), verdict)).text
    assert text.index(verdict.outcome[1:]) < text.index("Classes")
    assert text.index("it is too slow") < text.index("it is high enough")
    for said in ("at least 0.85", "0.9000", "at most 100", "120.0000", "not defined", "Ada", "it was judged again"):
        assert said in text
    assert "has not judged this model yet" in page().text and "has not judged this model yet" not in text


def test_a_champion_is_shown_beside_the_model():
    results, rows = small_results()
    better = Results({name: {m: v + 0.1 for m, v in row.items()} for name, row in results.classes.items()})
    sample, other = example(0), example(1, path="nut/elsewhere.png")
    champion = content(results, [example(0, score=9.5, verdict=False)], rows)
    ours = content(better, [sample, other], rows)
    shown = Page(render(ours, None, champion, drawn(better) - drawn(results)))
    beside = shown.text[shown.text.index("Compared with the champion") :]
    assert f"{better.mean['au_pro']:.3f} / {results.mean['au_pro']:.3f}" in beside
    assert "+0.100 to +0.100" in beside
    same = shown.text[shown.text.index("The same photographs") :]
    assert "champion: normal" in same and "champion: 9.5" in same
    assert "elsewhere" not in same[: same.index("Provenance")]


def test_thresholds_and_their_guarantee_are_counted():
    rows = [("nut", True, 0.45), ("nut", True, 0.9), ("bolt", False, 0.2), ("bolt", False, 0.6)]
    alarms = content(scores=scored(*rows))["alarms"]
    normal, best = alarms["rows"]
    assert (normal["found"], normal["false_alarms"], normal["f1"]) == ([1, 2], [1, 2], 0.5)
    assert (best["found"], best["false_alarms"], best["f1"]) == ([2, 2], [1, 2], 0.8)
    assert alarms["guarantee"] == pytest.approx(0.05)
    assert "at most 5.00 %" in page().text
    few = Calibration(1.0, [1.0], 1.0, 9, 0.05)
    assert "9 images are too few for a lower bound" in page(calibration=few).text
    assert "of the best F1" not in page(calibration=few).text


def test_verdicts_are_counted_together_by_class_kind_and_size():
    rows = [("nut", True, 0.45), ("nut", True, 0.9), ("nut", False, 0.1), ("bolt", False, 0.2), ("bolt", False, 0.6)]
    areas, found = [[0.004], [0.004, 0.2], [], [], []], [[False], [True, True], [], [], []]
    shown = page(scores=scored(*rows).assign(regions=areas, regions_found=found))
    text = shown.text
    assert "the model finds 1 of 2 (50 %) defective images and raises an alarm for 1 of 3 (33 %) normal ones" in text
    decisions = text[text.index("Decisions") : text.index("By kind of defect")]
    nut, bolt = decisions.index("nut"), decisions.index("bolt")
    assert "1 of 2 (50 %)" in decisions[nut:] and "1 of 2 (50 %)" in decisions[bolt:nut]
    assert "2 of 3 (67 %) {:.3f} – {:.3f}".format(*clopper_pearson(1.2, 1.8)) in decisions  # 3 regions of 2 images
    kinds = text[text.index("By kind of defect") : text.index("By size of defect")]
    assert "nut/cut 1 of 2 (50 %)" in kinds
    assert "0.3 to 1 % 0 of 1 (0 %)" in text and "10 % and more 1 of 1 (100 %)" in text
    assert "Expected cost" not in text and "The worst misses" not in text


def test_an_evaluation_of_an_earlier_release_has_a_report_without_the_decision():
    made = content()
    del made["decision"]
    shown = Page(render(made, None, made, drawn(small_results()[0]) - drawn(small_results()[0])))
    assert "Decisions" not in shown.text and "Classes" in shown.text


def test_the_cost_of_the_threshold_and_the_lowest_cost_are_said():
    rows = [("nut", True, 0.45), ("nut", True, 0.9), ("nut", False, 0.1), ("nut", False, 0.4)]
    text = page(scores=scored(*rows), costs=Decision(costs=Costs(miss=40, false_alarm=1), defect_rate=0.05)).text
    # Half of the defects is missed: 0.05 x 40 / 2.
    for said in (
        "A missed defect costs 40, a false alarm 1, and 5 % of images have a defect.",
        "At its threshold the model costs 1000 per 1,000 images; without a model, all misses would cost 2000.",
        "the threshold 0.400 would cost least: 0 per 1,000 images. That is for comparison only:",
        "The threshold in use cost least on defects drawn on held-out normal images",
    ):
        assert said in text


def test_the_worst_mistakes_are_shown_over_all_classes_worst_first():
    grey = np.full((300, 300, 3), 200, np.uint8)
    missed = [
        example(i, image=grey, score=score, verdict=False, kind="Missed", class_name=name)
        for i, (name, score) in enumerate([("nut", 0.3), ("bolt", 0.1), ("nut", 0.4), ("bolt", 0.2)])
    ]
    good = {"is_anomalous": False, "defect": "good", "mask": np.zeros((24, 24), bool)}
    alarm = example(9, score=0.7, kind="False alarms", image=grey, **good)
    worst = worst_mistakes([*missed, alarm, example(5)], count=3)
    assert [one.score for one in worst] == [0.1, 0.2, 0.3, 0.7]
    # What was kept of the classes so far loses nothing to the next class.
    again = worst_mistakes([*worst_mistakes([*missed[:2], alarm], 3), *missed[2:]], 3)
    assert [one.score for one in again] == [one.score for one in worst]
    shown = page(worst=worst)
    text = shown.text[shown.text.index("The worst misses") :]
    assert text.index("score 0.100") < text.index("score 0.200") < text.index("score 0.300")
    assert text.index("score 0.300") < text.index("The worst false alarms") < text.index("score 0.700")
    pictures = [picture(image["src"]) for image in shown.images]
    assert len(pictures) == 8 and max(pictures[0].shape) == 160
    # Of a missed defect, the photograph is dark but for the defect. Of a false alarm, it is as it was taken.
    assert np.median(pictures[0]) < 120 and abs(pictures[6] - 200).max() <= 3
    assert len(np.unique(pictures[7])) > 100  # its map


def test_the_report_needs_no_network_and_no_script():
    results, rows = small_results()
    html = render(content(results, [example()], rows, worst=[example(kind="Missed")]))
    shown = Page(html)
    assert not {"script", "link", "iframe", "object", "base"} & set(shown.tags)
    assert all(image["src"].startswith("data:") for image in shown.images)
    without_pictures = re.sub(r"data:image/webp;base64,[\w+/=]+", "", html)
    assert not re.search(r"https?:|url\((?!#)|@import|//\w", without_pictures)
    assert "default-src 'none'" in html


def test_markup_in_names_and_captions_is_shown_not_obeyed():
    hostile = "<script>alert(1)</script>\"'&$x^2$"
    results = Results({hostile: dict.fromkeys(METRICS, 0.5)})
    shown = example(class_name=hostile, caption=hostile, path=hostile, defect=hostile)
    rows = NOTHING | {"roc": [{"class_name": hostile, "fpr": x, "tpr": x} for x in (0.0, 1.0)]}
    found = page(results, [shown], rows, {hostile: {hostile: [hostile]}}, scored((hostile, True, 0.5)))
    assert "script" not in found.tags
    assert found.text.count("alert(1)") >= 9


def test_undefined_metrics_empty_curves_and_no_photographs_make_a_report():
    results = Results({"nut": dict.fromkeys(METRICS, float("nan"))})
    shown = page(results)
    assert "nan" not in shown.text.lower().split()
    assert "The mean leaves the class out" in shown.text
    assert shown.text.count("not defined for any class") == 4
    assert page(Results({})).images == []


def test_the_same_input_gives_the_same_bytes():
    results, rows = small_results()
    first, second = (render(content(results, [example(0), example(1)], rows, {"x": 1})) for _ in range(2))
    assert first == second


def test_the_content_is_read_as_it_was_written(tmp_path):
    results, rows = small_results()
    made = content(results, [example(0)], rows, {"x": [1]})
    write_json(tmp_path / "report.json", made)
    assert render(read_content(tmp_path)) == render(made)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match="is not valid"):
        read_content(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_content(tmp_path / "nowhere")


def test_many_large_photographs_beside_a_champions_stay_below_8_megabytes():
    # Noise: nothing compresses worse.
    worst = [example(seed, side=400, kind=kind) for seed in range(8) for kind in ("Missed", "False alarms")]
    made = content(examples=[example(seed, side=400) for seed in range(28)], worst=worst_mistakes(worst))
    html = render(made, None, made, drawn(small_results()[0]) - drawn(small_results()[0]))
    assert 2e6 < len(html.encode()) < 8e6
    sides = [max(picture(image["src"]).shape) for image in Page(html).images]
    assert len(set(sides[:32])) == 1 and 64 < sides[0] <= 160
    assert len(set(sides[32:40])) == 1 and 160 < sides[32] < 320


def test_pictures_are_photograph_reconstruction_map_and_truth():
    image, reconstruction = np.full((480, 640, 3), 200, np.uint8), np.full((64, 64, 3), 100, np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    shown = example(image=image, reconstruction=reconstruction, mask=mask, anomaly_map=mask.astype(float))
    images = page(examples=[shown]).images
    assert [image["alt"] for image in images] == ["photograph", "reconstruction", "anomaly map", "truth"]
    photograph, copy, heat, truth = (picture(image["src"]) for image in images)
    assert abs(photograph - 200).max() <= 3 and abs(copy - 100).max() <= 3
    assert photograph.shape == heat.shape == truth.shape == (240, 320, 3) and copy.shape == (64, 64, 3)
    assert heat[120, 160, 0] > heat[120, 160, 2] + 50 and np.ptp(heat[4, 4]) <= 6  # hot inside, grey outside
    assert abs(truth[120, 160] - 200).max() <= 6 and truth[4, 4].max() < 120


def test_maps_of_a_class_share_their_scale():
    weak, strong = np.full((32, 32), 0.1), np.full((32, 32), 1.0)
    grey = np.full((32, 32, 3), 128, np.uint8)
    shown = [example(image=grey, anomaly_map=scores, mask=scores > 2) for scores in (weak, strong, weak)]
    heat = [picture(image["src"]) for image in page(examples=shown).images[2::4]]
    assert heat[1].mean() > heat[0].mean() + 60
    assert (heat[0] == heat[2]).all()


def test_the_worst_mistakes_come_first_then_a_sample_that_no_score_chose():
    # id, score, anomalous, judged anomalous
    nuts = [
        ("k", 0.40, True, False),
        ("j", 0.10, True, False),
        ("i", 0.30, True, False),
        ("h", 0.70, False, True),
        ("g", 0.90, False, True),
        ("f", 5.0, True, True),
        ("e", 2.0, True, True),
        ("d", 0.00, False, False),
        ("c", 0.20, False, False),
    ]
    ids, scores, truth, verdicts = zip(*nuts, strict=True)
    picked = pick_examples(ids, scores, truth, verdicts, 2)
    assert [i for kind, i in picked if kind == "Missed"] == [1, 2]
    assert [i for kind, i in picked if kind == "False alarms"] == [4, 3]
    assert [i for kind, i in picked if kind == "A fair sample"] == [6, 5, 8, 7]
    assert pick_examples(ids, scores, truth, verdicts, 0) == []
    others = pick_examples(ids, scores[::-1], truth, np.array(verdicts)[::-1], 2)
    assert [i for kind, i in others if kind == "A fair sample"] == [6, 5, 8, 7]


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


def test_the_report_says_what_carried_the_result():
    shown = content(examples=[example()])
    assert "What carried the result" not in Page(render(shown)).text
    names = list(shown["results"]["per_class"])
    row = dict.fromkeys(METRICS, 0.25)
    alone = {
        kind: {"mean": row | {"au_pro": value}, "per_class": dict.fromkeys(names, row)}
        for kind, value in {"reconstruction": 0.111, "retrieval": 0.222}.items()
    }
    tried = [{"weight": weight, "au_pro": 0.5 + weight / 10, "image_auroc": None} for weight in (0.0, 0.5, 1.0)]
    page = Page(render(shown | {"evidence": {"weight": 0.7, "alone": alone, "tried": tried}}))
    assert "An anomaly map is 30 % reconstruction and 70 % retrieval." in page.text
    for text in ("reconstruction alone", "retrieval alone", "together", "0.111", "0.222", "50 %", "0.550"):
        assert text in page.text
