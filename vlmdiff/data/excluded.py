"""Images that people took out of the dataset without deleting them: a log in the dataset's folder, with the reasons."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.locks import hold
from vlmdiff.data import log

# In `prepare.root`, so that the data's hash covers it.
FILE = "excluded.jsonl"
KEYS = ("image_id", "path", "excluded", "why")
# Seconds to wait for another person.
LIMIT = 60.0


def decisions(root: Path) -> dict[str, dict[str, Any]]:
    """Return the decision that holds on each image, by its id. Raises InputError if the log is damaged."""
    rows = log.latest(log.read(root / FILE, KEYS))
    return {image_id: row for image_id, row in rows.items() if row["excluded"] is not None}


def excluded(root: Path) -> set[str]:
    """Return the ids of the images that `prepare` leaves out."""
    return {image_id for image_id, row in decisions(root).items() if row["excluded"]}


def decide(images: Sequence[tuple[str, str]], is_excluded: bool | None, why: str, by: str, root: Path) -> None:
    """Record that images, pairs of id and path, stay out of the dataset, or stay in it, or are undecided, and why.

    The next `prepare` follows. Raises InputError without a reason or a name, or if the log is damaged.
    """
    if not why.strip() or not by.strip():
        raise InputError("say who decides, and why")
    new = [dict(zip(KEYS, (*image, is_excluded, why.strip()), strict=True)) for image in images]
    with hold(w.FEEDBACK_LOCK, f"the feedback of {root}", LIMIT):
        log.append(root / FILE, log.read(root / FILE, KEYS), new, by.strip())
