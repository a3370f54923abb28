"""Locks between processes: who waits learns who holds, and a holder that is killed holds nothing."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vlmdiff.core.errors import InputError
from vlmdiff.core.locks import hold

HOLDER = """\
import sys
from pathlib import Path
from vlmdiff.core.locks import hold

with hold(Path(sys.argv[1]), "the folder", by="the run 'first'"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "folder/lock"


@contextmanager
def held(lock) -> Iterator[subprocess.Popen]:
    """Another process holds the lock; it ends with the block."""
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def test_without_a_limit_the_second_one_is_told_at_once_who_holds_what_since_when(lock):
    with held(lock) as holder:
        since = json.loads((lock.parent / ".lock.json").read_text())["since"]
        who = rf"the run 'first' \(process {holder.pid}, since {since}\) holds the folder: wait"
        with pytest.raises(InputError, match=who), hold(lock, "the folder"):
            pass


def test_a_stopped_holder_is_named_when_the_limit_is_over(lock, capsys):
    with held(lock) as holder:
        holder.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        who = f"the run 'first' .process {holder.pid}, since .* holds the folder"
        with pytest.raises(InputError, match=f"{who}.*waited 4 s"), hold(lock, "the folder", limit=4):
            pass
        assert time.monotonic() - began >= 4
        # Before that, the console says whom it waits for.
        said = capsys.readouterr().out
        assert said.startswith("waiting: the run 'first'") and str(holder.pid) in said


def test_after_a_kill_the_next_one_holds_it_at_once(lock):
    with held(lock) as holder:
        holder.send_signal(signal.SIGSTOP)
        holder.kill()
        holder.wait()
        with hold(lock, "the folder", by="the run 'second'"):
            assert json.loads((lock.parent / ".lock.json").read_text())["by"] == "the run 'second'"
            with pytest.raises(InputError, match="the run 'second'"), hold(lock, "the folder"):
                pass


def test_who_waits_goes_on_when_the_holder_is_done(lock):
    with held(lock) as holder:
        holder.stdin.close()
        with hold(lock, "the folder", limit=20):
            pass


def test_a_command_is_named_by_its_command_line_and_leaves_no_name(lock, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/vlmdiff", "score", "a.png"])
    with (
        hold(lock, "the folder"),
        pytest.raises(InputError, match=r"^`vlmdiff score a\.png` "),
        hold(lock, "the folder"),
    ):
        pass
    assert [file.name for file in lock.parent.iterdir() if file.suffix == ".json"] == []


def test_a_holder_that_has_not_named_itself_is_another_process(lock):
    with held(lock):
        (lock.parent / ".lock.json").unlink()
        with pytest.raises(InputError, match=r"^another process holds the folder"), hold(lock, "the folder"):
            pass
