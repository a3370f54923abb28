"""A bank of normal patches: distances beside an independent oracle, saving, and a detector that has both evidences."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import ndimage
from sklearn.neighbors import NearestNeighbors

from tests.backbones import GIVEN
from tests.tiny import named, striped, tiny_pipeline, tiny_retrieving_detector
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import seal, write_json
from vlmdiff.core.params import Detection, Latents, Retrieval
from vlmdiff.detection.anomaly_map import fuse
from vlmdiff.detection.cells import SEARCHED
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.retrieval import COMPONENTS, NEIGHBOURS, NormalPatches, PatchBank, PatchBanks, unit_length
from vlmdiff.model.feature_space import FeatureSpace

CHANNELS = (5, 3)


def features(images, seed=0, size=6):
    raw = torch.randn(images, sum(CHANNELS), size, size, generator=torch.Generator().manual_seed(seed))
    return unit_length(raw, CHANNELS)


def rows(x):
    return x.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()


def fitted(batches, products, params, seed):
    collected = NormalPatches(products, params, seed)
    for batch in batches:
        collected.add(batch)
    return PatchBank.fit(collected)


def judged(bank, x, without=None, product="thing"):
    return bank(x, [product] * len(x), without)


def test_each_layer_has_the_same_share_of_a_unit_vector():
    x = features(3)
    for layer in x.split(CHANNELS, dim=1):
        torch.testing.assert_close(layer.square().sum(dim=1), torch.full((3, 6, 6), 0.5))


def test_evidence_is_the_distance_less_a_share_of_the_usual_distance_there():
    normal, test = features(4), features(2, seed=1)
    bank = fitted([normal[:3], normal[3:]], ["thing"] * 4, Retrieval(patches=4 * 36, expected=0.5, level=0), seed=0)
    patches, image = bank.cells.patches.double().numpy(), np.repeat(np.arange(4), 36)
    usual = np.array([1 - (patches[image != own] @ patch).max() for patch, own in zip(patches, image, strict=True)])
    near = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute", metric=lambda a, b: 1 - a @ b).fit(patches)
    distance, index = near.kneighbors(rows(test) @ bank.basis.double().numpy())
    expected = distance[:, 0] - 0.5 * usual[index].mean(axis=1)
    off = np.abs(judged(bank, test).flatten().numpy() - expected)
    # Which ten are nearest may differ by a rounding of bfloat16; how near they are does not.
    assert np.quantile(off, 0.9) < 1e-6 and off.max() < 2e-2


@given(st.floats(0, 1), st.integers(1, 3), st.integers(1, 7))
def test_an_image_loses_a_share_of_its_own_level_and_not_of_that_of_others(share, images, size):
    bank = fitted([features(3, seed=2)], ["thing"] * 3, Retrieval(patches=60, level=0), seed=0)
    test = features(images, seed=1, size=size)
    before = judged(bank, test).numpy()
    bank.params = Retrieval(patches=60, level=share)
    level = np.quantile(before, 0.5, axis=(1, 2), method="lower", keepdims=True)
    np.testing.assert_allclose(judged(bank, test).numpy(), before - share * level, atol=1e-5)


def test_a_detector_of_an_earlier_release_judges_as_it_did(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "detector.json").read_text())
    assert facts["detection"]["retrieval"].pop("level") == 0.5
    write_json(tmp_path / "detector.json", facts)
    seal(tmp_path)
    images = striped(2, 4)
    found = Detector.from_pretrained(tmp_path, "cpu").distances(images)
    levels = np.quantile(found, 0.5, axis=(1, 2), method="lower", keepdims=True)
    np.testing.assert_allclose(found - 0.5 * levels, detector.distances(images), atol=1e-5)


def test_a_bank_has_as_many_patches_of_each_image_as_asked_for():
    bank = fitted([features(5)], ["thing"] * 5, Retrieval(patches=52, expected=0.5, level=0), seed=0)
    assert len(bank.cells.patches) == 5 * 11
    again = fitted(
        [features(5)[:2], features(5)[2:]], ["thing"] * 5, Retrieval(patches=52, expected=0.5, level=0), seed=0
    )
    assert torch.equal(bank.cells.patches, again.cells.patches) and torch.equal(bank.usual, again.usual)


def test_copies_of_one_patch_are_as_usual_as_can_be_and_an_opposite_one_is_not():
    x = features(1, size=1).expand(2, -1, 6, 6)
    bank = fitted([x], ["thing"] * 2, Retrieval(patches=72, expected=1.0, level=0), seed=0)
    assert judged(bank, x).abs().max() < 1e-2
    torch.testing.assert_close(judged(bank, -x), torch.full((2, 6, 6), 2.0), atol=2e-2, rtol=0)


def test_an_image_is_judged_without_its_own_patches():
    x = features(4)
    bank = fitted([x], ["thing"] * 4, Retrieval(patches=4 * 36, expected=0.0, level=0), seed=0)
    others = fitted([x[1:]], ["thing"] * 3, Retrieval(patches=3 * 36, expected=0.0, level=0), seed=0)
    torch.testing.assert_close(judged(bank, x[:1], [0]), judged(others, x[:1]), atol=1e-2, rtol=0)
    assert judged(bank, x[:1]).abs().max() < 1e-2 < judged(bank, x[:1], [0]).min()


def test_calibration_by_images_of_the_bank_is_that_by_new_ones(detector):
    images = striped(20, seed=1)
    fresh = detector.calibration.threshold
    again = Detector(detector.pipeline, detector.params)
    again.learn([*images, *striped(8, seed=0)], named(28))
    again.calibrate(images, weigh=lambda evidence: 0.7, in_bank=True)
    blind = Detector(detector.pipeline, detector.params, bank=again.bank)
    blind.calibrate(images, weigh=lambda evidence: 0.7)
    kept, lost = (one.calibration.retrieval.median for one in (again, blind))
    assert kept > lost and again.calibration.threshold == pytest.approx(fresh, rel=0.5)


@pytest.mark.parametrize("whole", [True, False])
def test_what_the_bank_knows_of_an_image_is_not_computed_again(whole, detector, monkeypatch):
    images = striped(12, seed=1)
    # 64 patches of each image are all that it has.
    wanted = Retrieval(patches=12 * (64 if whole else 8), more_sizes=(32,))
    ours = Detector(detector.pipeline, detector.params.model_copy(update={"retrieval": wanted}))
    ours.learn(images, named(12))
    asked, features = [], FeatureSpace.features
    monkeypatch.setattr(FeatureSpace, "features", lambda *given: asked.append(given[2:]) or features(*given))
    scores = ours.calibrate(images, in_bank=True)
    assert ((32,) in asked) != whole
    # Without that knowledge, it computes the same scores.
    ours.bank.known.clear()
    np.testing.assert_allclose(ours.calibrate(images, in_bank=True), scores, atol=0.02)


def test_images_that_are_not_those_of_the_bank_do_not_calibrate_as_if_they_were(detector, tmp_path):
    images = striped(12, seed=1)
    ours = Detector(detector.pipeline, detector.params)
    ours.learn(images, named(12))
    with pytest.raises(InputError, match="image 0 is not the image that `learn` saw as number 0"):
        ours.calibrate(images[::-1], in_bank=True)
    ours.calibrate(images[:11], in_bank=True)
    # The file of a bank does not say which image a patch is from.
    ours.save_pretrained(tmp_path)
    again = Detector.from_pretrained(tmp_path, "cpu")
    with pytest.raises(InputError, match="does not know which image a patch is from"):
        again.evidence(images, without=range(12))
    with pytest.raises(InputError, match="does not know which image a patch is from"):
        again.calibrate(images, in_bank=True)


def two_products(params):
    x, y = features(3), -features(3)
    # Their images come mixed, as those of a dataset do.
    mixed = torch.stack([x, y], dim=1).flatten(0, 1)
    return fitted([mixed[:4], mixed[4:]], ["this", "that"] * 3, params, seed=0), x, y


def test_an_image_is_compared_with_patches_of_its_product():
    params = Retrieval(patches=3 * 36, expected=0.5, level=0.5)
    bank, x, y = two_products(params)
    assert bank.counts == {"that": 108, "this": 108}
    test = features(2, seed=1)
    for product, normal in (("this", x), ("that", y)):
        alone = fitted([normal], [product] * 3, params, seed=0)
        torch.testing.assert_close(
            judged(bank, test, None, product), judged(alone, test, None, product), atol=1e-2, rtol=0
        )
    both = bank(test, ["this", "that"])
    for i, product in enumerate(("this", "that")):
        assert torch.equal(both[i], judged(bank, test[i : i + 1], None, product)[0])


def test_an_image_of_no_known_product_is_compared_with_all_patches():
    bank, x, y = two_products(Retrieval(patches=3 * 36, expected=0, level=0))
    for normal in (x, y):
        assert judged(bank, normal, None, "neither").abs().max() < 1e-2


def test_the_only_image_of_a_product_is_compared_with_all_others():
    x = features(3)
    bank = fitted([x], ["only", "other", "other"], Retrieval(patches=72, expected=0, level=0), seed=0)
    others = fitted([x[1:]], ["other"] * 2, Retrieval(patches=72, expected=0, level=0), seed=0)
    torch.testing.assert_close(
        judged(bank, x[:1], [0], "only"), judged(others, x[:1], None, "other"), atol=1e-2, rtol=0
    )
    assert bank.usual.max() < 2


@given(st.integers(1, 36), st.sampled_from([0.0, 0.5]))
def test_a_bank_knows_the_evidence_of_the_images_that_it_has_whole(each, level):
    x = features(5)
    params = Retrieval(patches=2 * each, expected=0.5, level=level)
    bank = fitted([x[:2], x[2:]], ["a", "b", "a", "b", "b"], params, seed=0)
    whole = {0, 2} if each == 36 else set()
    # Of a product with three images, two thirds of `each` are kept of each.
    assert set(bank.known) == whole
    for i in whole:
        torch.testing.assert_close(bank.known[i], judged(bank, x[i : i + 1], [i], "a")[0], atol=2e-2, rtol=0)


def test_a_saved_bank_keeps_its_products_and_one_of_an_earlier_release_searches_all(tmp_path):
    params = Retrieval(patches=3 * 36, expected=0.5, level=0)
    bank, _, _ = two_products(params)
    file = tmp_path / "bank.safetensors"
    bank.save(file)
    test, again = features(2, seed=1), PatchBank.load(file, params, sum(CHANNELS))
    assert torch.equal(judged(bank, test, None, "this"), judged(again, test, None, "this"))
    tensors = load_file(file)
    del tensors["centres"], tensors["sizes"]
    save_file(tensors, file)
    earlier = PatchBank.load(file, params, sum(CHANNELS))
    torch.testing.assert_close(judged(earlier, test, None, "this"), judged(bank, test, None, "neither"))
    save_file(tensors, file, metadata={"counts": json.dumps(bank.counts)})
    unsorted = PatchBank.load(file, params, sum(CHANNELS))
    for product in ("this", "that", "neither"):
        torch.testing.assert_close(judged(unsorted, test, None, product), judged(bank, test, None, product))


@pytest.mark.parametrize(
    "counts",
    [
        "{",
        '{"this": 0, "that": 216}',
        '{"this": 108}',
        "[108, 108]",
        '{"this": 100, "that": 116}',
        '{"this": 1' + 30 * "0" + "}",
    ],
)
def test_a_bank_whose_products_do_not_fit_is_refused(tmp_path, counts):
    file = tmp_path / "bank.safetensors"
    two_products(Retrieval(patches=3 * 36))[0].save(file)
    save_file(load_file(file), file, metadata={"counts": counts})
    with pytest.raises(InputError, match=r"bank\.safetensors is not a bank of patches"):
        PatchBank.load(file, Retrieval(), sum(CHANNELS))


def test_a_wide_patch_is_kept_as_its_principal_directions():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(20, 700, generator=generator)
    x = unit_length((torch.randn(4, 36, 20, generator=generator) @ few).transpose(1, 2).unflatten(2, (6, 6)), (700,))
    bank = fitted([x], ["thing"] * 4, Retrieval(patches=4 * 36, expected=0.0, level=0), seed=0)
    assert bank.cells.patches.shape == (144, COMPONENTS)
    whole = 1 - (rows(x[:1]) @ rows(x[1:]).T).max(axis=1)
    np.testing.assert_allclose(judged(bank, x[:1], [0]).flatten(), whole, atol=1e-2)


def clustered(images, seed):
    """Patches around 100 places, as those of an object in a fixed pose."""
    places = torch.randn(100, 40, generator=torch.Generator().manual_seed(7))
    raw = places + 0.5 * torch.randn(images, 100, 40, generator=torch.Generator().manual_seed(seed))
    return unit_length(raw.transpose(1, 2).unflatten(2, (10, 10)), (40,))


def test_in_a_large_bank_almost_all_nearest_patches_are_found(tmp_path):
    x, test = clustered(200, seed=0), clustered(20, seed=1)
    params = Retrieval(patches=10**6, expected=0, level=0)
    # Another product has cells before and after those of this one.
    other = -clustered(100, seed=2)
    bank = fitted([other, x, other], ["a"] * 100 + ["thing"] * 200 + ["z"] * 100, params, seed=0)
    bank.save(tmp_path / "bank.safetensors")
    again = PatchBank.load(tmp_path / "bank.safetensors", params, 40)
    assert len(bank.cells.sizes) > 4 * SEARCHED
    assert torch.equal(judged(again, test), judged(bank, test))
    basis = bank.basis.double().numpy()
    for asked, without, others in ((test, None, x), (x[:1], [100], x[1:])):
        nearest = 1 - (rows(asked) @ basis @ (rows(others) @ basis).T).max(axis=1)
        off = judged(bank, asked, without).flatten().numpy() - nearest
        # A patch that is missed makes the distance longer, never shorter.
        assert off.min() > -2e-3 and np.mean(off > 2e-3) < 0.02


def test_an_image_unlike_all_others_of_its_product_is_compared_with_them():
    varied = features(1, size=100)
    even = features(2, seed=1, size=1) + 0.02 * features(2, seed=2, size=100)
    x = torch.cat([varied, even / even.norm(dim=1, keepdim=True)])
    params = Retrieval(patches=10**6, expected=0, level=0)
    bank = fitted([x], ["thing"] * 3, params, seed=0)
    # Most cells have only its own patches, and these are searched first.
    own = [bool((part == 0).all()) for part in bank.image.split(bank.cells.sizes.tolist())]
    assert sum(own) > SEARCHED
    nearest = 1 - (rows(x[:1]) @ rows(x[1:]).T).max(axis=1)
    np.testing.assert_allclose(judged(bank, x[:1], [0]).flatten(), nearest, atol=1e-2)


@pytest.mark.parametrize("change", [(1, -1), (2**63 - 1, 2**63 - 1, 2), (0, 0)])
def test_cells_of_no_possible_size_are_refused(tmp_path, change):
    file = tmp_path / "bank.safetensors"
    fitted([features(2)], ["thing"] * 2, Retrieval(patches=10), seed=0).save(file)
    tensors = load_file(file)
    # Sums that fit, as far as whole numbers of 64 bits tell.
    sizes = torch.cat([tensors["sizes"] + change[0], torch.tensor(change[1:])])
    tensors |= {"sizes": sizes, "centres": tensors["centres"].repeat(len(sizes), 1)}
    save_file(tensors, file)
    with pytest.raises(InputError, match="its cells do not fit its patches"):
        PatchBank.load(file, Retrieval(), sum(CHANNELS))


def test_one_image_makes_no_bank():
    with pytest.raises(InputError, match="at least two"):
        fitted([features(1)], ["thing"] * 1, Retrieval(patches=10, expected=0.5, level=0), seed=0)


def test_the_evidence_of_several_sizes_is_their_mean_on_the_finest_grid():
    params = Retrieval(patches=10**6)
    small, large = features(4, size=3), features(4, seed=5, size=6)
    banks = PatchBanks([fitted([x], ["thing"] * 4, params, seed=0) for x in (small, large)])
    for at in (slice(0, 1), slice(1, 4)):
        one, other = (judged(bank, x[at]).numpy() for bank, x in zip(banks.banks, (small, large), strict=True))
        # A pixel of three becomes two; bilinear, with the outer edges aligned.
        finer = ndimage.zoom(one, (1, 2, 2), order=1, mode="nearest", grid_mode=True)
        found = banks([small[at], large[at]], ["thing"] * len(one)).numpy()
        np.testing.assert_allclose(found, (finer + other) / 2, atol=1e-5)
    assert set(banks.known) == {0, 1, 2, 3} and banks.known[2].shape == (6, 6)
    alone = banks([small[2:3], large[2:3]], ["thing"], [2])[0]
    torch.testing.assert_close(banks.known[2], alone, atol=2e-2, rtol=0)


def test_a_detector_of_several_sizes_has_a_bank_for_each(detector, tmp_path):
    wanted = Retrieval(patches=10**6, more_sizes=(GIVEN // 2,))
    several = Detector(detector.pipeline, detector.params.model_copy(update={"retrieval": wanted}))
    several.learn(striped(8, seed=0), named(8))
    several.calibrate(striped(20, seed=1), weigh=lambda evidence: 1.0)
    several.save_pretrained(tmp_path)
    sizes = [len(load_file(tmp_path / name)["patches"]) for name in ("bank.safetensors", "bank_1.safetensors")]
    assert sizes[0] == 8 * 8 * 8 and sizes[1] == 8 * 4 * 4
    images = striped(2, 4)
    again = Detector.from_pretrained(tmp_path, "cpu")
    np.testing.assert_allclose(again.distances(images), several.distances(images), atol=1e-5)
    assert again.detect(images)[0].score == pytest.approx(several.detect(images)[0].score, abs=1e-5)
    (tmp_path / "bank_1.safetensors").unlink()
    seal(tmp_path)
    with pytest.raises(InputError, match=r"bank_1\.safetensors is not a bank of patches"):
        Detector.from_pretrained(tmp_path, "cpu")


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_a_bank_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "bank.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"bank\.safetensors is not a bank of patches"):
        PatchBank.load(tmp_path / "bank.safetensors", Retrieval(), 6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("basis", lambda basis: basis[:-1]),
        ("basis", lambda basis: basis[:, :-1]),
        ("basis", lambda basis: basis[None]),
        ("patches", lambda patches: patches[:-1]),
        ("patches", lambda patches: patches[:0]),
        ("patches", lambda patches: patches * torch.nan),
        ("usual", lambda usual: usual[:, None]),
        ("usual", lambda usual: usual / 0),
        ("usual", lambda usual: usual.long()),
        ("centres", lambda centres: centres[:, 1:]),
        ("centres", lambda centres: centres[:0]),
        ("centres", lambda centres: centres * torch.inf),
        ("sizes", lambda sizes: sizes - 1),
        ("sizes", lambda sizes: sizes.float()),
        ("sizes", lambda sizes: sizes[0]),
        ("sizes", lambda sizes: sizes[:, None]),
        ("sizes", lambda sizes: sizes[:0]),
    ],
)
def test_a_bank_whose_tensors_do_not_fit_is_refused(tmp_path, name, change):
    file = tmp_path / "bank.safetensors"
    fitted([features(2)], ["thing"] * 2, Retrieval(patches=10, expected=0.5, level=0), seed=0).save(file)
    PatchBank.load(file, Retrieval(), sum(CHANNELS))
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, file)
    with pytest.raises(InputError, match=r"bank\.safetensors is not a bank of patches"):
        PatchBank.load(file, Retrieval(), sum(CHANNELS))


@pytest.fixture(scope="module")
def detector(saved, tmp_path_factory):
    return tiny_retrieving_detector(saved("vit"), tmp_path_factory.mktemp("state"))


def test_both_kinds_of_evidence_make_the_map(detector):
    found = detector.detect(striped(3, seed=2))
    for one in found:
        assert one.evidence.shape == (2, GIVEN, GIVEN) and (one.evidence >= 0).all()
        raw = fuse(one.evidence[None], 0.7)[0]
        threshold = detector.calibration.map_threshold("")
        np.testing.assert_allclose(one.anomaly_map, raw / (raw + threshold), rtol=1e-5)


def test_an_image_of_the_bank_is_compared_with_the_others(detector):
    again = Detector(detector.pipeline, detector.params)
    images = striped(8, seed=0)
    images[5] = images[5].copy()
    images[5][16:32, 16:32] = [250, 20, 20]
    again.learn(images, named(8))
    own, others = again.distances(images), again.distances(images, range(8))
    assert others.max(axis=(1, 2)).argmax() == 5 and own[5].max() < others[5].max()


def test_each_kind_is_scaled_by_the_tail_of_the_normal_images_that_calibrate(detector):
    evidence = detector.evidence(striped(20, seed=1))
    for maps in evidence.swapaxes(0, 1):
        median, high = np.quantile(maps, (0.5, 0.99))
        assert high - median == pytest.approx(1, rel=1e-4)


def test_a_patch_of_another_kind_is_what_retrieval_finds(detector):
    normal, spoiled = striped(1, seed=3)[0], striped(1, seed=3)[0].copy()
    spoiled[16:32, 16:32] = [250, 20, 20]
    clean, found = (one.evidence[1] for one in detector.detect([normal, spoiled]))
    inside, outside = found[18:30, 18:30].mean(), found[44:, 44:].mean()
    assert inside > 2 * outside and inside > 2 * clean[18:30, 18:30].mean()


def test_a_saved_detector_has_its_bank_and_judges_alike(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    again = Detector.from_pretrained(tmp_path, "cpu")
    for one, other in zip(detector.detect(striped(2, 4)), again.detect(striped(2, 4)), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-5)
        np.testing.assert_allclose(one.evidence, other.evidence, atol=1e-4)


def test_an_autoencoder_has_no_features_to_retrieve():
    detector = Detector(tiny_pipeline(), Detection(retrieval=Retrieval(), features=(Latents(kind="latents"),)))
    with pytest.raises(InputError, match=r"first_stage\.kind: backbone"):
        detector.learn([], [])


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_for_a_bank_are_named(detector, count):
    with pytest.raises(InputError, match="at least two"):
        Detector(detector.pipeline, detector.params).learn(striped(count, seed=0), named(count))


def test_photographs_judged_at_the_same_time_are_judged_as_one_after_the_other(detector):
    groups = [striped(3, seed) for seed in range(8)]
    alone = [detector.distances(images) for images in groups]
    with ThreadPoolExecutor(8) as threads:
        for one, other in zip(alone, threads.map(detector.distances, groups), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_detector_of_an_earlier_release_that_retrieval_carries_judges_by_its_map(detector, tmp_path):
    normal, images = striped(10, seed=1), striped(20, seed=4)
    params = detector.params.model_copy(update={"score_smoothing": None, "retrieval": Retrieval(weight=1.0)})
    by_map = Detector(detector.pipeline, params)
    by_map.learn(normal, named(10))
    by_map.calibrate(normal, in_bank=True, products=["thing"] * 10)
    by_map.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "detector.json").read_text())
    assert len(facts["calibration"]["products"]["thing"]["levels"]) == 1
    facts["detection"]["score_smoothing"] = 0.5
    write_json(tmp_path / "detector.json", facts)
    seal(tmp_path)
    earlier = Detector.from_pretrained(tmp_path, "cpu")
    found = [[one.score for one in each.detect(images)] for each in (earlier, by_map)]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_where_retrieval_is_all_the_evidence_the_more_unusual_of_two_looks_at_it_counts(detector, tmp_path):
    normal, images = striped(10, seed=1), striped(20, seed=4)

    def calibrated(**changed):
        params = detector.params.model_copy(update={"retrieval": Retrieval(weight=1.0)} | changed)
        found = Detector(detector.pipeline, params)
        found.learn(normal, named(10))
        found.calibrate(normal, in_bank=True, products=["thing"] * 10)
        return found

    looks = [{"score_smoothing": None, "smoothing": sigma} for sigma in (0.5, 1.0)]
    fine, coarse = (calibrated(**look).standardised(images, ["thing"] * 20) for look in looks)
    both = calibrated(score_smoothing=0.5, smoothing=1.0)
    np.testing.assert_allclose(both.standardised(images, ["thing"] * 20), np.maximum(fine, coarse), atol=1e-4)
    assert 0 < (fine > coarse).sum() < 20
    both.save_pretrained(tmp_path)
    again = Detector.from_pretrained(tmp_path, "cpu").detect(images)
    assert [one.score for one in again] == pytest.approx([one.score for one in both.detect(images)], abs=1e-5)


def test_where_retrieval_is_all_the_evidence_every_image_that_the_bank_has_whole_calibrates(detector):
    held_out, training = striped(10, seed=1), striped(30, seed=5)
    # 64 patches of each image are all that it has.
    whole = detector.params.model_copy(update={"retrieval": Retrieval(patches=40 * 64)})
    alone, both, few = (Detector(detector.pipeline, params) for params in (whole, whole, detector.params))
    for one, weight in ((alone, 1.0), (both, 0.9), (few, 1.0)):
        one.learn([*held_out, *training], named(40))
        scores = one.calibrate(
            held_out, weigh=lambda evidence, weight=weight: weight, in_bank=True, products=["thing"] * 10
        )
        assert scores.shape == (10,)
    assert [one.calibration.images for one in (alone, both, few)] == [40, 10, 10]
    # The map of retrieval at `score_smoothing` and at `smoothing`; the reconstruction has no say.
    assert [len(one.calibration.products["thing"].levels) for one in (alone, both)] == [2, 4]
    # A new image is as unusual as those that calibrate, each judged without its own patches.
    found = [one.score for one in alone.detect(striped(30, seed=6))]
    assert 0.3 < np.median([alone.calibration.odds(np.array(alone.calibration.normal), ["thing"] * 40)]) < 0.5
    assert 0.3 < np.median(found) < 0.5
