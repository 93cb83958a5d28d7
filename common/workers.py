"""One function over many items, on several processor cores."""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common.console import UserError

CHUNK = 16  # items that travel to a worker together, at most; fewer where there are few
AHEAD = 4  # chunks a worker may be ahead of the reader, which bounds the memory
MOST_WORKERS = 61 if os.name == "nt" else sys.maxsize  # Windows waits for no more handles than this
CGROUP = Path("/sys/fs/cgroup")
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


def cores() -> int:
    """Processor cores that this process may use: its affinity, and in a container its share of the processor."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, _container_cores(CGROUP) or here)


def _container_cores(folder: Path) -> int | None:
    """What `docker --cpus` and its kin allow, rounded up; None where there is no such limit (cgroup version 2 or 1)."""
    for quota, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = [word for name in (quota, period) if name for word in (folder / name).read_text().split()]
            microseconds, of = map(int, words)
        except (OSError, ValueError):  # no such file; "max", which is no limit
            continue
        if microseconds > 0 and of > 0:
            return -(-microseconds // of)
    return None


@contextmanager
def worker_map(workers: int) -> Iterator[Map]:
    """A `map` over `workers` processes, whose results come in order; with one worker it runs in this process.

    >>> with worker_map(workers=2) as over:
    ...     list(over(abs, [-1, 2]))
    [1, 2]
    """
    if workers <= 1:
        yield map
        return
    workers = min(workers, MOST_WORKERS)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _ignore_interrupt)
    with single_threaded(), ignoring_interrupts():  # they share the cores
        for _ in range(workers):
            pool.submit(int)  # each starts a worker, as long as none is ready yet

    def over(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        return chain.from_iterable(_in_order(pool, function, items, workers))

    try:
        yield over
    except BrokenProcessPool:
        raise UserError("a worker process died, possibly out of memory; try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def single_threaded() -> Iterator[None]:
    """The libraries of processes that start here use one thread."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Processes that start here have no ear for Ctrl-C: only their parent speaks."""
    main = threading.current_thread() is threading.main_thread()  # no other may touch signals
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def _in_order(pool: ProcessPoolExecutor, function: Callable, items: Sequence, workers: int) -> Iterator[list]:
    size = min(CHUNK, max(1, len(items) // (AHEAD * workers)))
    waiting: deque = deque()
    for start in range(0, len(items), size):
        waiting.append(pool.submit(_apply, function, items[start:start + size]))
        if len(waiting) > AHEAD * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _apply(function: Callable, chunk: Sequence) -> list:
    return [function(item) for item in chunk]


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C only the parent speaks
