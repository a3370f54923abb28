"""What dvc.lock records is read as it should be, or the file is named."""

import pytest
import yaml

from vlmdiff.core.dvc import read_lock
from vlmdiff.core.errors import InputError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(stages) -> None:
    with open("dvc.lock", "w") as file:
        yaml.safe_dump({"schema": "2.0", "stages": stages}, file)


def test_hashes_are_by_path_and_code_is_left_out():
    read = [{"path": "vlmdiff/cli.py", "md5": "c", "size": 1}, {"path": "data/raw", "md5": "a.dir", "nfiles": 2}]
    write({"prepare": {"deps": read, "outs": [{"path": "data/manifest.parquet", "md5": "b"}]}})
    assert read_lock() == {"data/raw": "a.dir", "data/manifest.parquet": "b"}


@pytest.mark.parametrize(
    "stages",
    [
        [],
        3,
        {"prepare": None},
        {"prepare": {"deps": 3}},
        {"prepare": {"deps": ["data/raw"]}},
        {"prepare": {"deps": [{"path": 3, "md5": "a"}]}},
        {"prepare": {"outs": [{"path": "data/raw", "md5": None}]}},
        {"prepare": {"outs": [{"path": "data/raw"}]}},
        {"prepare": {"params": {"params.yaml": ["prepare"]}}},
    ],
    ids=str,
)
def test_a_lock_of_another_form_is_named(stages):
    write(stages)
    with pytest.raises(InputError, match=r"dvc.lock is damaged \(stages.*Restore it by `git checkout dvc.lock`"):
        read_lock()
