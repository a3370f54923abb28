"""The data contract: rules that a dataset must fulfil before training, checked by Great Expectations."""

import html
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import great_expectations as gx
import great_expectations.expectations as gxe
import imagehash
import numpy as np
import pandas as pd
from great_expectations.core.run_identifier import RunIdentifier
from great_expectations.expectations.metadata_types import FailureSeverity

from vlmdiff.core.console import say, track
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_folder, write_json
from vlmdiff.core.params import Prepare, Validate
from vlmdiff.data.docs import VIEW
from vlmdiff.data.images import decode, read_image, resolve
from vlmdiff.data.layouts import LABEL_MAPS
from vlmdiff.data.manifest import SPLITS, across_splits
from vlmdiff.data.rules import image_faults, mask_faults

NAMED_FILES = 10


@dataclass(frozen=True)
class Rule:
    """An expectation about a column of a table.

    what: the rule as a sentence; remedy: what to do if it is broken. A broken rule stops the stage if its severity is
    "error", and is only reported if it is "warning". pairs: the column has the path of the image that breaks the rule
    together with the row's.
    """

    name: str
    what: str
    remedy: str
    expectation: type[gxe.Expectation]
    settings: dict
    severity: Literal["error", "warning"] = "error"
    pairs: bool = False

    def build(self) -> gxe.Expectation:
        severity = FailureSeverity.CRITICAL if self.severity == "error" else FailureSeverity.WARNING
        return self.expectation(**self.settings, severity=severity, description=self.what, meta={"rule": self.name})


@dataclass(frozen=True)
class Finding:
    """The result of a rule: how many rows break it, and the first ten of them by path.

    others: for a rule about pairs of images, the other image of each file.
    """

    rule: str
    severity: Literal["error", "warning"]
    passed: bool
    what: str
    remedy: str
    count: int
    files: list[str]
    others: list[str]

    def __str__(self) -> str:
        pairs = [f"{file} = {other}" for file, other in zip(self.files, self.others, strict=False)]
        names = ", ".join(pairs or self.files) + (" …" if self.count > len(self.files) else "")
        return f"{self.rule} ({self.what}) is broken by {self.count}: {names}. {self.remedy}"


@dataclass(frozen=True)
class ContractResult:
    """All findings of a contract, which passes if no rule of severity "error" is broken; `docs` is the page to open."""

    findings: list[Finding]
    docs: Path

    @property
    def passed(self) -> bool:
        return not self.broken("error")

    def broken(self, severity: str) -> list[Finding]:
        """Return the findings of a severity that did not pass."""
        return [finding for finding in self.findings if not finding.passed and finding.severity == severity]

    def raise_if_failed(self) -> None:
        """Print the warnings; raise InputError with each broken rule, its first files and their number."""
        for finding in self.broken("warning"):
            say(f"warning: {finding}")
        if errors := self.broken("error"):
            lines = "".join(f"\n  {finding}" for finding in errors)
            raise InputError(f"{len(errors)} rule(s) of the contract are broken. {self.docs} shows all files:{lines}")


def check_tables(name: str, tables: dict[str, tuple[pd.DataFrame, Sequence[Rule]]], out: Path) -> ContractResult:
    """Check each table by its rules; findings name rows by their column `path`.

    Writes `validation.json` and `docs/index.html`, the Data Docs of Great Expectations, into the folder `out`.
    """
    with atomic_folder(out) as temporary:
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False}  # pyrefly: ignore[bad-argument-type]
        for site in list(context.variables.data_docs_sites or ()):
            context.delete_data_docs_site(site)
        store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str((temporary / "docs").resolve())}
        site: Any = {
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
            # Data Docs take text for HTML.
            escaped = table.map(lambda value: html.escape(value) if isinstance(value, str) else value)
            outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": escaped}, run_id=named)
            (judged,) = outcome.run_results.values()
            results = {c.meta["rule"]: found for found in judged.results if (c := found.expectation_config)}
            findings += [_finding(rule, results[rule.name]) for rule in rules]
        # Fonts and pictures of the pages that VIEW replaces.
        shutil.rmtree(temporary / "docs/static")
        result = ContractResult(findings, out / "docs/index.html")
        rows = [asdict(finding) for finding in findings]
        write_json(temporary / "validation.json", {"passed": result.passed, "findings": rows})
    return result


def _finding(rule: Rule, result: gx.core.ExpectationValidationResult) -> Finding:
    if result.exception_info.get("raised_exception"):
        raise RuntimeError(f"the rule {rule.name!r} could not be checked: {result.exception_info['exception_message']}")
    rows = [
        {column: html.unescape(value) if isinstance(value, str) else value for column, value in row.items()}
        for row in result.result.get("unexpected_index_list") or ()
    ]
    rows.sort(key=lambda row: row["path"])
    named = rows[:NAMED_FILES]
    others = [row[rule.settings["column"]] for row in named] if rule.pairs else []
    return Finding(
        rule.name,
        rule.severity,
        bool(result.success),
        rule.what,
        rule.remedy,
        len(rows),
        [row["path"] for row in named],
        others,
    )


def check_dataset(frame: pd.DataFrame, data: Prepare, params: Validate, model_size: int, out: Path) -> ContractResult:
    """Check a manifest, its images and masks, and write the reports into the folder `out`.

    model_size: the model's resolution in pixels, for which defects may be too small.
    """
    image_root, max_pixels = data.image_root, data.max_pixels
    table = frame.join(_look_at_masks(frame, image_root, max_pixels, model_size))
    readable = frame["problem"].isna()
    learned = frame["split"].isin(["train", "validation"])
    table["readable"] = frame["problem"]
    faults = [
        image_faults(mode, width, height, params) if problem is None else {}
        for mode, width, height, problem in frame[["mode", "width", "height", "problem"]].itertuples(index=False)
    ]
    for rule in ("mode", "size"):
        table[rule] = pd.Series([found.get(rule) for found in faults], index=frame.index, dtype=object)
    table["normal_training"] = frame["is_anomalous"].where(learned).astype(object)
    table["test_apart"] = across_splits(frame)
    # Prepare has left out the copies of the same label.
    first = frame.groupby(["image_id", "split"])["path"].transform("first")
    table["unique_image"] = first.where((first != frame["path"]) & readable)
    table["near_duplicate"] = _near_duplicates(frame, image_root, params.near_duplicate_bits, max_pixels)
    images = table.astype(object).where(table.notna(), None)
    rules = image_rules(params, data.layout in LABEL_MAPS)
    return check_tables("dataset", {"images": (images, rules), "classes": _classes(frame, params)}, out)


def image_rules(params: Validate, label_maps: bool) -> list[Rule]:
    """Return the rules for each image and its mask. label_maps: whether masks number regions."""
    no_mask = "Draw the mask, or set validate.masks: optional and a gate on image_auroc (gate.floors, gate.metric)"

    # The column of the same name says what is wrong, or has the value.
    def none(
        name: str, what: str, remedy: str, severity: Literal["error", "warning"] = "error", pairs: bool = False
    ) -> Rule:
        return Rule(name, what, remedy, gxe.ExpectColumnValuesToBeNull, {"column": name}, severity, pairs)

    def one_of(name: str, values: Iterable, what: str, remedy: str) -> Rule:
        settings = {"column": name, "value_set": list(values)}
        return Rule(name, what, remedy, gxe.ExpectColumnValuesToBeInSet, settings)

    rules = [
        none("readable", "every image can be decoded", "Replace or remove the file"),
        none(
            "mode",
            f"every image has one of the modes {', '.join(params.modes)}",
            "Convert the image, or add its mode to validate.modes",
        ),
        none(
            "size",
            f"every image has at least {params.min_side} pixels a side",
            "Remove the image, or lower validate.min_side",
        ),
        Rule(
            "unique_path",
            "each path is listed once",
            "Remove the other rows",
            gxe.ExpectColumnValuesToBeUnique,
            {"column": "path"},
        ),
        none(
            "unique_image",
            "no image is listed with two classes or labels",
            "They have the same bytes: keep the one that is right",
            pairs=True,
        ),
        one_of(
            "split", SPLITS, f"each split is one of {', '.join(SPLITS)}", "Correct the split in the dataset's table"
        ),
        one_of(
            "normal_training",
            [False],
            "all training and validation images are normal",
            "Move the anomalous images to the test split",
        ),
        none(
            "test_apart",
            "no image is in two splits",
            "A test on training images proves nothing. Remove one of each pair, or leave out one side by "
            "`vlmdiff init --data FOLDER --copies keep_test` (or keep_train)",
            pairs=True,
        ),
        none("mask_file", "every mask can be decoded", "Replace or remove the file"),
        none("mask_size", "each mask has the size of its image", "Export the mask at that size"),
        none("mask_empty", "the mask of an anomalous image is not empty", "Draw the mask, or list the image as good"),
        none("mask_normal", "no normal image has a mask that marks a defect", "Remove the mask or the image"),
        none(
            "mask_large",
            "no mask marks more than half of the image",
            "Look at it: is it inverted? Zero is where nothing is wrong",
            "warning",
        ),
        none(
            "mask_small",
            "every defect marks at least half of a pixel at the model's resolution",
            "Smaller ones count as a pixel and are hard to find: raise first_stage.image_size",
            "warning",
        ),
        none(
            "near_duplicate",
            "no test image is a near-duplicate of a training or validation image",
            "Look at them: near-duplicates make the test too easy",
            "warning",
            pairs=True,
        ),
    ]
    if not label_maps:
        what = "each mask has two values, 0 and one more"
        rules.append(none("mask_binary", what, "Threshold the mask"))
    if params.masks == "required":
        rules.append(none("mask_exists", "every anomalous image has a mask", no_mask))
    return rules


def _look_at_masks(frame: pd.DataFrame, root: Path, max_pixels: int, model_size: int) -> pd.DataFrame:
    """Return what is wrong with the mask of each row, None if nothing is."""
    rows = []
    columns = list(frame[["mask_path", "is_anomalous", "width", "height", "problem"]].itertuples(index=False))
    for mask_path, is_anomalous, width, height, problem in track(columns, "check masks", total=len(frame)):
        found: dict[str, str] = {}
        rows.append(found)
        if mask_path is None:
            if is_anomalous:
                found["mask_exists"] = "no mask"
            continue
        try:
            mask = decode(resolve(root, mask_path), max_pixels)
        except InputError as error:
            found["mask_file"] = str(error)
            continue
        found |= mask_faults(mask, None if problem else (width, height), is_anomalous, mask_path, model_size)
    names = ("exists", "file", "size", "binary", "empty", "normal", "large", "small")
    return pd.DataFrame(rows, index=frame.index, columns=[f"mask_{name}" for name in names], dtype=object)


def _near_duplicates(frame: pd.DataFrame, root: Path, bits: int, max_pixels: int) -> pd.Series:
    """Return, for each test image, a training image of its class with a perceptual hash within `bits` of 256."""
    readable = frame[frame["problem"].isna()]
    hashes = pd.Series(
        [
            imagehash.phash(read_image(resolve(root, path), max_pixels), hash_size=16).hash.ravel()
            for path in track(readable["path"], "search near-duplicates", total=len(readable))
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
    """Return a table and its rules: missing images by class and split, and imbalance by class."""
    required = params.min_images.model_dump()
    counts = frame.groupby(["class_name", "split"]).size()
    rows = [
        {"path": f"{name}/{split}", "lacks": max(0, required[split] - counts.get((name, split), 0)), "times": None}
        for name in sorted(frame["class_name"].unique())
        for split in SPLITS
    ]
    training = frame[frame["split"] == "train"].groupby("class_name").size()
    rows += [{"path": name, "lacks": None, "times": training.max() / count} for name, count in training.items()]
    kinds = frame[frame["split"] == "test"].groupby("class_name")["is_anomalous"].agg(["min", "max"])
    rows += [
        {"path": f"{name}/test", "lacks": None, "times": None, "one_sided": "defective" if least else "good"}
        for name, least, most in kinds.itertuples()
        if least == most
    ]
    least = ", ".join(f"{count} {split}" for split, count in required.items())
    table = pd.DataFrame(rows, columns=["path", "lacks", "times", "one_sided"]).astype(object)
    return table.where(table.notna(), None), [
        Rule(
            "enough_images",
            f"every class has at least {least} images",
            "Add images, remove the class, or lower validate.min_images",
            gxe.ExpectColumnValuesToBeInSet,
            {"column": "lacks", "value_set": [0]},
        ),
        Rule(
            "both_kinds",
            "every class has good and defective test images",
            "Without one of them most metrics are not defined, and the gate does not pass: add such images",
            gxe.ExpectColumnValuesToBeNull,
            {"column": "one_sided"},
            "warning",
        ),
        Rule(
            "balance",
            f"no class has more than {params.max_imbalance:g} times the training images of another",
            "The model learns these classes less well: add images of them",
            gxe.ExpectColumnValuesToBeBetween,
            {"column": "times", "max_value": params.max_imbalance},
            "warning",
        ),
    ]
