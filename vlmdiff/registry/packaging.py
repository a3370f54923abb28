"""Register an evaluated model in MLflow: a run with its lineage, and a version that loads without this repository."""

import ast
import base64
import io
import json
import re
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import Run
from mlflow.models import ModelSignature
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS, MLFLOW_SOURCE_NAME
from PIL import Image

import vlmdiff
from vlmdiff.captions.files import read_captions
from vlmdiff.core import workspace as w
from vlmdiff.core.console import say
from vlmdiff.core.dvc import check_params, read_lock
from vlmdiff.core.files import HASHES, seal
from vlmdiff.core.git import code_revision
from vlmdiff.core.params import Params
from vlmdiff.data import manifest
from vlmdiff.data.images import read_image, resolve
from vlmdiff.evaluation.decision import PER_CLASS_DECISION, POOLED, Decisions
from vlmdiff.evaluation.evidence import Evidence
from vlmdiff.evaluation.metrics import Results
from vlmdiff.registry import served
from vlmdiff.registry.card import description, model_card
from vlmdiff.registry.store import FINGERPRINT, fingerprint_of, open_store

REGION = Object(
    [Property(name, DataType.long) for name in ("x0", "y0", "x1", "y1", "area")]
    + [Property(name, DataType.double) for name in ("peak", "share")]
)
OUTPUTS = Schema(
    [
        ColSpec(DataType.double, "score"),
        ColSpec(DataType.boolean, "is_anomalous"),
        ColSpec(DataType.string, "verdict"),
        ColSpec(DataType.string, "product", required=False),
        ColSpec(DataType.double, "p_value", required=False),
        ColSpec(Array(REGION), "regions"),
        ColSpec(DataType.string, "explanation"),
        ColSpec(DataType.string, "nearest", required=False),
        ColSpec(DataType.string, "heatmap", required=False),
    ]
)
PARAMETERS = ParamSchema(
    [
        ParamSpec("heatmap", DataType.boolean, served.DEFAULTS["heatmap"]),
        ParamSpec("threshold", DataType.double, served.DEFAULTS["threshold"]),
    ]
)
EXAMPLE_SIDE = 256
CARD = "model_card.md"
# Seconds after which nobody logs to a run any more.
STALE = 24 * 3600.0
METRICS_AT_ONCE = 1000  # MLflow takes no more


def register(params: Params, code: dict[str, str] | None = None) -> int:
    """Log and register the evaluated model of this workspace; return its version.

    A version is identified by the hashes of the detector and its metrics: a second call returns the same version, and a
    call after a kill completes the registration. code: tags of the code's revision, instead of git's HEAD. Raises
    InputError if the stages have not run, data or parameters changed meanwhile, their outputs differ from dvc.lock, or
    the store does not answer.
    """
    recorded = read_lock()
    check_params(params)
    fingerprint = fingerprint_of(recorded)
    tags = {
        FINGERPRINT: fingerprint,
        **(code_revision() if code is None else code),
        # The run has the reports themselves.
        **{f"dvc.{path}": value for path, value in recorded.items() if not path.startswith("reports/")},
    }
    results = Results.read(w.METRICS)
    name = params.registry.model_name
    with open_store(params.registry) as client:
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description="Visual anomaly detection: VLMDiff (arXiv 2511.08173).")
        for version in client.search_model_versions(f"name = '{name}'"):
            if version.tags.get(FINGERPRINT) == fingerprint:
                say(f"register: this model is already version {version.version}")
                return int(version.version)
        run_id, model_uri = _find_run(client, params, fingerprint) or _log_run(params, results, tags)
        # A server needs the id at the end of the URI; a store that is opened directly does not.
        model_id = model_uri.removeprefix("models:/")
        version = client.create_model_version(
            name, model_uri, run_id, tags, description=description(params), model_id=model_id
        )
        # As `mlflow.register_model` does. Otherwise the model's page says that it is not registered.
        known = json.dumps([{"name": name, "version": version.version}])
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: known})
    say(f"register: version {version.version} of {name}")
    return int(version.version)


def requirements() -> list[str]:
    """Return what the served model needs, as NAME==VERSION: all that its code imports, at the installed versions.

    Its code is served.py and the modules of this package that it imports, at the top or in a function.
    """
    root = Path(vlmdiff.__file__).parents[1]
    waiting, seen, names = [Path(served.__file__)], set(), set()
    while waiting:
        seen.add(file := waiting.pop())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            names |= {name.partition(".")[0] for name in found}
            files = {root / f"{name.replace('.', '/')}.py" for name in found if name.startswith("vlmdiff.")}
            waiting += [each for each in files - seen if each.is_file()]
    known = metadata.packages_distributions()
    # Several distributions may have modules of one package.
    distributions = {name if name in known[name] else known[name][0] for name in names & known.keys() - {"vlmdiff"}}
    # +cpu and the like are on the index of one machine alone.
    return sorted(f"{name}=={metadata.version(name).partition('+')[0]}" for name in distributions)


def _find_run(client: MlflowClient, params: Params, fingerprint: str) -> tuple[str, str] | None:
    """Return the finished run of the same model that was not registered because of a kill, None if there is none.

    Removes what other killed registrations left.
    """
    experiment = client.get_experiment_by_name(params.registry.experiment)
    if experiment is None:
        return None
    for run in client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'"):
        # The store is locked, so no process of this machine logs these. One of another machine may log another model.
        is_old = time.time() - run.info.start_time / 1000 > STALE
        if run.data.tags.get(FINGERPRINT) == fingerprint or (FINGERPRINT in run.data.tags and is_old):
            _sweep(client, run)
    for run in client.search_runs([experiment.experiment_id], f"tags.{FINGERPRINT} = '{fingerprint}'"):
        if run.info.status == "FINISHED":
            return run.info.run_id, run.data.tags["model_uri"]
    return None


def _sweep(client: MlflowClient, run: Run) -> None:
    """Remove the models that a killed process logged to a run, with their copies, and end the run."""
    for model in client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"):
        get_artifact_repository(model.artifact_location).delete_artifacts()
        client.delete_logged_model(model.model_id)
    client.set_terminated(run.info.run_id, "KILLED")


def _log_run(params: Params, results: Results, tags: dict[str, str]) -> tuple[str, str]:
    """Log everything to a new run; return its id and the model's URI."""
    example = _example(params)
    mlflow.set_experiment(params.registry.experiment)
    title = f"{params.registry.model_name} {tags[FINGERPRINT][:8]}"
    with mlflow.start_run(run_name=title, tags=tags | {MLFLOW_SOURCE_NAME: "vlmdiff"}) as run:
        mlflow.log_params(_flat(params.model_dump(mode="json", by_alias=True)))
        evidence = Evidence.read(w.EVALUATION)
        cost = {"latency_ms": evidence.latency_ms, "size_mb": evidence.size_mb}
        metrics = list((_defined(results) | _decided(evidence.decisions) | cost).items())
        for part in range(0, len(metrics), METRICS_AT_ONCE):
            mlflow.log_metrics(dict(metrics[part : part + METRICS_AT_ONCE]))
        for stage in ("first_stage", "train"):
            for row in json.loads(Path(f"reports/{stage}/loss.json").read_text(encoding="utf-8")):
                values = {f"{stage}/{key}": value for key, value in row.items() if key != "step"}
                mlflow.log_metrics(values, step=int(row["step"]))
        mlflow.log_artifacts(str(w.EVALUATION), "evaluation")
        for file in (w.PARAMS, w.DVC_LOCK, w.MANIFEST, w.CAPTIONS):
            mlflow.log_artifact(str(file), "lineage")
        with tempfile.TemporaryDirectory() as folder:
            card = Path(folder, CARD)
            card.write_text(model_card(params), encoding="utf-8")
            model = mlflow.pyfunc.log_model(
                name="model",
                python_model=served.__file__,
                artifacts={"detector": str(w.DETECTOR), "card": str(card)},
                code_paths=[str(Path(vlmdiff.__file__).parent)],
                model_config={"max_pixels": params.prepare.max_pixels},
                signature=ModelSignature(_inputs(params), OUTPUTS, PARAMETERS),
                input_example=pd.DataFrame([example]),
                pip_requirements=requirements(),
            )
            version = Path(mlflow.artifacts.download_artifacts(model.model_uri, dst_path=str(Path(folder, "version"))))
            # MLflow adds it to each download.
            (version / "registered_model_meta").unlink(missing_ok=True)
            seal(version)
            MlflowClient().log_model_artifact(model.model_id, str(version / HASHES))
        mlflow.set_tag("model_uri", model.model_uri)
    return run.info.run_id, model.model_uri


def _inputs(params: Params) -> Schema:
    """Return the inputs: an image as base64 (or bytes, which MLflow accepts) or a path, its product, a caption."""
    needed = served.CAPTION_COLUMNS.get(params.evaluate.detection.captions)
    names = dict.fromkeys(("image", "path", served.PRODUCT, *([needed] if needed else ())))
    return Schema([ColSpec(DataType.string, name, required=name == needed) for name in names])


def _example(params: Params) -> dict[str, str]:
    """Return a normal image as a client sends it: base64 of a small copy, and a caption if needed."""
    frame = manifest.read(w.MANIFEST)
    # One of the test split, if it has normal images; every dataset has normal images for training.
    row = frame[~frame["is_anomalous"]].sort_values(["split", "path"]).iloc[0]
    image = read_image(resolve(params.prepare.image_root, row["path"]), params.prepare.max_pixels)
    image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    example = {"image": base64.b64encode(buffer.getvalue()).decode()}
    kind = params.evaluate.detection.captions
    if kind != "none":
        text = read_captions(w.CAPTIONS)[row["image_id"]] if kind == "image" else row["class_name"]
        example[served.CAPTION_COLUMNS[kind]] = text
    return example


def _defined(results: Results) -> dict[str, float]:
    """Return the defined metrics by MLflow's names, `au_pro` and `au_pro/CLASS`."""
    values = dict(results.mean)
    for name, metrics in results.classes.items():
        values |= {f"{metric}/{_allowed(name)}": value for metric, value in metrics.items()}
    return {name: value for name, value in values.items() if value == value}


def _decided(decisions: Decisions) -> dict[str, float]:
    """Return the defined metrics of the verdicts: decision/recall, decision/recall/CLASS, etc."""
    values = {}
    for key, rows in decisions.metrics.items():
        for name, row in rows.items():
            group = {POOLED: "", PER_CLASS_DECISION: f"/{name}"}.get(key, f"/{key}/{name}")
            values |= {f"decision/{metric}{_allowed(group)}": value for metric, value in row.items()}
    return {name: value for name, value in values.items() if value == value}


def _allowed(name: str) -> str:
    """Return a name with the characters that MLflow allows in that of a metric."""
    return re.sub(r"[^\w. /-]", "_", name.replace(" %", " percent"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
