"""Two ways of one task, side by side: each in a process of its own, taking turns.

    lap       the task once; what is timed
    side      a process that runs laps: of our way, of the plain way with our use of memory, and of the plain way
              as a script has it that asks for nothing

The sides wait for each other, so that a noisy neighbour disturbs all of them alike, and ratios are of laps that lie
next to each other.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common.console import UserError
from common.memory import enough_memory, reuse_memory
from common.workers import ignoring_interrupts, single_threaded

ENOUGH, MOST_ROUNDS = 4.0, 15  # seconds of laps; rounds of short ones
LESS_MEMORY = "close other programs, or try --quick"
PREPARE, RUN, FORGET = "prepare", "run", "forget"  # what a side is asked


@dataclass(frozen=True)
class Setting:
    """What every task is given."""

    root: Path  # of the demo tiles
    quick: bool
    device: str  # cpu, or cuda

    def wait(self) -> None:
        """Until the GPU has done what it was told: a lap ends then."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def give_back(self) -> None:
        """The GPU's memory that is free in this process, to the others."""
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Lap:
    """What a side times."""

    run: Callable[[], Any]
    items: int = 1  # that one lap handles
    facts: dict = field(default_factory=dict)  # for the row; "work" is that of all items (roofline.py)


Prepare = Callable[[Setting], Lap]  # a function of a module, since it is called in another process


@dataclass(frozen=True)
class Race:
    """What to compare."""

    ours: Prepare
    baseline: Prepare
    unit: str = "ms a tile"  # or "s ..."
    one_thread: bool = False
    keeps_memory: bool = True  # as the scripts that need torch do; on a GPU it matters to none


class Side:
    """A process that prepares laps and runs them when asked."""

    def __init__(self, keeps_memory: bool):
        context = get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, keeps_memory), daemon=True)
        with ignoring_interrupts():
            self.process.start()
        there.close()

    def ask(self, what: str, *arguments: Any) -> Any:
        self.tell(what, *arguments)
        return self.answer()

    def tell(self, what: str, *arguments: Any) -> None:
        self.pipe.send((what, *arguments))

    def answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise UserError(f"a process of the benchmark ended before its time, perhaps for lack of memory: "
                            f"{LESS_MEMORY}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def _serve(pipe: Any, keeps_memory: bool) -> None:
    if keeps_memory:
        reuse_memory()
    lap = setting = None

    def answer(what: str, *arguments: Any) -> Any:
        nonlocal lap, setting
        if what == PREPARE:
            prepare, setting = arguments
            lap = prepare(setting)
            return lap.items, lap.facts
        if what == RUN:
            start = time.perf_counter()
            lap.run()
            return time.perf_counter() - start
        lap = None
        return setting.give_back()

    while True:
        try:
            message = pipe.recv()
            try:
                with enough_memory(LESS_MEMORY):
                    found = answer(*message)
            except UserError as error:
                found = error
            except Exception:  # as text, since not every error can travel
                found = RuntimeError(f"in a process of the benchmark:\n{traceback.format_exc()}")
            pipe.send(found)
        except (EOFError, OSError):  # the other end is closed: all is done
            return


class Sides:
    """The processes that have been needed so far; they stay for the next race, for their start takes seconds."""

    def __init__(self) -> None:
        self.open: dict[tuple, Side] = {}

    def of(self, race: Race) -> dict[str, Side]:
        """By name; `as_shipped` is missing where our way does not use memory otherwise than any script."""
        wanted = {"ours": race.keeps_memory, "baseline": race.keeps_memory}
        if race.keeps_memory:
            wanted["as_shipped"] = False
        with single_threaded() if race.one_thread else nullcontext():
            for name, keeps_memory in wanted.items():
                key = name == "ours", race.one_thread, keeps_memory
                self.open[key] = self.open.get(key) or Side(keeps_memory)
        return {name: self.open[name == "ours", race.one_thread, keeps] for name, keeps in wanted.items()}

    def __enter__(self) -> "Sides":
        return self

    def __exit__(self, *_) -> None:
        for side in self.open.values():
            side.close()


def compete(race: Race, setting: Setting, rounds: int, sides: Sides) -> dict:
    """The row of a race: medians of each side, and of the ratios of neighbouring laps with their range."""
    racing = sides.of(race)
    for name, side in racing.items():
        side.tell(PREPARE, race.ours if name == "ours" else race.baseline, setting)
    prepared = {name: side.answer() for name, side in racing.items()}
    row = turns({name: partial(side.ask, RUN) for name, side in racing.items()}, prepared, race.unit, rounds)
    for side in racing.values():
        side.ask(FORGET)
    return row


def turns(laps: dict[str, Callable[[], float]], prepared: dict[str, tuple[int, dict]], unit: str, rounds: int) -> dict:
    """Run every side's lap in turn, a first time to warm up; seconds of a lap are what it returns.

    Short laps get more rounds than these, until `ENOUGH` seconds or `MOST_ROUNDS`.
    """
    scale = 1000 if unit.startswith("ms") else 1
    times: dict[str, list[float]] = {name: [] for name in laps}
    spent, number = 0.0, 0
    while number <= rounds or (spent < ENOUGH and number <= MOST_ROUNDS):
        for name, lap in laps.items():
            seconds = lap()
            if number:
                spent += seconds
                times[name].append(scale * seconds / prepared[name][0])
        number += 1

    def ratio(name: str) -> dict:
        ratios = sorted(plain / fast for fast, plain in zip(times["ours"], times[name], strict=True))
        return {"ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}

    same = ratio("baseline")
    shipped = ratio("as_shipped") if "as_shipped" in times else same
    facts = {f"{fact}_{name}": value for name in ("ours", "baseline")
             for fact, value in {"items": prepared[name][0], **prepared[name][1]}.items()}
    return {name: statistics.median(values) for name, values in times.items()} | {
        "unit": unit, "rounds": number - 1,
        "ratio_same_allocator": same["ratio"], "range_same_allocator": same["range"],
        "ratio_as_shipped": shipped["ratio"], "range_as_shipped": shipped["range"], **facts}


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a new process that keeps its memory, as the scripts that need torch do."""
    with ProcessPoolExecutor(1, get_context("spawn"), reuse_memory) as pool:
        return pool.submit(function, *arguments).result()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a new process as it comes, whose libraries use one thread."""
    with single_threaded(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def plain_row(ours: float, baseline: float | None, unit: str, ratios: Sequence[float] = (), **facts: Any) -> dict:
    """A row that no race made; where memory is used alike both ratios are the same one."""
    ratios = sorted(ratios)
    middle, span = (statistics.median(ratios), [ratios[0], ratios[-1]]) if ratios else (None, None)
    return {"ours": ours, "baseline": baseline, "unit": unit, "ratio_same_allocator": middle,
            "range_same_allocator": span, "ratio_as_shipped": middle, "range_as_shipped": span, **facts}
