"""Where a model comes from: the code's revision, and the hashes of data, captions and models that dvc.lock records."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import yaml

from vlmdiff.errors import InputError


def read_lock(lock: Path) -> dict[str, str]:
    """Path to hash of everything that the stages read and wrote, code apart, as DVC last recorded it."""
    if not lock.is_file():
        raise InputError(f"{lock} does not exist: run `dvc repro` first")
    stages = yaml.safe_load(lock.read_text())["stages"]
    entries = [entry for stage in stages.values() for kind in ("deps", "outs") for entry in stage.get(kind, ())]
    return {entry["path"]: entry["md5"] for entry in entries if not entry["path"].startswith("vlmdiff/")}


def check_output(path: Path, recorded: dict[str, str]) -> str:
    """The recorded hash of a stage's output. Raises InputError where there is none, or the output is another one."""
    if path.as_posix() not in recorded or not path.exists():
        raise InputError(f"{path} was not made by the stages of dvc.yaml: run `dvc repro` first")
    if dvc_hash(path) != recorded[path.as_posix()]:
        raise InputError(f"{path} is not what dvc.lock records: run `dvc repro`, or `dvc checkout` to have it back")
    return recorded[path.as_posix()]


def dvc_hash(path: Path) -> str:
    """The hash that DVC gives a file, or a folder: that of the JSON list of its files' hashes and paths."""
    if path.is_file():
        return _md5(path)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    listing = [{"md5": _md5(files[relative]), "relpath": relative} for relative in sorted(files)]
    return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def code_revision() -> dict[str, str]:
    """Git's revision of the workspace, and the tracked files that differ from it; empty outside of git."""
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return {}
    changed = (_git("diff", "--name-only", "HEAD") or "").splitlines()
    return {"git.revision": revision, "git.changed": ", ".join(changed) or "nothing"}


def _git(*arguments: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
