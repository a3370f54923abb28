"""params.yaml: what is refused, and that the error names the file and the key."""

import pytest

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Params, load


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stepz: 5}", ["train.stepz", "unknown key"]),
        ("tarin: {steps: 5}", ["tarin", "unknown key"]),
        ("train: {steps: 0}", ["train.steps", "0"]),
        ("train: {steps: many}", ["train.steps", "many"]),
        ("gate: {margin: .nan}", ["gate.margin"]),
        ("gate: {floors: {au_pro: {mean: 1.5}}}", ["gate.floors.au_pro.mean", "1.5"]),
        ("caption: {captioner: {kind: file}}", ["caption.captioner", "file"]),
        ("caption: {captioner: {kind: oracle}}", ["caption.captioner", "oracle", "describe"]),
        ("caption: {captioner: {kind: transformers, model: a/b, revision: main}}", ["revision", "main"]),
        ("caption: {captioner: {kind: openai, model: m, base_url: 127.0.0.1/v1}}", ["base_url", "127.0.0.1"]),
        ("caption: {captioner: {kind: openai, model: m, base_url: http://a/v1, api_key: x}}", ["unknown key"]),
        ("first_stage: {image_size: 30}", ["first_stage", "image_size"]),
        ("first_stage: {steps: 0}", ["first_stage", "pretrained"]),
        ("encode: {text_encoder: {kind: pretrained}}", ["encode.text_encoder.pretrained.model", "required"]),
        ("train: {trainable: paper}", ["train", "pretrained"]),
        ("train: {sgn: true, hint_channels: [8, 16]}", ["train.hint_channels", "2 entries", "4 times smaller"]),
        (
            "{first_stage: {kind: backbone, image_size: 256}, train: {sgn: true}}",
            ["train.hint_channels", "3 entries", "8 times smaller"],
        ),
        ("evaluate: {detection: {features: []}}", ["evaluate.detection.features"]),
        ("evaluate: {detection: {features: [{kind: magic}]}}", ["magic"]),
        ("evaluate: {detection: {noise_level: 5, steps: 6}}", ["evaluate.detection", "steps", "noise_level"]),
        ("evaluate: {detection: {noise_level: 700}}", ["evaluate.detection", "700", "train.noise_levels"]),
        ("evaluate: {detection: {steps: 2}}", ["125 to 250", "train.noise_levels"]),
        ("train: {noise_levels: [600, 400]}", ["train.noise_levels", "lowest"]),
        ("evaluate: {detection: {solver: euler}}", ["evaluate.detection.solver", "euler"]),
        ("train: [", ["not valid YAML"]),
        ("just text", ["whole file"]),
    ],
)
def test_a_bad_file_is_an_error_that_names_file_and_key(tmp_path, text, words):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load(file)
    for word in ["params.yaml", *words]:
        assert word in str(error.value)


def test_a_missing_file_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="--params"):
        load(tmp_path / "params.yaml")


def test_what_is_not_given_has_its_default(tmp_path):
    (tmp_path / "params.yaml").write_text("")
    assert load(tmp_path / "params.yaml") == Params()
