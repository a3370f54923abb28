"""Tiny checkpoints that several files read, and none changes."""

from functools import partial

import pytest

from tests.backbones import save_backbone
from tests.tiny import tiny_backbone, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A family's name to the folder of its tiny checkpoint."""
    return partial(save_backbone, tmp_path_factory.mktemp("families"))
