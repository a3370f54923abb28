"""The captions' contract: what stops the line, what is only told, and with which words."""

import json

import pandas as pd
import pytest

from vlmdiff.captions.contract import check_captions, defect_sentences
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Caption

FINE = "A round red disc lies in the middle of a white background."


def verdict(tmp_path, *captions, **params):
    """On normal training images with these captions, and a test image without."""
    rows = [
        {"path": f"thing/train/good/{i}.png", "split": "train", "is_anomalous": False, "caption": caption}
        for i, caption in enumerate(captions)
    ]
    rows.append({"path": "thing/test/hole/0.png", "split": "test", "is_anomalous": True, "caption": None})
    return check_captions(pd.DataFrame(rows), Caption(**params), tmp_path / "report")


def test_good_captions_pass_in_silence(tmp_path, capsys):
    verdict(tmp_path, FINE, FINE).raise_if_failed()
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("caption", "rule"), [(None, "captioned"), ("A disc.", "length"), (" ".join(["disc"] * 121), "length")]
)
def test_a_caption_that_lacks_or_is_out_of_bounds_stops_the_line_and_names_the_image(tmp_path, caption, rule):
    with pytest.raises(InputError, match=rf"{rule} \(.*broken by 1: thing/train/good/1\.png"):
        verdict(tmp_path, FINE, caption).raise_if_failed()


def test_the_sentence_that_speaks_of_a_defect_is_quoted_in_a_warning(tmp_path, capsys):
    first = "The disc is red. No scratches are visible on it! It is round."
    verdict(tmp_path, FINE, first, "A cracked blue disc. It shines.").raise_if_failed()
    said = capsys.readouterr().out
    assert 'good/1.png: "No scratches are visible on it!"; thing/train/good/2.png: "A cracked blue disc."' in said
    assert "It is round" not in said and "It shines" not in said
    findings = json.loads((tmp_path / "report/validation.json").read_text())["findings"]
    (language,) = (finding for finding in findings if finding["rule"] == "normal_language")
    assert language["count"] == 2 and "No scratches" in language["remedy"]


@pytest.mark.parametrize(
    "word", ["damage", "defects", "anomalous", "Scratched", "imperfections", "wear and tear", "discoloration"]
)
def test_words_for_defects_are_known(word):
    assert defect_sentences(f"It is red. There is no {word} here. It is round.") == f"There is no {word} here."


@pytest.mark.parametrize(
    "text", [FINE, "A dentist's mirror with a crust-brown handle, worn by nobody.", "Identical parts."]
)
def test_other_words_are_no_defects(text):
    assert defect_sentences(text) is None


def test_the_share_of_long_captions_is_told(tmp_path, capsys):
    # 57 words are 76 tokens by the rule of thumb, 58 are 77.3.
    verdict(tmp_path, *[" ".join(["disc"] * 57)] * 3, " ".join(["disc"] * 58)).raise_if_failed()
    assert "25.0% of all captions are longer" in capsys.readouterr().out
