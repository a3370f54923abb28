"""The one place that runs `git`: the code's revision, the files it tracks, and commits on a branch of their own."""

import os
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError

# Seconds after which a git command is ended: all work on files of this machine.
LIMIT = 600.0
# The author of commits that no person makes.
COMMITTER = {"NAME": "vlmdiff", "EMAIL": "vlmdiff@localhost"}


def code_revision() -> dict[str, str]:
    """Return the commit of the workspace and the tracked files that differ from it, as tags.

    Empty outside of a git repository, or before its first commit. Raises InputError if git fails.
    """
    if not _in_repository():
        return {}
    status = _git("status", "--porcelain=v2", "--branch", "--untracked-files=no")
    revision = status.splitlines()[0].removeprefix("# branch.oid ")
    if revision == "(initial)":
        return {}
    changed = _paths("diff", "--name-only", "-z", "HEAD")
    return {"git.revision": revision, "git.changed": ", ".join(changed) or "nothing"}


def list_files(pattern: str, untracked: bool = False) -> list[str]:
    """Return the tracked files of a path or a pattern such as `*.dvc`, relative to the workspace.

    untracked: Also files that git neither tracks nor ignores. Raises InputError if git fails.
    """
    options = ("--others", "--exclude-standard") if untracked else ()
    return _paths("ls-files", "-z", "--cached", *options, "--", pattern)


def commit_workspace(branch: str, message: str, allowed: Collection[str] = ()) -> dict[str, str]:
    """Commit the workspace on a branch of its own: tracked files as they are here, dvc.lock and .dvc files.

    What is checked out, the index and the files stay as they are. The branch is created if it does not exist. Else it
    gets one more commit, which merges HEAD if HEAD has commits that the branch has not. A workspace that the branch
    has already adds no commit. Returns what `code_revision` returns, and the branch.

    Raises InputError if git fails, `branch` is not the name of a branch, it is checked out, or it exists and neither
    this function made it nor `allowed` names it.
    """
    # With --branch, git takes @{-1} for the branch that was checked out before.
    if _git("check-ref-format", "--branch", branch) != branch:
        raise InputError(f"{branch} is not the name of a branch (git check-ref-format): choose another branch")
    # The second ref marks the branch as one of ours.
    ref, mark = f"refs/heads/{branch}", f"refs/vlmdiff/{branch}"
    if where := _git("for-each-ref", "--format=%(worktreepath)", ref):
        raise InputError(f"branch {branch} is checked out in {where}: choose another branch")
    head = _git("rev-parse", "HEAD")
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        _git("read-tree", head, **index)
        _git("add", "--update", ":/", **index)
        new = _paths("ls-files", "-z", "--others", "--exclude-standard", "--", str(w.DVC_LOCK), "*.dvc", **index)
        if new:
            _git("add", "--", *new, **index)
        tree = _git("write-tree", **index)
    tip = _git("for-each-ref", "--format=%(objectname)", ref)
    if tip and branch not in allowed and not _git("for-each-ref", mark):
        raise InputError(
            f"branch {branch} exists, and this flow did not make it: choose another branch, or add it to "
            "registry.branches in params.yaml"
        )
    shared = _git("merge-base", tip, head) if tip else None
    # The one that contains the other's commits. None if each has commits of its own.
    newest = head if shared == (tip or None) else tip if shared == head else None
    if newest is None or _git("rev-parse", f"{newest}^{{tree}}") != tree:
        parents = [option for parent in ([newest] if newest else [tip, head]) for option in ("-p", parent)]
        who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in COMMITTER.items()}
        newest = _git("commit-tree", tree, *parents, "-m", message, **who)
    _git("update-ref", "--no-deref", mark, newest)
    # Fails if another process has moved the branch. Of a name for another branch, it moves the name alone.
    _git("update-ref", "--no-deref", ref, newest, tip or "0" * len(head))
    return {"git.revision": newest, "git.branch": branch, "git.changed": "nothing"}


def _in_repository() -> bool:
    here = Path.cwd()
    return any((folder / ".git").exists() for folder in (here, *here.parents))


def _paths(*arguments: str, **environment: str) -> list[str]:
    """Return the paths that a git command prints with -z: others are quoted where they are not ASCII."""
    return [path for path in _git(*arguments, **environment).split("\0") if path]


def _git(*arguments: str, **environment: str) -> str:
    """Return what a git command prints. Raises InputError with its error message if it fails."""
    # Messages in English, paths in UTF-8, whatever the locale.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", **environment}
    try:
        done = subprocess.run(
            ["git", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            env=environment,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"`git {' '.join(arguments)}` did not end in {LIMIT:g} s: run it by hand to see why") from None
    except FileNotFoundError:
        raise InputError("git is not installed: install it, then try again") from None
    if done.returncode and not _in_repository():
        raise InputError(f"{Path.cwd()} is not a git repository, and DVC needs one: run `git init`, then try again")
    if done.returncode:
        raise InputError(f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()
