"""Versions that cannot be judged."""

import pytest

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Params, Registry
from vlmdiff.registry.promotion import gate
from vlmdiff.registry.store import open_store


def test_a_version_without_a_run_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    params = Params(registry=Registry(tracking_uri="sqlite:///mlflow.db"))
    with open_store(params.registry) as client:
        client.create_registered_model(params.registry.model_name)
        client.create_model_version(params.registry.model_name, str(tmp_path))
    with pytest.raises(InputError, match="version 1 has no run"):
        gate(params, 1)
