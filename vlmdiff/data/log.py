"""Logs of what people said: a JSON object a line, appended to and never rewritten."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlmdiff.core.console import say
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_path


def read(file: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a log. A last line that was cut off is ignored. Without a file, the list is empty.

    keys: those of a row, besides `by` and `when`. Raises InputError for any other damage.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in (*keys, "by", "when")})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                say(f"warning: {file}: the last line was cut off and is removed: {line.decode(errors='replace')}")
            elif line.strip():
                raise InputError(
                    f"{file}, line {number}: not a line of feedback ({error!r}): fix or remove it"
                ) from None
    return rows


def append(file: Path, rows: list[dict[str, Any]], new: Sequence[dict[str, Any]], by: str) -> None:
    """Write a log whole: `rows`, as `read` gives them, and the new ones of which it does not say the same already."""
    record = {"by": by, "when": datetime.now(UTC).isoformat(timespec="seconds")}
    said = latest(rows)
    added = [row | record for row in new if not row.items() <= said.get(row["image_id"], {}).items()]
    with atomic_path(file) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *added]), encoding="utf-8")


def latest(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the last row of each image, by its id."""
    return {row["image_id"]: row for row in rows}
