"""The captions' contract: one for every image that is learned from, of a sensible length, about what is normal."""

import re
from pathlib import Path

import great_expectations.expectations as gxe
import pandas as pd

from vlmdiff.data.contract import Rule, Verdict, check
from vlmdiff.params import Caption

# What CLIP's text encoder reads of a prompt; a word of English is about 4/3 tokens.
MAX_TOKENS = 77
WORDS_TO_TOKENS = 4 / 3
# "No visible damage" says that there is none, and still teaches the model the word.
DEFECTS = re.compile(
    r"\b(defect\w*|anomal\w+|damaged?|broken|crack(s|ed)?|scratch\w*|dent(s|ed)?|stain(s|ed)?|missing|contaminat\w+"
    r"|corro[ds]\w+|rust\w*|fault\w*|flaw\w*|burrs?)\b",
    re.IGNORECASE,
)
COLUMNS = {"path": object, "caption": object, "words": object, "tokens": object, "defect_words": object}


def validate(frame: pd.DataFrame, params: Caption, out: Path) -> Verdict:
    """Judge the captions of normal train and validation images (the manifest's rows with a column `caption`)."""
    learned = frame[(frame["split"] != "test") & ~frame["is_anomalous"].astype(bool)]
    captions = learned["caption"].astype(object).where(learned["caption"].notna(), None)
    words = captions.map(lambda text: None if text is None else len(text.split()))
    found = captions.map(lambda text: None if text is None else DEFECTS.search(text))
    table = pd.DataFrame(
        {
            "path": learned["path"],
            "caption": captions,
            "words": words,
            "tokens": words.map(lambda count: None if pd.isna(count) else count * WORDS_TO_TOKENS),
            "defect_words": found.map(lambda match: match.group() if match else None),
        }
    ).astype(COLUMNS)
    table = table.where(table.notna(), None)
    return check("captions", {"captions": (table, _rules(params))}, out)


def _rules(params: Caption) -> list[Rule]:
    return [
        Rule(
            "captioned",
            "every normal image that is learned from has a caption",
            "see caption.captioner",
            gxe.ExpectColumnValuesToNotBeNull,
            {"column": "caption"},
        ),
        Rule(
            "length",
            f"a caption has {params.min_words} to {params.max_words} words",
            "mend the captions, or caption.min_words and caption.max_words",
            gxe.ExpectColumnValuesToBeBetween,
            {"column": "words", "min_value": params.min_words, "max_value": params.max_words},
        ),
        Rule(
            "normal_language",
            "no caption of a normal image speaks of defects",
            "look at them: the model would learn that such a thing is normal",
            gxe.ExpectColumnValuesToBeNull,
            {"column": "defect_words"},
            "warning",
        ),
        Rule(
            "tokens",
            f"the text encoder reads a caption to its end ({MAX_TOKENS} tokens, about four for three words)",
            "shorten them: the rest is cut off",
            gxe.ExpectColumnValuesToBeBetween,
            {"column": "tokens", "max_value": MAX_TOKENS},
            "warning",
        ),
    ]
