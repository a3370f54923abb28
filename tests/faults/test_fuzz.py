"""Mutated files and requests: no crash, no hang, no growth of memory. tests/fuzz.py says what is tried."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fuzz import MEGABYTES, TARGETS, run

NAMES = {target.__name__: target for target in TARGETS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_some_mutated_inputs_are_refused_by_a_sentence(name):
    run(NAMES[name], max(TARGETS[NAMES[name]] // 300, 3))


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_very_many_mutated_inputs_are_refused_by_a_sentence(name, record_property):
    # A process of its own: a reader that crashes ends it.
    command = [sys.executable, "-m", "tests.fuzz", name, str(TARGETS[NAMES[name]])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record_property(f"{name}, {TARGETS[NAMES[name]]} inputs, of at most {MEGABYTES} MB", done.stdout.strip())


def test_a_million_inputs_are_tried():
    assert sum(TARGETS.values()) == 1_000_000
