"""Work on single images, by as many processes as there are cores."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from vlmdiff.core import lifeline

Item, Result = TypeVar("Item"), TypeVar("Result")


def map_in_processes(function: Callable[[Item], Result], items: Iterable[Item], chunk: int) -> Iterator[Result]:
    """`function` of each item, in their order, `chunk` items at a time to a process; its first exception is raised.

    Function, items and results are pickled. The processes end with this one, however it ends.
    """
    # Fork would copy whatever threads the caller runs.
    context = get_context("spawn")
    with ProcessPoolExecutor(mp_context=context, initializer=lifeline.end_with, initargs=(os.getpid(),)) as pool:
        try:
            yield from pool.map(function, items, chunksize=chunk)
        finally:
            pool.shutdown(cancel_futures=True)
