"""Judge registered versions by the gate, promote the champion, roll it back."""

from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
from mlflow.tracking import MlflowClient
from safetensors import SafetensorError

from vlmdiff.captions.files import read_captions
from vlmdiff.core import workspace as w
from vlmdiff.core.console import say
from vlmdiff.core.dvc import read_lock
from vlmdiff.core.errors import InputError, machine_fault
from vlmdiff.core.files import atomic_folder, atomic_path, folder_mb
from vlmdiff.core.params import Params
from vlmdiff.data import manifest
from vlmdiff.evaluation.evidence import EVIDENCE, Evidence
from vlmdiff.evaluation.gate import judge
from vlmdiff.evaluation.report import read_content, render
from vlmdiff.evaluation.verdict import Criterion, Override, Verdict
from vlmdiff.registry.store import CHAMPION, FINGERPRINT, champion_version, fingerprint_of, open_store

# Tags of a version: the gate's verdict and reasons, the champion it was compared with, who overrode the gate and why.
VERDICT, REASONS, AGAINST = "gate.verdict", "gate.reasons", "gate.champion"
OVERRIDE_BY, OVERRIDE_REASON = "gate.override.by", "gate.override.reason"
# The champion before this one. It stays when the version is judged again.
BEFORE = "champion.before"
# Who rolled a champion back, why, and to which version; and the same on the version that was restored.
ROLLBACK_BY, ROLLBACK_REASON, ROLLBACK_TO = ROLLBACK = "rollback.by", "rollback.reason", "rollback.to"
RESTORED_BY, RESTORED_REASON, RESTORED_FROM = "restored.by", "restored.reason", "restored.from"
NONE = "none"
TAG_LENGTH = 5000


def gate(params: Params, version: int | None = None) -> Verdict:
    """Judge a registered version, or the model of this workspace if None, without changing the registry.

    Writes the verdict to `reports/gate.json`, and the report with the verdict to `reports/gate.html`.
    """
    with open_store(params.registry) as client:
        tags = _tags_here(client, params) if version is None else _tags(client, params, version)
        champion = champion_version(client, params.registry)
    against, override = _opponent(version, champion, tags)
    case = _hear(params, version, against, tags)
    is_champion = version is not None and version == champion
    verdict = replace(case.verdict(params, version, against), is_champion=is_champion, override=override)
    case.publish(verdict)
    return verdict


def promote(params: Params, version: int, override: Override | None = None) -> Verdict:
    """Judge a version by the gate; if it passes, it becomes champion. A second call changes nothing.

    The verdict goes into the version's tags and, with the files that `gate` writes, into its run. An `override`
    promotes a version that the gate refuses; it is recorded, and clears an earlier rollback of the version. The current
    champion is compared with the champion before it, and stays champion whatever the verdict.
    """
    name = params.registry.model_name
    while True:
        with open_store(params.registry) as client:
            tags = _tags(client, params, version)
            champion = champion_version(client, params.registry)
        against, before = _opponent(version, champion, tags)
        # This may evaluate images, which takes long: the store is not locked meanwhile.
        case = _hear(params, version, against, tags)
        verdict = case.verdict(params, version, against)
        if not verdict.passed:
            verdict = replace(verdict, override=override or before)
        verdict = replace(verdict, is_champion=verdict.passed or version == champion or verdict.override is not None)
        with open_store(params.registry) as client:
            if champion_version(client, params.registry) != champion:
                say("promote: another version became champion meanwhile; judging against that one")
                continue
            if _rollback_of(_tags(client, params, version)) != _rollback_of(tags):
                say("promote: the version was rolled back meanwhile; judging again")
                continue
            case.publish(verdict)
            becomes = verdict.is_champion and champion != version
            run = _run_of(client, params, version)
            for file in (w.GATE, w.GATE_PAGE):
                client.log_artifact(run, str(file), "gate")
            # The alias last: after a kill before it, a second call completes the promotion.
            written = _as_tags(verdict) | ({BEFORE: str(champion or NONE)} if becomes else {})
            for key, value in written.items():
                client.set_model_version_tag(name, str(version), key, value)
            # Of an earlier state, or of an override that was killed before the alias.
            gone = {*(ROLLBACK if becomes else ()), *(() if verdict.override else (OVERRIDE_BY, OVERRIDE_REASON))}
            for key in tags.keys() & gone:
                client.delete_model_version_tag(name, str(version), key)
            if becomes:
                client.set_registered_model_alias(name, CHAMPION, str(version))
        return verdict


def rollback(params: Params, by: str, reason: str) -> tuple[int, int]:
    """Restore the previous champion; return the version that was champion and the version that is now.

    Both get tags with the person, the reason and the other version. The gate does not promote a version that was
    rolled back again, except by an override. A further rollback goes one champion further back and skips versions that
    were rolled back. Raises InputError if there is no champion, or none before it.
    """
    name = params.registry.model_name
    # All under the lock of the store: a concurrent promotion then finds another champion and judges again.
    with open_store(params.registry) as client:
        champion = champion_version(client, params.registry)
        if champion is None:
            raise InputError(f"{name} has no champion, so there is nothing to roll back")
        known, seen = _versions(client, params), {champion}
        before = _champion_before(known[champion])
        while before is not None and before not in seen and _rollback_of(known.get(before, {})):
            seen.add(before)
            before = _champion_before(known[before])
        if before is None or before in seen:
            raise InputError(f"version {champion} is the first champion: there is no previous one to restore")
        if before not in known:
            raise InputError(f"version {before}, the champion before version {champion}, is no longer in the registry")
        # The tags first, as in `promote`.
        why = reason[:TAG_LENGTH]
        for version, written in (
            (champion, {ROLLBACK_BY: by, ROLLBACK_REASON: why, ROLLBACK_TO: str(before)}),
            (before, {RESTORED_BY: by, RESTORED_REASON: why, RESTORED_FROM: str(champion)}),
        ):
            for key, value in written.items():
                client.set_model_version_tag(name, str(version), key, value)
        client.set_registered_model_alias(name, CHAMPION, str(before))
    return champion, before


def _versions(client: MlflowClient, params: Params) -> dict[int, dict[str, str]]:
    """Return the tags of every version."""
    return {int(v.version): v.tags for v in client.search_model_versions(f"name = '{params.registry.model_name}'")}


def _tags(client: MlflowClient, params: Params, version: int) -> dict[str, str]:
    """Return the tags of a version. Raises InputError if there is no such version."""
    found = _versions(client, params)
    if version not in found:
        known = ", ".join(map(str, sorted(found))) or "none"
        raise InputError(f"{params.registry.model_name} has no version {version}. Known versions: {known}")
    return found[version]


def _run_of(client: MlflowClient, params: Params, version: int) -> str:
    """Return the run that registered a version. Raises InputError if it has none."""
    run = client.get_model_version(params.registry.model_name, str(version)).run_id
    if not run:
        raise InputError(f"version {version} has no run with an evaluation. Run `vlmdiff register` for its model")
    return run


def _tags_here(client: MlflowClient, params: Params) -> dict[str, str]:
    """Return the tags of the version with this workspace's model, empty if it is not registered."""
    try:
        model = fingerprint_of(read_lock())
    except InputError:
        return {}
    return next((tags for tags in _versions(client, params).values() if tags.get(FINGERPRINT) == model), {})


def _champion_before(tags: dict[str, str]) -> int | None:
    """Return the champion that this version replaced; versions of earlier releases only name their opponent."""
    before = tags.get(BEFORE, tags.get(AGAINST, NONE))
    return None if before == NONE else int(before)


def _rollback_of(tags: dict[str, str]) -> str | None:
    """Return who rolled a version back and why, as the end of a sentence; None if nobody did."""
    return f"rolled back by {tags[ROLLBACK_BY]}: {tags[ROLLBACK_REASON]}" if set(ROLLBACK) <= tags.keys() else None


def _opponent(version: int | None, champion: int | None, tags: dict[str, str]) -> tuple[int | None, Override | None]:
    """Return the version to compare with, and the override by which this version became champion, if any."""
    if version is None or version != champion:
        return champion, None
    by = tags.get(OVERRIDE_BY)
    return _champion_before(tags), Override(by, tags.get(OVERRIDE_REASON, "")) if by else None


def _as_tags(verdict: Verdict) -> dict[str, str]:
    said = "passed" if verdict.passed else "overridden" if verdict.override else "failed"
    reasons = "\n".join(verdict.reasons)
    if len(reasons) > TAG_LENGTH:
        reasons = reasons[: TAG_LENGTH - 1].rpartition("\n")[0] + "\n…"
    tags = {VERDICT: said, REASONS: reasons, AGAINST: str(verdict.champion or NONE)}
    if verdict.override:
        tags |= {OVERRIDE_BY: verdict.override.by, OVERRIDE_REASON: verdict.override.reason[:TAG_LENGTH]}
    return tags


@dataclass(frozen=True)
class Case:
    """The evaluations of a model and of the champion it is compared with.

    rolled_back: who rolled the model back and why, None if nobody did.
    """

    folder: Path
    model: Evidence
    rolled_back: str | None = None
    champion_folder: Path | None = None
    champion: Evidence | InputError | None = None

    def verdict(self, params: Params, version: int | None, against: int | None) -> Verdict:
        """Return the verdict, before it changes the champion."""
        rejudged = self.champion_folder is not None and w.JUDGED_AGAIN in self.champion_folder.parents
        criteria = judge(self.model, self.champion, params.gate)
        if self.rolled_back:
            model = "the model" if version is None else f"version {version}"
            criteria.append(Criterion("rollbacks", 1.0, "at most", 0.0, f"{model} was {self.rolled_back}"))
        return Verdict(version, against, rejudged, False, criteria)

    def publish(self, verdict: Verdict) -> None:
        """Write the verdict as JSON, and the page that shows it above the model's report."""
        champion, difference = None, None
        if isinstance(self.champion, Evidence) and self.champion_folder:
            champion, difference = read_content(self.champion_folder), self.model.resampled - self.champion.resampled
        with atomic_path(w.GATE_PAGE) as temporary:
            temporary.write_text(render(read_content(self.folder), verdict, champion, difference), encoding="utf-8")
        verdict.write(w.GATE)


def _hear(params: Params, version: int | None, against: int | None, tags: dict[str, str]) -> Case:
    """Read the evaluations of a version (None: this workspace's model) and of the champion on the same test images."""
    folder = w.EVALUATION if version is None else _evaluation(params, version)
    model, rolled_back = Evidence.read(folder), _rollback_of(tags)
    if against is None:
        return Case(folder, model, rolled_back)
    try:
        champion_folder = _evaluation_on(params, against, model.test_set)
        return Case(folder, model, rolled_back, champion_folder, Evidence.read(champion_folder))
    except InputError as error:
        # A full disk must not become a verdict either.
        if machine_fault(error):
            raise
        # If the store no longer answers, this raises: an unreachable store must not become a verdict.
        with open_store(params.registry) as client:
            champion_version(client, params.registry)
        return Case(folder, model, rolled_back, None, error)


def _evaluation(params: Params, version: int) -> Path:
    """Return the folder of a version's evaluation, downloaded once into the workspace's cache."""
    with open_store(params.registry) as client:
        run = _run_of(client, params, version)
        folder = w.REGISTRY_CACHE / run / "evaluation"
        # An earlier release may have downloaded less.
        if not all((folder / name).exists() for name in EVIDENCE):
            with atomic_folder(folder) as temporary:
                present = {Path(file.path).name for file in client.list_artifacts(run, "evaluation")}
                if not present:
                    # Nothing is kept of this answer: the store may be back later.
                    raise InputError(_no_artifacts(client, run, version))
                for name in present & set(EVIDENCE):
                    fetched = client.download_artifacts(run, f"evaluation/{name}", str(temporary))
                    Path(fetched).rename(temporary / name)
    return folder


def _no_artifacts(client: MlflowClient, run: str, version: int) -> str:
    """Return a sentence about a run whose files are not where the store says."""
    place = client.get_run(run).info.artifact_uri or ""
    return (
        f"version {version} has no evaluation at {place}. If the disk is away, try again when it is back. A store in "
        "SQLite keeps absolute paths: if this folder was moved or copied, move it back, or register the model again "
        "after removing mlflow.db"
    )


def _evaluation_on(params: Params, version: int, test_set: str) -> Path:
    """Return a version's evaluation on these test images; evaluate it again if its own used other images."""
    folder = _evaluation(params, version)
    try:
        if Evidence.read(folder).test_set == test_set:
            return folder
    except InputError:
        # An earlier release kept less.
        pass
    again = w.JUDGED_AGAIN / f"{folder.parent.name}-{test_set[:16]}"
    if again.exists():
        return again
    from vlmdiff.detection.detector import Detector  # most verdicts need no networks
    from vlmdiff.evaluation.judging import hash_test_set, judge_images

    frame = manifest.read(w.MANIFEST)
    if hash_test_set(frame, params.prepare, params.evaluate.max_fpr) != test_set:
        raise InputError(
            f"version {version} was evaluated on other test images, and those of the model are not in this workspace. "
            "Run `dvc repro`, then register and promote the result"
        )
    detector_folder = _detector(params, version)
    try:
        detector = Detector.from_pretrained(detector_folder)
    except (InputError, OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if machine_fault(error):
            raise
        raise InputError(f"version {version} cannot be loaded: {error}") from error
    say(f"evaluating version {version} on the current test images")
    judged = judge_images(detector, frame, params.prepare, read_captions(w.CAPTIONS), params.evaluate)
    with atomic_folder(again) as temporary:
        judged.write(temporary, folder_mb(detector_folder), {"version": version})
    return again


def _detector(params: Params, version: int) -> Path:
    """Return a version's detector, downloaded once into the workspace's cache."""
    with open_store(params.registry) as client:
        name = params.registry.model_name
        folder = w.REGISTRY_CACHE / _run_of(client, params, version) / "model"
        if not folder.exists():
            with atomic_folder(folder) as temporary:
                source = f"models:/{name}/{version}/artifacts/detector"
                mlflow.artifacts.download_artifacts(source, dst_path=str(temporary))
    found = list(folder.rglob("detector.json"))
    if len(found) != 1:
        raise InputError(f"version {version} cannot be loaded: its artifacts have no detector")
    return found[0].parent


def champion(params: Params) -> tuple[int, Path]:
    """Return the champion's version and its detector, downloaded once. Raises InputError if there is no champion."""
    with open_store(params.registry) as client:
        version = champion_version(client, params.registry)
    if version is None:
        raise InputError(
            f"{params.registry.model_name} has no champion. Run `make demo`, or name a detector's folder with --model"
        )
    return version, _detector(params, version)
