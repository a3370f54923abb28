"""Commits on a branch of their own leave what a person has checked out; and git's failures are errors."""

import subprocess

import pytest

from vlmdiff.core.dvc import take_in
from vlmdiff.core.errors import InputError
from vlmdiff.core.git import code_revision, commit_workspace, list_files


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A repository with a committed file, one that is staged, one that is changed, and what the stages made."""
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet", "--initial-branch", "main")
    (tmp_path / ".gitignore").write_text("models/\n")
    (tmp_path / "params.yaml").write_text("steps: 1\n")
    (tmp_path / "code.py").write_text("")
    git("add", "--all")
    git("commit", "--quiet", "--message", "first")
    (tmp_path / "params.yaml").write_text("steps: 2\n")
    (tmp_path / "code.py").write_text("staged\n")
    git("add", "code.py")
    (tmp_path / "dvc.lock").write_text("lock\n")
    (tmp_path / "photos.dvc").write_text("outs\n")
    (tmp_path / "notes.txt").write_text("mine\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/weights.dvc").write_text("ignored\n")
    return tmp_path


def state() -> tuple[str, ...]:
    return git("rev-parse", "HEAD"), git("status", "--porcelain"), git("diff"), git("diff", "--cached")


def test_the_commit_is_the_workspace_and_what_is_checked_out_stays(here):
    before = state()
    made = commit_workspace("retrained", "retrain of today\n\nAU-PRO: 0.9")
    assert state() == before
    assert made == {"git.revision": git("rev-parse", "retrained"), "git.branch": "retrained", "git.changed": "nothing"}
    listed = git("ls-tree", "-r", "--name-only", "retrained").splitlines()
    # Nobody's notes, and nothing that git ignores.
    assert listed == [".gitignore", "code.py", "dvc.lock", "params.yaml", "photos.dvc"]
    assert git("show", "retrained:params.yaml") == "steps: 2" and git("show", "retrained:code.py") == "staged"
    assert git("log", "-1", "--format=%s|%an", "retrained") == "retrain of today|vlmdiff"
    assert git("rev-parse", "retrained^") == git("rev-parse", "main")


def test_the_same_workspace_adds_no_commit_and_another_one_does(here):
    first = commit_workspace("retrained", "once")
    assert commit_workspace("retrained", "twice") == first
    (here / "dvc.lock").write_text("another\n")
    second = commit_workspace("retrained", "thrice")
    assert git("rev-list", "--count", "main..retrained") == "2"
    assert git("rev-parse", f"{second['git.revision']}^") == first["git.revision"]


def test_the_branch_takes_in_what_was_committed_meanwhile(here):
    commit_workspace("retrained", "once")
    git("commit", "--quiet", "--all", "--message", "second")
    made = commit_workspace("retrained", "twice")
    parents = git("rev-list", "--parents", "-1", made["git.revision"]).split()[1:]
    assert len(parents) == 2 and parents[1] == git("rev-parse", "main")
    assert commit_workspace("retrained", "again") == made


def test_a_clean_workspace_is_its_own_commit(here):
    git("add", "dvc.lock", "photos.dvc")
    git("commit", "--quiet", "--all", "--message", "second")
    made = commit_workspace("retrained", "once")
    assert made["git.revision"] == git("rev-parse", "main") == code_revision()["git.revision"]
    # And where a branch is behind, it moves on without a commit of its own.
    git("commit", "--quiet", "--allow-empty", "--message", "third")
    assert commit_workspace("retrained", "twice")["git.revision"] == git("rev-parse", "main")


@pytest.mark.parametrize(
    "branch, words",
    [
        ("main", "is checked out in"),
        *[(name, "check-ref-format") for name in ("no..name", "@{-1}", "-d", "--delete", "HEAD", "a b", "a\n")],
    ],
)
def test_a_branch_that_is_in_use_or_has_no_valid_name_is_refused(here, branch, words):
    before = state()
    with pytest.raises(InputError, match=words):
        commit_workspace(branch, "never")
    assert state() == before


@pytest.fixture
def release(here):
    """A person's branch, which was checked out before this one, and another name for it."""
    git("branch", "release")
    git("stash", "--quiet", "--include-untracked")
    git("checkout", "--quiet", "release")
    git("checkout", "--quiet", "main")
    git("stash", "pop", "--quiet")
    git("symbolic-ref", "refs/heads/alias", "refs/heads/release")
    return git("rev-parse", "release")


@pytest.mark.parametrize(
    "branch, words",
    [
        ("release", "release exists, and this flow did not make it"),
        ("alias", "alias exists, and this flow did not make it"),
        *[(name, "is not the name of a branch") for name in ("@{-1}", "@{-2}")],
    ],
)
def test_a_persons_branch_is_refused_whatever_names_it(release, branch, words):
    with pytest.raises(InputError, match=words):
        commit_workspace(branch, "never")
    assert git("rev-parse", "release") == release


def test_a_persons_branch_that_the_parameters_name_is_taken(release):
    made = commit_workspace("release", "once", ["release"])
    assert git("rev-parse", "release") == made["git.revision"] != release
    # And since then it is ours.
    assert commit_workspace("release", "twice") == made


def test_outside_of_git_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a git repository"):
        commit_workspace("retrained", "never")
    with pytest.raises(InputError, match="not a git repository"):
        list_files("*.dvc")
    assert code_revision() == {}


def test_a_repository_of_another_user_is_an_error_and_not_an_empty_answer(here, monkeypatch):
    # git's own switch, as if the files belonged to somebody else.
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    for ask in (code_revision, lambda: list_files("*.dvc"), lambda: take_in(print, None)):
        with pytest.raises(InputError, match=r"dubious ownership[\s\S]*git config --global --add safe\.directory"):
            ask()


@pytest.mark.parametrize("locale", ["C", "de_DE.UTF-8", "tr_TR.ISO-8859-9"])
def test_what_git_says_does_not_depend_on_the_locale(here, monkeypatch, locale):
    for name in ("LANG", "LC_ALL", "LANGUAGE"):
        monkeypatch.setenv(name, locale)
    (here / "größe 1.dvc").write_text("outs\n")
    assert "größe 1.dvc" in list_files("*.dvc", untracked=True)
    (here / ".git").rename(here / "elsewhere")
    with pytest.raises(InputError, match="is not a git repository"):
        list_files("*.dvc")


def test_before_the_first_commit_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    assert code_revision() == {}


def test_a_repository_that_git_cannot_read_is_an_error_and_not_an_empty_answer(here):
    (here / ".git/HEAD").write_text("broken")
    for ask in (code_revision, lambda: list_files("*.dvc")):
        with pytest.raises(InputError, match=r"`git .*` failed: fatal: "):
            ask()


def test_files_are_listed_by_their_names_whatever_is_in_them(here):
    (here / "größe 1.dvc").write_text("outs\n")
    (here / "params.yaml").unlink()
    assert list_files("*.dvc") == []
    assert set(list_files("*.dvc", untracked=True)) == {"größe 1.dvc", "photos.dvc"}
    made = commit_workspace("retrained", "once")
    assert "größe 1.dvc" in git("ls-tree", "-r", "-z", "--name-only", made["git.revision"]).split("\0")
