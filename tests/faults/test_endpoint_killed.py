"""Who is killed while captions are asked for, the endpoint or we: nothing answered is lost, nothing is asked twice."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.endpoint import Endpoint, Reply, caption, completion
from tests.unit.test_caption_endpoint import captioned, expected, photographs
from vlmdiff.core.errors import InputError

COUNT = 30
OURS = """
import sys
from pathlib import Path
from tests.unit.test_caption_endpoint import captioned, photographs
captioned(photographs(Path(sys.argv[1]), 30), Path(sys.argv[1]), sys.argv[2], concurrency=3)
"""


def serve(port: int, log: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.endpoint", str(port), str(log)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_an_endpoint_killed_half_way_is_asked_for_the_rest_only(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    frame = photographs(tmp_path, COUNT)
    with serve(port, first) as endpoint:

        def kill() -> None:
            while len(first.read_text().splitlines()) < 9:
                time.sleep(0.005)
            endpoint.kill()

        threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(InputError, match="no caption in 4 attempt"):
            captioned(frame, tmp_path, f"http://127.0.0.1:{port}/v1", concurrency=3)
    assert endpoint.returncode == -signal.SIGKILL
    answered = first.read_text().split()
    assert 9 <= len(answered) < COUNT
    with serve(port, second) as endpoint:
        assert captioned(frame, tmp_path, f"http://127.0.0.1:{port}/v1", concurrency=3) == expected(COUNT)
        endpoint.kill()
    again = second.read_text().split()
    # An answer may have been sent and not been logged when the kill came; none was logged twice.
    assert len(set(answered) & set(again)) == 0
    assert len(set(answered) | set(again)) >= COUNT - 3


def test_captioning_killed_half_way_asks_again_only_for_what_was_under_way(tmp_path):
    def behave(number: int, _: int) -> Reply:
        time.sleep(0.05)
        return completion(caption(number))

    with Endpoint(behave) as endpoint:
        ours = subprocess.Popen([sys.executable, "-c", OURS, str(tmp_path), endpoint.url])
        while len(endpoint.answered) < 9:
            assert ours.poll() is None
            time.sleep(0.005)
        ours.kill()
        assert ours.wait() == -signal.SIGKILL
        frame = photographs(tmp_path, COUNT)
        assert captioned(frame, tmp_path, endpoint.url, concurrency=3) == expected(COUNT)
        times = Counter(endpoint.asked)
        assert sorted(times) == list(range(COUNT))
        assert max(times.values()) <= 2 and sum(times.values()) <= COUNT + 3
