"""Check the captions: each image that training uses has one, of a sensible length, that mentions no defect."""

import re
from pathlib import Path

import great_expectations.expectations as gxe
import pandas as pd

from vlmdiff.core.params import Caption
from vlmdiff.data.contract import ContractResult, Rule, check_tables

# The length that CLIP's text encoder reads. An English word is about 4/3 tokens.
MAX_TOKENS = 77
WORDS_TO_TOKENS = 4 / 3
# "No visible damage" also matches: it still teaches the model the word.
DEFECTS = re.compile(
    r"\b(defect\w*|anomal\w+|damag\w+|broken|crack(s|ed)?|scratch\w*|dent(s|ed)?|stain(s|ed)?|missing|contaminat\w+"
    r"|corro[ds]\w+|rust\w*|fault\w*|flaw\w*|burrs?|blemish\w*|imperfect\w+|irregularit\w+|deform\w+|chipped"
    r"|torn|wear and tear|signs? of wear|debris|discolou?r\w*)\b",
    re.IGNORECASE,
)
SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+")
QUOTED = 3
COLUMNS = {"path": object, "caption": object, "words": object, "tokens": object, "defect_sentences": object}


def check_captions(frame: pd.DataFrame, params: Caption, out: Path) -> ContractResult:
    """Check the captions of normal training and validation images: the manifest's rows with a column `caption`."""
    learned = frame[(frame["split"] != "test") & ~frame["is_anomalous"].astype(bool)]
    captions = learned["caption"].astype(object).where(learned["caption"].notna(), None)
    words = captions.map(lambda text: None if text is None else len(text.split()))
    table = pd.DataFrame(
        {
            "path": learned["path"],
            "caption": captions,
            "words": words,
            "tokens": words.map(lambda count: None if pd.isna(count) else count * WORDS_TO_TOKENS),
            "defect_sentences": captions.map(lambda text: None if text is None else defect_sentences(text)),
        }
    ).astype(COLUMNS)
    table = table.where(table.notna(), None)
    return check_tables("captions", {"captions": (table, _rules(table, params))}, out)


def defect_sentences(caption: str) -> str | None:
    """Return the sentences of a caption that mention defects, or None if there are none."""
    return " ".join(part for part in SENTENCE_ENDS.split(caption) if DEFECTS.search(part)) or None


def _rules(table: pd.DataFrame, params: Caption) -> list[Rule]:
    faulty = table.dropna(subset="defect_sentences").sort_values("path")[:QUOTED]
    quotes = "; ".join(
        f'{path}: "{text}"' for path, text in zip(faulty["path"], faulty["defect_sentences"], strict=True)
    )
    long = sum(tokens is not None and tokens > MAX_TOKENS for tokens in table["tokens"])
    return [
        Rule(
            "captioned",
            "every normal train and validation image has a caption",
            "Check caption.captioner",
            gxe.ExpectColumnValuesToNotBeNull,
            {"column": "caption"},
        ),
        Rule(
            "length",
            f"a caption has {params.min_words} to {params.max_words} words",
            "Fix the captions, or change caption.min_words and caption.max_words",
            gxe.ExpectColumnValuesToBeBetween,
            {"column": "words", "min_value": params.min_words, "max_value": params.max_words},
        ),
        Rule(
            "normal_language",
            "no caption of a normal image mentions defects",
            f"The model would learn that these are normal: {quotes}",
            gxe.ExpectColumnValuesToBeNull,
            {"column": "defect_sentences"},
            "warning",
        ),
        Rule(
            "tokens",
            f"a caption fits one window of the text encoder ({MAX_TOKENS} tokens, about four per three words)",
            f"{long / max(1, len(table)):.1%} of all captions are longer; raise encode.max_windows to read them whole",
            gxe.ExpectColumnValuesToBeBetween,
            {"column": "tokens", "max_value": MAX_TOKENS},
            "warning",
        ),
    ]
