"""One function over many items, on several processor cores."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

from console import UserError

CHUNK = 4  # items that travel to a worker together
AHEAD = 4  # chunks a worker may be ahead of the reader, which bounds the memory
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def spread(workers: int) -> Iterator[Map]:
    """A `map` over `workers` processes, whose results come in order; with one worker it runs in this process.

    >>> with spread(workers=2) as over:
    ...     list(over(abs, [-1, 2]))
    [1, 2]
    """
    if workers <= 1:
        yield map
        return
    for name in ONE_THREAD:  # the workers share the cores already; a spawned one reads this when it starts
        os.environ.setdefault(name, "1")
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _ignore_interrupt)

    def over(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return chain.from_iterable(_in_order(pool, function, items, AHEAD * workers))

    try:
        yield over
    except BrokenProcessPool:
        raise UserError("a worker process ended before its time, perhaps for lack of memory; try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator[list]:
    waiting, items = deque(), iter(items)
    while chunk := list(islice(items, CHUNK)):
        waiting.append(pool.submit(_apply, function, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _apply(function: Callable, chunk: list) -> list:
    return [function(item) for item in chunk]


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C only the parent speaks
