"""Text for people: from file names, captions and records, made harmless for what shows it; and numbers in words."""

import re


def plain(text: str) -> str:
    """Return text for a terminal: characters that steer it, or reorder the line, become escapes such as \\x1b."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def classes(count: int) -> str:
    """Return how many classes there are, in words."""
    return "1 class" if count == 1 else f"{count} classes"


def markdown(text: str) -> str:
    """Return text for a Markdown page, on one line: it shows as it is, and neither loads nor links anything."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))
