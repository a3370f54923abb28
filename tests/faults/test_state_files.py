"""Files that keep state: absent, empty, truncated or filled with garbage, each command says which and what to do."""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import Workspace
from vlmdiff.core.errors import InputError

HOWS = ("absent", "empty", "a quarter", "half", "three quarters", "garbage")
# Of a model, which lists the hashes of its files.
ONE_BYTE = "one byte"
MODEL = ("--model", "models/detector")
MONITOR = ("monitor", "scores", *MODEL, "--out", "drift")
SCORE = ("score", "data/made/cable/test/good", *MODEL, "--out", "scored")
# Of each file the commands that read it.
FILES = {
    "params.yaml": (("gate",), ("prepare",)),
    "dvc.lock": (("register",),),
    "data/manifest.parquet": (("validate",), ("caption",), ("encode",)),
    "data/captions/captions.jsonl": (("encode",), ("evaluate",)),
    "data/encoded/index.parquet": (("train",),),
    "data/encoded/mean.npy": (("train",),),
    "data/encoded/text_encoder/config.json": (("train",),),
    "models/first_stage/config.json": (("encode",),),
    "models/first_stage/diffusion_pytorch_model.safetensors": (("encode",),),
    "models/vlmdiff/model_index.json": (("evaluate",),),
    "models/vlmdiff/unet/diffusion_pytorch_model.safetensors": (("evaluate",),),
    "models/detector/detector.json": (SCORE, MONITOR),
    "models/detector/vae/diffusion_pytorch_model.safetensors": (SCORE,),
    "models/detector/reference.parquet": (MONITOR,),
    "reports/evaluation/metrics.json": (("results",), ("gate",), ("register",)),
    "reports/evaluation/judged.json": (("gate",),),
    "reports/evaluation/samples.npz": (("gate",),),
    "reports/evaluation/report.json": (("gate",),),
}


@pytest.fixture(scope="module")
def place(tiny_line, tmp_path_factory) -> Workspace:
    """A tiny line that has scored its test images. A test restores what it damages."""
    path = tmp_path_factory.mktemp("place") / "workspace"
    shutil.copytree(tiny_line.path, path, symlinks=True)
    workspace = Workspace(path)
    workspace.vlmdiff("score", "data/made/cable/test", *MODEL, "--out", "scores")
    return workspace


def damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    # DVC's own files are links to its cache, and not to be written through.
    file.unlink()
    if how == ONE_BYTE:
        place = len(whole) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    elif how == "garbage":
        file.write_bytes(os.urandom(max(len(whole), 100)))
    elif how != "absent":
        share = {"empty": 0, "a quarter": 1, "half": 2, "three quarters": 3}[how]
        file.write_bytes(whole[: len(whole) * share // 4])


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_file_is_named_with_what_to_do_and_the_status_is_2(place, made_store, name):
    file, kept = place.path / name, place.path.parent / "kept"
    shutil.copy(file, kept)
    wrong = []
    for how in (*HOWS, *([ONE_BYTE] if name.startswith(("models/vlmdiff", "models/detector")) else [])):
        if name == "params.yaml" and how in ("empty", "a quarter", "half", "three quarters"):
            continue  # a shorter file of parameters is a whole one: what it leaves out has defaults
        for command in FILES[name]:
            shutil.copy(made_store, place.path)
            damage(file, how)
            try:
                done = place.vlmdiff(*command, check=False)
                said = " ".join(done.stdout.split())
                # A folder of a model is damaged as a whole; its stage writes it again.
                named = any(str(path) in said for path in (Path(name), *list(Path(name).parents)[:2]))
                if done.returncode != 2 or not named or "error: " not in said:
                    wrong.append(f"{command[0]}, {how}: status {done.returncode}: {said[-300:]}")
            except BaseException as error:
                assert not isinstance(error, KeyboardInterrupt)
                wrong.append(f"{command[0]}, {how}: {type(error).__name__}: {str(error)[:200]}")
            finally:
                file.unlink(missing_ok=True)
                shutil.copy(kept, file)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_record_of_a_server_is_named_and_the_server_counts_as_ended(tmp_path, monkeypatch, capsys, how):
    from flows import servers

    monkeypatch.chdir(tmp_path)
    servers.STATE.mkdir(parents=True)
    record = servers.STATE / "prefect.json"
    record.write_text('{"name": "prefect", "url": "http://127.0.0.1:1", "pid": 1, "command": ["x"]}\n')
    damage(record, how)
    assert servers.find("prefect") is None
    assert ("prefect.json is damaged and ignored" in capsys.readouterr().err) == (how != "absent")
    servers.down()
    assert not list(servers.STATE.iterdir())


def test_two_ups_at_once_take_turns(tmp_path, monkeypatch):
    from flows import servers
    from vlmdiff.core.locks import hold

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(servers, "START_TIMEOUT", 0.0)
    with hold(servers.LOCK, "the servers", by="the first `up`"), pytest.raises(InputError, match="the first `up`"):
        servers.up()
    assert not servers.STATE.exists()
