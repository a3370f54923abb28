"""Text for people: from file names, captions and records, made harmless for what shows it; and numbers in words."""

import re


def plain(text: str) -> str:
    """Return text for a terminal: characters that steer it, or reorder the line, become escapes such as \\x1b."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def counted(count: int, noun: str, verb: str = "") -> str:
    """Return how many there are in words: "1 class", "2 classes", with the verb "are" "1 class is"."""
    if count != 1:
        noun += "es" if noun.endswith("s") else "s"
    be = {"are": "is", "were": "was"}.get(verb, verb) if count == 1 else verb
    return f"{count} {noun} {be}".rstrip()


def markdown(text: str) -> str:
    """Return text for a Markdown page, on one line: it shows as it is, and neither loads nor links anything."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))
