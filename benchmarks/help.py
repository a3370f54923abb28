"""Measure the start-up time of `vlmdiff --help`, compared with `import typer` alone; best of ten runs."""

import subprocess
import sys
import time
from pathlib import Path


def seconds(*command: str) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    command = str(Path(sys.executable).with_name("vlmdiff"))
    typer, ours = seconds(sys.executable, "-c", "import typer"), seconds(command, "--help")
    print(f"import typer {typer:.2f} s, vlmdiff --help {ours:.2f} s: {ours / typer:.1f} times")
