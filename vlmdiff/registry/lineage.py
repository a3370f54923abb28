"""Where a model comes from: the code's revision, and the hashes of data, captions and models that dvc.lock records."""

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import yaml

from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError

# Of commits that no person makes.
COMMITTER = {"NAME": "vlmdiff", "EMAIL": "vlmdiff@localhost"}


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


def fingerprint(recorded: dict[str, str]) -> str:
    """By what a version knows its model: the hashes of this workspace's detector and of its metrics.

    Raises InputError where they are not what dvc.lock records.
    """
    detector, metrics = (check_output(path, recorded) for path in (w.DETECTOR, w.METRICS))
    return f"{detector.removesuffix('.dir')}-{metrics}"


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
    try:
        revision = _git("rev-parse", "HEAD")
    except InputError:
        return {}
    return {
        "git.revision": revision,
        "git.changed": ", ".join(_git("diff", "--name-only", "HEAD").splitlines()) or "nothing",
    }


def commit_workspace(branch: str, message: str) -> dict[str, str]:
    """Commit the workspace on a branch of its own: tracked files as they are here, dvc.lock and .dvc files.

    What is checked out, the index and the files stay as they are. The branch is made where there is none; else it grows
    by a commit, of HEAD too where it has not got that; a workspace that it has already adds nothing. Returns what
    `code_revision` does, of the branch. Raises InputError where git does not do it, or the branch is checked out.
    """
    ref = f"refs/heads/{_git('check-ref-format', '--branch', branch)}"
    if where := _git("for-each-ref", "--format=%(worktreepath)", ref):
        raise InputError(f"branch {branch} is checked out in {where}: name another one, of its own")
    head = _git("rev-parse", "HEAD")
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        _git("read-tree", head, **index)
        _git("add", "--update", ":/", **index)
        new = _git("ls-files", "--others", "--exclude-standard", "--", str(w.DVC_LOCK), "*.dvc", **index).splitlines()
        if new:
            _git("add", "--", *new, **index)
        tree = _git("write-tree", **index)
    tip = _git("for-each-ref", "--format=%(objectname)", ref)
    shared = _git("merge-base", tip, head) if tip else None
    # Whichever has the other's commits; neither where both went on by themselves.
    newest = head if shared == (tip or None) else tip if shared == head else None
    if newest is None or _git("rev-parse", f"{newest}^{{tree}}") != tree:
        parents = [option for parent in ([newest] if newest else [tip, head]) for option in ("-p", parent)]
        who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in COMMITTER.items()}
        newest = _git("commit-tree", tree, *parents, "-m", message, **who)
    # Only if nobody has moved it meanwhile.
    _git("update-ref", ref, newest, tip or "0" * len(head))
    return {"git.revision": newest, "git.branch": branch, "git.changed": "nothing"}


def _git(*arguments: str, **environment: str) -> str:
    """What a git command prints. Raises InputError with git's words where it fails, or there is no git."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", **environment}
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise InputError("there is no git here: install it") from None
    if done.returncode:
        raise InputError(f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()
