"""The data contract: what must hold of a dataset before anything is trained on it, judged by Great Expectations."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import great_expectations as gx
import great_expectations.expectations as gxe
import imagehash
import numpy as np
import pandas as pd
from great_expectations.core.run_identifier import RunIdentifier

from vlmdiff.core.console import say, track
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_folder, write_json
from vlmdiff.core.params import Prepare, Validate
from vlmdiff.data.docs import VIEW
from vlmdiff.data.images import decode, read_image, resolve
from vlmdiff.data.layouts import LABEL_MAPS, SPLITS

NAMED_FILES = 10


@dataclass(frozen=True)
class Rule:
    """An expectation of a table's column.

    what: a sentence that holds where the rule does; remedy: what to do where it does not. An error stops the line, a
    warning is only told.
    """

    name: str
    what: str
    remedy: str
    expectation: type[gxe.Expectation]
    settings: dict
    severity: Literal["error", "warning"] = "error"

    def build(self) -> gxe.Expectation:
        severity = "critical" if self.severity == "error" else "warning"
        return self.expectation(**self.settings, severity=severity, description=self.what, meta={"rule": self.name})


@dataclass(frozen=True)
class Finding:
    """A rule's result: how many rows break it, and the first ten of them by path."""

    rule: str
    severity: Literal["error", "warning"]
    passed: bool
    what: str
    remedy: str
    count: int
    files: list[str]

    def __str__(self) -> str:
        names = ", ".join(self.files) + (" …" if self.count > len(self.files) else "")
        return f"{self.rule} ({self.what}) is broken by {self.count}: {names}; {self.remedy}"


@dataclass(frozen=True)
class Verdict:
    """All findings of a contract; it holds where no error was found. `docs` is the page to open."""

    findings: list[Finding]
    docs: Path

    @property
    def passed(self) -> bool:
        return not self.broken("error")

    def broken(self, severity: str) -> list[Finding]:
        """The findings of a severity that did not pass."""
        return [finding for finding in self.findings if not finding.passed and finding.severity == severity]

    def raise_if_failed(self) -> None:
        """Say the warnings; raise InputError with each broken rule, its first files and how many there are."""
        for finding in self.broken("warning"):
            say(f"warning: {finding}")
        if errors := self.broken("error"):
            lines = "".join(f"\n  {finding}" for finding in errors)
            raise InputError(f"{len(errors)} rule(s) of the contract are broken; {self.docs} shows them:{lines}")


def check(name: str, tables: dict[str, tuple[pd.DataFrame, Sequence[Rule]]], out: Path) -> Verdict:
    """Judge each table by its rules; rows are named by their column `path`.

    The folder `out` gets `validation.json` for machines and `docs/index.html`, Great Expectations' Data Docs.
    """
    with atomic_folder(out) as temporary:
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False}
        for site in list(context.variables.data_docs_sites):
            context.delete_data_docs_site(site)
        store = {
            "class_name": "TupleFilesystemStoreBackend",
            "base_directory": str((temporary / "docs").resolve()),
        }
        site = {
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", "view": VIEW},
            "site_section_builders": {section: {"view": VIEW} for section in ("expectations", "validations")},
            "store_backend": store,
        }
        context.add_data_docs_site(site_name=name, site_config=site)
        source = context.data_sources.add_pandas(name)
        findings = []
        for title, (table, rules) in tables.items():
            batches = source.add_dataframe_asset(title).add_batch_definition_whole_dataframe("all")
            suite = context.suites.add(gx.ExpectationSuite(title, [rule.build() for rule in rules]))
            run = context.validation_definitions.add(gx.ValidationDefinition(data=batches, suite=suite, name=title))
            checkpoint = gx.Checkpoint(
                name=title,
                validation_definitions=[run],
                actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=[name])],
                result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["path"]},
            )
            named = RunIdentifier(run_name=name)
            outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": table}, run_id=named)
            (judged,) = outcome.run_results.values()
            results = {result.expectation_config.meta["rule"]: result for result in judged.results}
            findings += [_finding(rule, results[rule.name]) for rule in rules]
        # Fonts and pictures of the pages that VIEW takes the place of.
        shutil.rmtree(temporary / "docs/static")
        verdict = Verdict(findings, out / "docs/index.html")
        rows = [asdict(finding) for finding in findings]
        write_json(temporary / "validation.json", {"passed": verdict.passed, "findings": rows})
    return verdict


def _finding(rule: Rule, result: gx.core.ExpectationValidationResult) -> Finding:
    if result.exception_info.get("raised_exception"):
        raise RuntimeError(f"the rule {rule.name!r} could not be judged: {result.exception_info['exception_message']}")
    files = sorted(row["path"] for row in result.result.get("unexpected_index_list") or ())
    return Finding(
        rule.name,
        rule.severity,
        bool(result.success),
        rule.what,
        rule.remedy,
        len(files),
        files[:NAMED_FILES],
    )


def validate(frame: pd.DataFrame, data: Prepare, params: Validate, out: Path) -> Verdict:
    """Judge a manifest, its images and masks; reports go into the folder `out`."""
    image_root, max_pixels = data.image_root, data.max_pixels
    table = frame.join(_look_at_masks(frame, image_root, max_pixels))
    readable = frame["problem"].isna()
    learned = frame["split"].isin(["train", "validation"])
    table["mode"] = frame["mode"].where(readable)
    table["shorter_side"] = frame[["width", "height"]].min(axis=1).where(readable)
    table["anomalous_to_learn"] = frame["is_anomalous"].where(learned).astype(object)
    table["also_in_test"] = _same(frame, learned)
    table["near_duplicate"] = _near_duplicates(frame, image_root, params.near_duplicate_bits, max_pixels)
    images = table.astype(object).where(table.notna(), None)
    rules = _image_rules(params, data.layout in LABEL_MAPS)
    return check("dataset", {"images": (images, rules), "classes": _classes(frame, params)}, out)


def _image_rules(params: Validate, label_maps: bool) -> list[Rule]:
    no_mask = "draw it, or set validate.masks: optional and have the gate judge a metric of whole images"

    def none(name: str, column: str, what: str, remedy: str, severity: Literal["error", "warning"] = "error") -> Rule:
        return Rule(name, what, remedy, gxe.ExpectColumnValuesToBeNull, {"column": column}, severity)

    def one_of(name: str, column: str, values: Iterable, what: str, remedy: str) -> Rule:
        settings = {"column": column, "value_set": list(values)}
        return Rule(name, what, remedy, gxe.ExpectColumnValuesToBeInSet, settings)

    def unique(name: str, column: str, what: str, remedy: str) -> Rule:
        return Rule(name, what, remedy, gxe.ExpectColumnValuesToBeUnique, {"column": column})

    rules = [
        none("readable", "problem", "every image can be decoded", "restore the file or take it out"),
        one_of(
            "mode",
            "mode",
            params.modes,
            f"every image has one of the modes {', '.join(params.modes)}",
            "convert it, or add its mode to validate.modes",
        ),
        Rule(
            "size",
            f"every image has at least {params.min_side} pixels a side",
            "take it out, or lower validate.min_side",
            gxe.ExpectColumnValuesToBeBetween,
            {"column": "shorter_side", "min_value": params.min_side},
        ),
        unique("unique_path", "path", "a path is listed once", "list it once"),
        unique("unique_image", "image_id", "an image is there once, by its bytes", "keep one of the copies"),
        one_of("split", "split", SPLITS, f"a split is one of {', '.join(SPLITS)}", "mend the layout"),
        one_of(
            "normal_training",
            "anomalous_to_learn",
            [False],
            "only normal images are trained on",
            "move the anomalous ones to the test images",
        ),
        none(
            "test_apart",
            "also_in_test",
            "no image is both for training and for testing",
            "keep it in one of them: a test on what was learned says nothing",
        ),
        none("mask_file", "mask_problem", "every mask can be decoded", "restore the file or take it out"),
        none("mask_size", "mask_of_other_size", "a mask has its image's size", "export it at the image's size"),
        none(
            "mask_empty",
            "mask_empty",
            "an anomalous image's mask marks something",
            "draw it, or call the image good",
        ),
        none(
            "mask_normal",
            "mask_of_normal",
            "a normal image has no marked mask",
            "remove the mask, or the image",
        ),
        none(
            "near_duplicate",
            "near_duplicate",
            "no test image looks like one that is trained on",
            "look at them: near-duplicates make a test too easy",
            "warning",
        ),
    ]
    if not label_maps:
        what = "a mask has two values, 0 and one more"
        rules.append(none("mask_binary", "mask_not_binary", what, "cut it at a threshold"))
    if params.masks == "required":
        rules.append(none("mask_exists", "mask_missing", "every anomalous image has a mask", no_mask))
    return rules


def _look_at_masks(frame: pd.DataFrame, root: Path, max_pixels: int) -> pd.DataFrame:
    """What is wrong with each row's mask, None where nothing is."""
    rows = []
    columns = list(frame[["mask_path", "is_anomalous", "width", "height", "problem"]].itertuples(index=False))
    for mask_path, is_anomalous, width, height, problem in track(columns, "look at masks", total=len(frame)):
        found: dict[str, str] = {}
        rows.append(found)
        if mask_path is None:
            if is_anomalous:
                found["mask_missing"] = "no mask"
            continue
        try:
            mask = decode(resolve(root, mask_path), max_pixels)
        except InputError as error:
            found["mask_problem"] = str(error)
            continue
        if problem is None and mask.size != (width, height):
            found["mask_of_other_size"] = f"{mask.width} x {mask.height}, its image {width} x {height}"
        values = np.unique(np.asarray(mask.convert("L")))
        if len(values[values > 0]) > 1:
            found["mask_not_binary"] = f"{len(values)} values"
        marked = bool(values.max() > 0)
        if is_anomalous and not marked:
            found["mask_empty"] = mask_path
        if marked and not is_anomalous:
            found["mask_of_normal"] = mask_path
    names = [
        "mask_missing",
        "mask_problem",
        "mask_of_other_size",
        "mask_not_binary",
        "mask_empty",
        "mask_of_normal",
    ]
    return pd.DataFrame(rows, index=frame.index, columns=names, dtype=object)


def _same(frame: pd.DataFrame, learned: pd.Series) -> pd.Series:
    """For each image to learn, a test image of the same bytes."""
    tests = frame[frame["split"] == "test"].drop_duplicates("image_id").set_index("image_id")["path"]
    return frame["image_id"].map(tests).where(learned)


def _near_duplicates(frame: pd.DataFrame, root: Path, bits: int, max_pixels: int) -> pd.Series:
    """For each test image, an image to learn of its class whose perceptual hash is within `bits` of its 256."""
    readable = frame[frame["problem"].isna()]
    hashes = pd.Series(
        [
            imagehash.phash(read_image(resolve(root, path), max_pixels), hash_size=16).hash.ravel()
            for path in track(readable["path"], "look for near-duplicates", total=len(readable))
        ],
        index=readable.index,
        dtype=object,
    )
    near = pd.Series(None, index=frame.index, dtype=object)
    for _, rows in readable.groupby("class_name"):
        tests, others = rows[rows["split"] == "test"], rows[rows["split"] != "test"]
        if tests.empty or others.empty:
            continue
        known = np.stack(hashes[others.index].to_list())
        for index in tests.index:
            distances = (known != hashes[index]).sum(axis=1)
            if distances.min() <= bits:
                near[index] = others["path"].iloc[int(distances.argmin())]
    return near


def _classes(frame: pd.DataFrame, params: Validate) -> tuple[pd.DataFrame, list[Rule]]:
    """A row a class and split: how many images it lacks; and, a row a class, by how much the largest exceeds it."""
    required = params.min_images.model_dump()
    counts = frame.groupby(["class_name", "split"]).size()
    rows = [
        {
            "path": f"{name}/{split}",
            "lacks": max(0, required[split] - counts.get((name, split), 0)),
            "times": None,
        }
        for name in sorted(frame["class_name"].unique())
        for split in SPLITS
    ]
    training = frame[frame["split"] == "train"].groupby("class_name").size()
    rows += [{"path": name, "lacks": None, "times": training.max() / count} for name, count in training.items()]
    least = ", ".join(f"{count} {split}" for split, count in required.items())
    return pd.DataFrame(rows).astype(object), [
        Rule(
            "enough_images",
            f"every class has at least {least} images",
            "photograph more, leave the class out, or lower validate.min_images",
            gxe.ExpectColumnValuesToBeInSet,
            {"column": "lacks", "value_set": [0]},
        ),
        Rule(
            "balance",
            f"no class has more than {params.max_imbalance:g} times the training images of another",
            "the model will know these classes less well: photograph more of them",
            gxe.ExpectColumnValuesToBeBetween,
            {"column": "times", "max_value": params.max_imbalance},
            "warning",
        ),
    ]
