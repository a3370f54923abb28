"""What was captioned survives: processes killed at any moment, and disks that are full."""

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmdiff.captions.store import CaptionStore

# A captioner that takes its time and logs each image that it was asked for.
CAPTION = """
import sys, time
from pathlib import Path
from vlmdiff.captions.captioners import caption_all
from vlmdiff.captions.store import CaptionStore

class Slow:
    identity = {"captioner": "slow"}
    def caption(self, items):
        for start in range(0, len(items), 2):
            batch = items[start : start + 2]
            for image_id, _ in batch:
                with open(sys.argv[2], "a") as log:
                    log.write(image_id + "\\n")
            time.sleep(float(sys.argv[3]))
            yield {image_id: f"caption of {image_id}" for image_id, _ in batch}

items = [(f"image {i:02}", Path(f"{i:02}.png")) for i in range(40)]
with CaptionStore(Path(sys.argv[1])) as store:
    captions = caption_all(items, Slow(), store)
assert captions == {image_id: f"caption of {image_id}" for image_id, _ in items}
"""

# Puts until it is killed, and says what it has put.
PUT = """
import itertools, sys
from pathlib import Path
from vlmdiff.captions.store import CaptionStore

with CaptionStore(Path(sys.argv[1])) as store:
    for i in itertools.count():
        store.put({f"{sys.argv[2]} {i} {j}": "a caption " * 50 for j in range(8)})
        print(i, flush=True)
"""

# Captions until the disk is full, then says what went wrong and what a new process would find.
FILL = """
import itertools, json, resource, signal, sys
from pathlib import Path
from vlmdiff.captions.store import CaptionStore
from vlmdiff.core.errors import InputError

if limit := int(sys.argv[2]):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
done, error = 0, None
try:
    with CaptionStore(Path(sys.argv[1])) as store:
        for i in itertools.count():
            store.put({str(i): "a caption " * 2000})
            done += 1
except InputError as e:
    error = str(e)
with CaptionStore(Path(sys.argv[1])) as store:
    kept = store.get([str(i) for i in range(done + 1)])
print(json.dumps({"done": done, "error": error, "kept": sorted(map(int, kept))}))
"""


def child(code: str, *args: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_captioning_killed_in_the_middle_goes_on_with_the_rest(tmp_path):
    store, log = tmp_path / "captions.sqlite", tmp_path / "asked"
    first = child(CAPTION, store, log, 0.1)
    while not log.is_file() or len(log.read_text().splitlines()) < 12:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    asked = log.read_text().splitlines()
    log.unlink()
    with CaptionStore(store) as kept:
        assert len(rows(store)) in (len(asked), len(asked) - 2)  # all but the batch that was under way
        assert kept.get(["no such key"]) == {}

    second = child(CAPTION, store, log, 0)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    again = log.read_text().splitlines()
    assert len(again) == 40 - (len(asked) - 2) or len(again) == 40 - len(asked)
    assert set(asked) | set(again) == {f"image {i:02}" for i in range(40)}

    log.unlink()
    third = child(CAPTION, store, log, 0)
    third.communicate(timeout=60)
    assert third.returncode == 0 and not log.exists()


def test_writers_killed_at_any_moment_lose_nothing_that_was_put(tmp_path):
    path = tmp_path / "captions.sqlite"
    moments = random.Random(0)
    put = {}
    for name in "abcdef":
        writer = child(PUT, path, name)
        writer.stdout.readline()
        time.sleep(moments.uniform(0, 0.1))
        writer.kill()
        rest, errors = writer.communicate()
        assert writer.returncode == -signal.SIGKILL, errors
        # A line may have been cut by the kill: the last whole one counts.
        whole = rest[: rest.rfind("\n") + 1].split()
        put[name] = int(whole[-1]) if whole else 0
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    keys = [f"{name} {i} {j}" for name, last in put.items() for i in range(last + 1) for j in range(8)]
    with CaptionStore(path) as store:
        assert set(store.get(keys)) == set(keys)


def test_a_full_disk_keeps_what_was_stored(tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=512k tmpfs "$0" || exit 77; exec "$@"'
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(disk))
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no small file system may be mounted here: {probe.stderr.strip()}")
    assert_kept(child(FILL, disk / "captions.sqlite", 0, prefix=prefix))


def test_a_file_that_may_not_grow_keeps_what_was_stored(tmp_path):
    assert_kept(child(FILL, tmp_path / "captions.sqlite", 512 * 1024))


def assert_kept(process: subprocess.Popen) -> None:
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    result = json.loads(out)
    assert result["done"] > 3
    assert result["kept"] == list(range(result["done"]))
    assert "captions.sqlite" in result["error"] and "disk may be full" in result["error"]


def rows(store: Path) -> list:
    with sqlite3.connect(store) as db:
        return db.execute("SELECT key FROM captions").fetchall()
