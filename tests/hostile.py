"""What an attacker sends: the inputs of ../shared/faults/make.py, where it is there, and markup in every language."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAKE = ROOT.parent / "shared/faults/make.py"


def write_faults(folder: Path) -> None:
    """Write damaged and dangerous files; skip the test where the program that writes them is absent."""
    if not MAKE.is_file():
        pytest.skip(f"{MAKE} is not here")
    subprocess.run([sys.executable, str(MAKE), str(folder)], check=True, capture_output=True)
