"""Captions by vision-language models of `transformers`: three families, from files on disk into the store."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

from tests.vlms import FAMILIES
from vlmdiff.captions.captioners import caption_images
from vlmdiff.captions.model import FromModel, SeededSampling
from vlmdiff.captions.prompts import PROMPTS
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Caption, VisionLanguageModel

PROMPT = "What is it?"
LIMIT = 8


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    """A checkpoint's folder."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    FAMILIES[request.param](folder)
    return folder


@pytest.fixture
def llava(tmp_path) -> Path:
    FAMILIES["llava"](tmp_path / "llava")
    return tmp_path / "llava"


def photographs(root: Path, count=5) -> pd.DataFrame:
    """Manifest rows of noise, each of another shape."""
    rows = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40 + 24 * i, 3), dtype=np.uint8)
        file = root / f"thing/train/good/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        image_id = hashlib.sha256(file.read_bytes()).hexdigest()
        rows.append({"image_id": image_id, "path": str(file.relative_to(root)), "split": "train"})
    return pd.DataFrame(rows).assign(is_anomalous=False)


def captioned(frame: pd.DataFrame, root: Path, model: Path, store="captions.sqlite", **settings) -> list[str]:
    captioner = {"kind": "transformers", "model": str(model), "prompt": PROMPT, "max_new_tokens": LIMIT, **settings}
    params = Caption(captioner=captioner)
    return caption_images(frame, root, root, params, 10**8, root / store)["caption"].tolist()


def by_hand(processor: tf.ProcessorMixin, network: tf.PreTrainedModel, file: Path) -> str:
    """A greedy answer one token at a time, the whole prompt read anew for each."""
    image = Image.open(file)
    if processor.chat_template:
        content = [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        inputs = processor(images=image, text=PROMPT, return_tensors="pt")
    answer = []
    for _ in range(LIMIT - 1):  # the last is forced to be the end
        with torch.no_grad():
            token = network(**inputs, use_cache=False).logits[0, -1].argmax()
        if token == processor.tokenizer.eos_token_id:
            break
        answer.append(token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token.view(1, 1)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_a_caption_is_the_models_answer_and_nothing_of_the_prompt(family, tmp_path):
    frame = photographs(tmp_path, 3)
    captions = captioned(frame, tmp_path, family)
    model = tf.AutoProcessor.from_pretrained(family), tf.AutoModelForImageTextToText.from_pretrained(family)
    assert captions == [by_hand(*model, tmp_path / path) for path in frame["path"]]
    assert len(set(captions)) == len(captions)


def test_an_image_is_captioned_alike_in_any_batch(family, tmp_path):
    frame = photographs(tmp_path)
    alone, three, all_at_once = (
        captioned(frame, tmp_path, family, f"{size}.sqlite", batch_size=size) for size in (1, 3, 8)
    )
    assert alone == three == all_at_once


def test_a_rerun_asks_for_nothing_and_a_changed_prompt_for_everything(family, tmp_path, capsys):
    frame = photographs(tmp_path)
    first = captioned(frame, tmp_path, family)
    assert "5 requested" in capsys.readouterr().out
    assert captioned(frame, tmp_path, family) == first
    assert "5 from the store, 0 requested" in capsys.readouterr().out
    other = captioned(frame, tmp_path, family, prompt="Where is it, and of what?")
    assert "0 from the store, 5 requested" in capsys.readouterr().out
    assert other != first
    captioned(frame, tmp_path, family, batch_size=2, dtype="float32", device_map="cpu", max_new_tokens=LIMIT + 1)
    assert "0 requested" in capsys.readouterr().out


def test_what_is_stored_needs_no_model(llava, tmp_path, monkeypatch):
    frame = photographs(tmp_path)
    first = captioned(frame, tmp_path, llava)

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(tf.AutoModelForImageTextToText, "from_pretrained", load)
    assert captioned(frame, tmp_path, llava) == first


def test_a_folder_is_known_by_its_files_wherever_it_lies(llava, tmp_path, capsys):
    frame = photographs(tmp_path)
    captioned(frame, tmp_path, llava)
    shutil.copytree(llava, tmp_path / "elsewhere")
    captioned(frame, tmp_path, tmp_path / "elsewhere")
    assert "0 requested" in capsys.readouterr().out
    model = tf.LlavaForConditionalGeneration.from_pretrained(llava)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.save_pretrained(llava)
    captioned(frame, tmp_path, llava)
    assert "5 requested" in capsys.readouterr().out


def test_sampled_captions_are_the_seeds_and_no_batchs(llava, tmp_path):
    frame = photographs(tmp_path)

    def sampled(store, **settings):
        return captioned(frame, tmp_path, llava, store, temperature=2.0, **settings)

    first = sampled("a", batch_size=1)
    assert sampled("b", batch_size=4) == first
    assert sampled("c", seed=1) != first and captioned(frame, tmp_path, llava) != first


def test_sampling_draws_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = 4000
    scores = SeededSampling(1.7, [str(i) for i in range(draws)])(torch.zeros(draws, 1), logits.expand(draws, 4))
    counts = np.bincount(scores.argmax(1), minlength=4)
    assert stats.chisquare(counts, draws * torch.softmax(logits.double() / 1.7, 0).numpy()).pvalue > 0.001


def test_an_answer_that_was_cut_is_no_caption_and_the_others_are_kept(llava, tmp_path, capsys):
    """Without the forced end, only those are whole that ended by themselves."""
    frame = photographs(tmp_path)
    settings = llava / "generation_config.json"
    content = json.loads(settings.read_text())
    del content["forced_eos_token_id"]
    settings.write_text(json.dumps(content))
    model = FromModel(
        VisionLanguageModel(kind="transformers", model=str(llava), max_new_tokens=4, prompt=PROMPT), 10**8
    )
    whole, cut = {}, None
    try:
        for captions in model.caption([(row.image_id, tmp_path / row.path) for row in frame.itertuples()]):
            whole |= captions
    except InputError as error:
        cut = str(error)
    assert 0 < len(whole) < 5
    assert f"{5 - len(whole)} image(s) got no caption" in cut and "max_new_tokens" in cut
    for row in frame.itertuples():
        assert (row.path in cut) == (row.image_id not in whole)


def test_a_name_on_the_hub_needs_a_commit(tmp_path):
    with pytest.raises(InputError, match=r"caption\.captioner\.revision: 'some/model' .* commit's hash"):
        captioned(photographs(tmp_path, 1), tmp_path, Path("some/model"))


def test_a_folder_has_no_revision(llava, tmp_path):
    with pytest.raises(InputError, match=r"revision: .*llava is a local folder"):
        captioned(photographs(tmp_path, 1), tmp_path, llava, revision="0" * 40)


def test_code_that_comes_with_a_model_is_not_run(llava, tmp_path):
    """Reference defect 17: remote code at no fixed revision."""
    trap = tmp_path / "ran"
    (llava / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((llava / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (llava / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot load the model"):
        captioned(photographs(tmp_path, 1), tmp_path, llava)
    assert not trap.exists()


def test_pickled_weights_are_refused(llava, tmp_path):
    weights = llava / "model.safetensors"
    torch.save(tf.LlavaForConditionalGeneration.from_pretrained(llava).state_dict(), llava / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(InputError, match="cannot load the model"):
        captioned(photographs(tmp_path, 1), tmp_path, llava)


def test_weights_that_lack_are_named(llava, tmp_path):
    weights = load_file(llava / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    del weights[name]
    save_file(weights, llava / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 of the model's tensors"):
        captioned(photographs(tmp_path, 1), tmp_path, llava)


def test_the_papers_prompts_have_names(tmp_path):
    def prompt(**settings):
        return FromModel(VisionLanguageModel(kind="transformers", model=str(tmp_path), **settings), 1).identity[
            "prompt"
        ]

    assert "main object" in prompt() and "60 words" in prompt()
    assert prompt(prompt="paper-no-object") == prompt().replace(" with a focus on the main object", "")
    assert prompt(prompt="inspector") == PROMPTS["inspector"]
    assert prompt(prompt="papers") == "papers"
