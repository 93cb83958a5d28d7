"""What processor there is, and how to run one function on many items in several processes."""

import os
import platform
import re
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

ITEMS_PER_WORKER = 64  # fewer tiles are read or judged before another process has started
CHUNK = 16  # items that are sent to a worker together, at most
AHEAD = 4  # chunks for each worker that may wait for the reader, which bounds the memory
MOST_WORKERS = 61 if os.name == "nt" else sys.maxsize  # Windows cannot wait for more processes
CGROUP = Path("/sys/fs/cgroup")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")
ParallelMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


def cores() -> int:
    """Return the number of processor cores that this process, or its container, may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _container_cores(CGROUP) or available)


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return name.group(1) if name else platform.processor() or platform.machine()


def workers_for(items: int) -> int:
    """Return the number of processes that are worth starting for so many tiles: few tiles get few."""
    return min(cores(), items // ITEMS_PER_WORKER)


def _container_cores(folder: Path) -> int | None:
    """Return the limit that for example `docker --cpus` sets, rounded up; None without a limit (cgroup 2 or 1)."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
        except (OSError, ValueError):  # no such file, or "max" for no limit
            continue
        if quota > 0 and period > 0:
            return -(-quota // period)
    return None


@contextmanager
def worker_map(workers: int) -> Iterator[ParallelMap]:
    """Give a `map` over `workers` processes, whose results come in order; with one worker it runs in this process.

    >>> with worker_map(workers=2) as parallel_map:
    ...     list(parallel_map(abs, [-1, 2]))
    [1, 2]
    """
    if workers <= 1:
        yield map
        return
    workers = min(workers, MOST_WORKERS)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with single_threaded(), ignoring_interrupts():  # the workers share the cores
        for _ in range(workers):
            pool.submit(int)  # starts a worker, since none is ready yet

    def parallel_map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        return chain.from_iterable(_chunks_in_order(pool, function, items, workers))

    try:
        yield parallel_map
    except BrokenProcessPool:
        raise UserError("a worker process died, possibly out of memory; try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let the numerical libraries of processes that start in this block use one thread."""
    before = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name in THREAD_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Let processes that start in this block ignore Ctrl-C, so that only their parent reports it."""
    is_main = threading.current_thread() is threading.main_thread()  # only the main thread may change signals
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)


def _chunks_in_order(pool: ProcessPoolExecutor, function: Callable, items: Sequence, workers: int) -> Iterator[list]:
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
