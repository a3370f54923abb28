"""From a registered version to the champion, where the gate lets it pass."""

import tempfile
from pathlib import Path

import mlflow
from mlflow.tracking import MlflowClient

from vlmdiff import workspace as w
from vlmdiff.errors import InputError
from vlmdiff.evaluation.gate import Verdict, judge
from vlmdiff.evaluation.metrics import Results
from vlmdiff.files import atomic_folder
from vlmdiff.params import Params
from vlmdiff.registry.store import CHAMPION, champion_version, open_store

# Tags of a version: the gate's word, its reasons, and the champion that it was judged against.
VERDICT, REASONS, AGAINST = "gate.verdict", "gate.reasons", "gate.champion"
NONE = "none"
TAG_LENGTH = 5000


def promote(params: Params, version: int) -> Verdict:
    """Judge a version by the gate; where it passes, it becomes champion. Twice is as good as once.

    The version's tags and `reports/gate.json` say the verdict and its reasons. The champion itself is judged against
    the one before it, and stays champion whatever comes out: only a better version takes its place.
    """
    name = params.registry.model_name
    with open_store(params.registry) as client:
        found = {int(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
        if version not in found:
            known = ", ".join(map(str, sorted(found))) or "none"
            raise InputError(f"{name} has no version {version}: known versions are {known}")
        champion = champion_version(client, params.registry)
        against = champion
        if champion == version:
            before = found[version].tags.get(AGAINST, NONE)
            against = None if before == NONE else int(before)
        opponent = None if against is None else _results(client, found[against].run_id)
        criteria = judge(_results(client, found[version].run_id), opponent, params.gate)
        passed = all(criterion.passed for criterion in criteria)
        verdict = Verdict(version, params.gate.metric, against, passed or champion == version, criteria)
        # The tags first: who is killed before the alias runs again and ends the same.
        for key, value in {
            VERDICT: "passed" if passed else "failed",
            REASONS: "\n".join(verdict.reasons)[:TAG_LENGTH],
            AGAINST: str(against or NONE),
        }.items():
            client.set_model_version_tag(name, str(version), key, value)
        if passed and champion != version:
            client.set_registered_model_alias(name, CHAMPION, str(version))
    verdict.write(w.GATE)
    return verdict


def _results(client: MlflowClient, run_id: str) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        return Results.read(Path(client.download_artifacts(run_id, "evaluation/metrics.json", folder)))


def champion_folder(params: Params) -> Path:
    """The champion's detector, fetched once into the workspace's cache."""
    with open_store(params.registry) as client:
        version = champion_version(client, params.registry)
        if version is None:
            raise InputError(
                f"{params.registry.model_name} has no champion: run `make demo`, or name a folder by --model"
            )
        name = params.registry.model_name
        folder = w.CHAMPIONS / client.get_model_version(name, str(version)).run_id
        if not folder.exists():
            with atomic_folder(folder) as temporary:
                source = f"models:/{name}/{version}/artifacts/detector"
                mlflow.artifacts.download_artifacts(source, dst_path=str(temporary))
    (detector,) = folder.rglob("detector.json")
    return detector.parent
