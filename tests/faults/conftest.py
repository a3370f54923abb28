"""What an attacker sends, written once."""

import pytest

from tests.hostile import write_faults


@pytest.fixture(scope="session")
def faults(once):
    """The folder that ../shared/faults/make.py writes. Not to be changed."""
    return once("hostile", write_faults)
