"""The output of long work: lines for a log, and progress bars in a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from vlmdiff.core.text import plain

T = TypeVar("T")


def say(message: str) -> None:
    """Print a line without delay, so that a reader of the stream sees it when it happens."""
    print(plain(message), flush=True)


def track(items: Iterable[T], description: str, total: int, completed: int = 0) -> Iterator[T]:
    """Iterate with a progress bar on standard error, without a bar if that is not a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, completed=completed)
        for item in items:
            yield item
            progress.advance(task)
