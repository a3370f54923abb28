"""Under load: many requests at once, many photographs; nothing is lost, nothing twice, and memory stays flat.

`make endurance` runs the long ones. VLMDIFF_LOAD_SECONDS and VLMDIFF_LOAD_IMAGES change how long.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from tests.pipeline.test_handover import bad_requests, champion, encoded, server  # noqa: F401
from tests.tiny import save_tiny_detector

SECONDS = float(os.environ.get("VLMDIFF_LOAD_SECONDS", "300"))
IMAGES = int(os.environ.get("VLMDIFF_LOAD_IMAGES", "100000"))
CLIENTS = 200


def megabytes(processes: list[psutil.Process]) -> float:
    return sum(process.memory_info().rss for process in processes if process.is_running()) / 1e6


@pytest.mark.endurance
@pytest.mark.timeout(0)
def test_of_many_requests_at_once_no_valid_one_is_lost(champion, server, record_property):  # noqa: F811
    port = server.url.rpartition(":")[2]
    family = [each for each in psutil.process_iter(["cmdline"]) if port in " ".join(each.info["cmdline"] or [])]
    files = [file.read_bytes() for file in champion.files]
    expected = [row["score"] for row in server.ask([encoded(data) for data in files])]
    bad = [(rows, params) for name, (rows, params, _) in bad_requests(files[0]).items() if len(rows) < 100]
    memory, end = [], time.monotonic() + SECONDS

    def client(seed: int) -> list[tuple[str, float]]:
        choice, seen = random.Random(seed), []
        while time.monotonic() < end:
            began = time.monotonic()
            if choice.random() < 0.5:
                number = choice.randrange(len(files))
                answer = server.post([encoded(files[number])])
                right = (
                    answer.status_code == 200
                    and abs(answer.json()["predictions"][0]["score"] - expected[number]) < 1e-5
                )
                seen.append(("valid" if right else f"lost: {answer.status_code}", time.monotonic() - began))
            else:
                rows, params = choice.choice(bad)
                status = server.post(rows, **params).status_code
                seen.append(("refused" if 400 <= status < 500 else f"wrong: {status}", time.monotonic() - began))
        return seen

    with ThreadPoolExecutor(CLIENTS) as clients:
        running = [clients.submit(client, seed) for seed in range(CLIENTS)]
        while not all(each.done() for each in running):
            memory.append(megabytes(family))
            time.sleep(1)
    seen = [row for each in running for row in each.result()]
    counts = Counter(kind for kind, _ in seen)
    valid = np.array([seconds for kind, seconds in seen if kind == "valid"])
    quarter = max(len(memory) // 4, 1)
    before, after = max(memory[quarter : 2 * quarter], default=memory[0]), max(memory[-quarter:])
    record_property(f"{CLIENTS} clients for {SECONDS:g} s, requests", dict(counts))
    record_property("seconds of a valid request, p50 and p95", np.round(np.percentile(valid, [50, 95]), 2).tolist())
    record_property("MB of the server in the second quarter and in the last", (round(before), round(after)))
    assert set(counts) == {"valid", "refused"}
    assert after < before * 1.1 + 50


def score_and_kill(place: Path, count: int, kills: int) -> list[float]:
    """Judge so many photographs, killed so many times meanwhile; return the process's memory over time, in MB."""
    generator = np.random.default_rng(0)
    (place / "some").mkdir()
    for number in range(min(count, 100)):
        pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"some/{number}.bmp")
    for number in range(count):
        folder = place / f"many/{number // 1000}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(place / f"some/{number % 100}.bmp", folder / f"{number}.bmp")
    (place / "params.yaml").write_text("{}")
    command = [sys.executable, "-m", "vlmdiff.cli", "score", "many", "--out", "out"]
    command += ["--model", str(save_tiny_detector(place / "model"))]

    def parts() -> int:
        return len(list((place / "out").glob("part-*")))

    memory: list[float] = []
    for attempt in range(kills + 1):
        before = parts()
        with (place / "log").open("w") as log:
            process = psutil.Popen(command, cwd=place, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        while process.poll() is None:
            # Each attempt gets some way, and the last one to the end.
            if attempt < kills and parts() > before + count // 256 // (2 * kills):
                process.kill()
            memory.append(megabytes([process]) if process.poll() is None else memory[-1])
            time.sleep(0.02 if count < 10_000 else 0.5)
        assert process.wait() == (0 if attempt == kills else -9), (place / "log").read_text()
    return memory


@pytest.mark.services
def test_of_photographs_that_are_scored_and_killed_again_and_again_each_has_one_row(tmp_path):
    score_and_kill(tmp_path, 1200, kills=2)
    assert_each_once(tmp_path, 1200)


def assert_each_once(place: Path, count: int) -> None:
    rows = pd.read_parquet(place / "out", columns=["path", "score", "error"])
    assert len(rows) == count and rows["path"].is_unique and rows["error"].isna().all()
    # The same photograph has the same score under each of its names.
    numbers = rows["path"].map(lambda path: int(Path(path).stem) % 100)
    assert rows.groupby(numbers)["score"].agg(lambda scores: scores.max() - scores.min()).max() < 1e-5


@pytest.mark.endurance
@pytest.mark.timeout(0)
def test_a_hundred_thousand_photographs_are_scored_with_flat_memory_and_ten_kills(tmp_path, record_property):
    memory = score_and_kill(tmp_path, IMAGES, kills=10)
    assert_each_once(tmp_path, IMAGES)
    # The last attempt judges about half of them.
    last = memory[len(memory) // 2 :]
    quarter = len(last) // 4
    before, after = max(last[quarter : 2 * quarter]), max(last[-quarter:])
    record_property(f"MB of `score` on {IMAGES} images, in the middle and at the end", (round(before), round(after)))
    assert after < before * 1.1 + 50
