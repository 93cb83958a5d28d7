"""Ranks: processes on one or more machines that do one job together, as `torchrun` starts them.

Each rank tells the others by a pulse, through the store of torchrun, what it does and how far it is. So a rank that
waits knows whether the others still work, the first rank shows progress for all, and a rank that died or hangs ends the
job within a minute, with a message that says which one it was and what it did. Without torchrun there is one rank, and
nothing here does anything.
"""

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common import console
from common.console import Progress, UserError

T = TypeVar("T")
SECONDS_OF_SILENCE = 20.0  # after which a rank counts as lost
SECONDS_FOR_A_STEP = 25.0  # torchrun gives a rank that hangs another 30 to end; or SLOW_STEPS times the slowest so far
SLOW_STEPS = 10
SECONDS_FOR_THE_FIRST_STEP = 900.0  # which may have to compile the network
SECONDS_OF_EXCHANGE = 45.0
SECONDS_BEFORE_A_WORD = 10.0  # of a rank that waits for others
SECONDS_BETWEEN_PULSES = 0.5
SECONDS_BETWEEN_LOOKS = 0.01
SECONDS_TO_EXPLAIN = 2.5  # how long a rank that ends looks for the one that was the cause


class RankLost(UserError):
    """Another rank died or hangs, or the network between is down."""


@dataclass
class State:
    """What a rank tells the others."""

    host: str = field(default_factory=socket.gethostname)
    beats: int = 0
    doing: str = ""  # in words
    steps: int = 0  # that it has done, of anything
    patience: float | None = None  # seconds until its next step comes at the latest; None: nobody knows
    meeting: int = 0  # the number of the meeting (see `meet`) at which it has arrived
    task: int = 0  # the number of what it shows progress of
    done: int = 0  # of that task
    ended: str = ""  # how it ended: "well" or by an "error", of which it tells the user itself


class Pulse:
    """Sends this rank's state twice a second and receives those of the others, in a thread of its own."""

    def __init__(self, store: dist.Store, rank: int, count: int):
        self.store, self.rank, self.count = store, rank, count
        self.state, self.others = State(), {}
        self.beaten = dict.fromkeys(range(count), time.monotonic())  # when each rank gave the last sign of life,
        self.stepped = dict(self.beaten)  # and when it did its last step
        self.slowest, self.last_step = 0.0, time.monotonic()
        self.heard, self.hurry, self.is_over = time.monotonic(), threading.Event(), False
        self._send()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def _send(self) -> None:
        self.state.beats += 1
        self.store.set(f"pulse {self.rank}", json.dumps(asdict(self.state)))

    def _beat(self) -> None:
        is_over = False
        while not is_over:
            self.hurry.clear()
            is_over = self.is_over  # the last state, too, is sent
            try:
                self._send()
                texts = self.store.multi_get([f"pulse {rank}" for rank in range(self.count)])
            except (RuntimeError, ValueError):  # the machine that holds the store is gone; `lost` tells
                time.sleep(SECONDS_BETWEEN_PULSES)
                continue
            self.heard = time.monotonic()
            for rank, text in enumerate(texts):
                if rank != self.rank:
                    self._hear(rank, State(**json.loads(text)))
            if self.hurry.wait(SECONDS_BETWEEN_PULSES):
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _hear(self, rank: int, state: State) -> None:
        before = self.others.get(rank)
        if before is None or state.beats != before.beats:
            self.beaten[rank] = time.monotonic()
        if before is None or (state.steps, state.doing) != (before.steps, before.doing):
            self.stepped[rank] = time.monotonic()
        self.others[rank] = state

    def begin(self, doing: str) -> None:
        """Say what this rank does from now on; "" means nothing that comes in steps."""
        self.state.doing, self.last_step = doing, time.monotonic()
        self.state.patience = SECONDS_FOR_THE_FIRST_STEP if doing and not self.slowest else self._patience(doing)

    def step(self, steps: int) -> None:
        now = time.monotonic()
        self.slowest, self.last_step = max(self.slowest, now - self.last_step), now
        self.state.steps += 1
        self.state.done += steps
        self.state.patience = self._patience(self.state.doing)

    def _patience(self, doing: str) -> float | None:
        return max(SECONDS_FOR_A_STEP, SLOW_STEPS * self.slowest) if doing else None

    def done_elsewhere(self) -> int:
        """Return how much of the current task the others have done."""
        return sum(state.done for state in list(self.others.values()) if state.task == self.state.task)

    def late(self) -> str:
        """Return which ranks have not arrived at the meeting at which this one is; "" if all have."""
        others = [(rank, self.others.get(rank)) for rank in range(self.count) if rank != self.rank]
        return ", ".join(f"rank {rank}{f' on {state.host}' if state else ''}" for rank, state in others
                         if not state or state.meeting < self.state.meeting)

    def lost(self, silence: float | None = None) -> str:
        """Return which rank died or hangs, and what it did, in words; "" if all are well."""
        silence, now = silence or SECONDS_OF_SILENCE, time.monotonic()
        if now - self.heard > silence:
            return (f"no answer from {os.environ['MASTER_ADDR']}, where rank 0 runs, for {now - self.heard:.0f} s: "
                    "that machine, its job or the network between is down")
        for rank, state in list(self.others.items()):
            what = f"rank {rank} on {state.host}{' in ' if state.doing else ''}{state.doing}"
            if state.ended == "error":
                return f"{what} has ended with an error, which is in the output of that machine"
            if state.ended:
                continue
            if now - self.beaten[rank] > silence:
                return f"{what} was killed, or its machine is down: no sign of it for {now - self.beaten[rank]:.0f} s"
            if state.patience and now - self.stepped[rank] > state.patience:
                return f"{what} hangs: no batch for {now - self.stepped[rank]:.0f} s"
        return ""

    def explain(self) -> str:
        """Wait a moment to see which other rank has stopped answering. Return it in words, or ""."""
        deadline = time.monotonic() + SECONDS_TO_EXPLAIN
        while time.monotonic() < deadline:
            if reason := self.lost(silence=4 * SECONDS_BETWEEN_PULSES):
                return reason
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return ""

    def leave(self, how: str) -> None:
        """Tell the others that this rank ends: "well", or by an "error", of which it tells the user itself."""
        self.state.ended = how
        self.hurry.set()

    def end(self) -> None:
        self.is_over = True
        self.hurry.set()
        self.thread.join(SECONDS_TO_EXPLAIN)


_pulse: Pulse | None = None  # of this process, if torchrun started it with others


def rank() -> int:
    """Return the number of this process among those that do the job together, from 0."""
    return _pulse.rank if _pulse else 0


def count() -> int:
    return _pulse.count if _pulse else 1


def is_first() -> bool:
    """Return whether this is the rank that writes files and speaks to the user."""
    return rank() == 0


def on_this_machine() -> tuple[int, int]:
    """Return this rank's number among those on its machine, and their number."""
    return (int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])) if _pulse else (0, 1)


@contextmanager
def started() -> Iterator[None]:
    """Connect the processes that torchrun started. Only the first one writes to the terminal, except for errors."""
    global _pulse
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield
        return
    number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if number:
        console.speak_only_of_errors(f"rank {number}")
    timeout = timedelta(seconds=SECONDS_OF_EXCHANGE)
    store, *_ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))  # until all have started
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    own = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout,
                        wait_for_workers=False)  # a connection of its own, because the thread uses it at any time
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # the store keeps what earlier ones wrote
    _pulse = Pulse(dist.PrefixStore(attempt, own), number, size)
    dist.init_process_group(backend, store=dist.PrefixStore(attempt, store), rank=number, world_size=size,
                            timeout=timeout)
    _pulse.thread.start()
    try:
        yield
        meet()
        _pulse.leave("well")
        dist.destroy_process_group()
    except UserError as error:
        _pulse.leave("error")
        if _pulse.state.doing and not isinstance(error, RankLost):
            raise UserError(f"rank {number} in {_pulse.state.doing}: {error}") from error
        raise
    except KeyboardInterrupt as interrupt:  # torchrun ends all ranks if one has died
        _pulse.leave("well")
        if reason := _pulse.explain():
            _end(f"{reason}{'; ' if str(interrupt) else ''}{interrupt}")
        raise
    except BaseException:
        _pulse.leave("error")
        raise
    finally:
        _pulse.end()
        _pulse = None


def meet(while_waiting: Callable[[], None] | None = None) -> None:
    """Wait until all ranks are here. End this rank if another one died or hangs.

    The first rank calls `while_waiting` all the time, or else says for whom it waits.
    """
    if not _pulse:
        return
    _pulse.begin("")
    _pulse.state.meeting += 1
    waits_since, has_said = time.monotonic(), while_waiting is not None
    while late := _pulse.late():
        check()
        if while_waiting:
            while_waiting()
        if not has_said and time.monotonic() - waits_since > SECONDS_BEFORE_A_WORD:
            print(f"waiting for {late}", flush=True)
            has_said = True
        _pulse.hurry.set()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    _pulse.hurry.set()


def check() -> None:
    """End this rank if another one died or hangs."""
    if _pulse and (reason := _pulse.lost()):
        _end(reason)


def _end(reason: str) -> NoReturn:
    """Raise a `UserError`, or end without a word if a lower rank is alive, which raises the same."""
    now = time.monotonic()
    speakers = [rank for rank, state in list(_pulse.others.items())
                if (rank < _pulse.rank and now - _pulse.beaten[rank] < 4 * SECONDS_BETWEEN_PULSES)
                or (state.ended == "error" and state.host == _pulse.state.host)]
    if speakers:
        _end_without_a_word()
    raise RankLost(reason)


def fail(error: UserError) -> NoReturn:
    """Raise an error that all ranks have met; only the first one says it."""
    if is_first():
        raise error
    _end_without_a_word()


def _end_without_a_word() -> NoReturn:
    time.sleep(1)  # torchrun ends all ranks as soon as one has ended, and another one says why
    sys.exit(2)


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in their order."""
    if not _pulse:
        return [value]
    meet()
    values: list[Any] = [None] * _pulse.count
    with _exchange():
        dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """Return the value of the first rank."""
    if not _pulse:
        return value
    meet()
    values = [value if is_first() else None]
    with _exchange():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def on_first(step: Callable[[], T]) -> T:
    """Do a step on the first rank alone, and return its value on every rank. If it fails, all end."""
    return from_first(together(step if is_first() else lambda: None))


def to_first(value: T) -> list[T]:
    """Return the values of all ranks on the first rank, in their order, and nothing on the others."""
    if not _pulse:
        return [value]
    meet()
    values: list[Any] | None = [None] * _pulse.count if is_first() else None
    with _exchange():
        dist.gather_object(value, values)
    return values or []


def copy_tensors(tensors: Sequence[Tensor], source: int) -> None:
    """Set these tensors to those of the rank `source`. All ranks give tensors of the same shapes, in the same order."""
    if not _pulse:
        return
    with _exchange():
        for tensor in tensors:  # as one row of numbers, in whatever order of axes they lie in memory
            dist.broadcast(tensor.as_strided((tensor.numel(),), (1,)), source)


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the connection to a rank that has just died is closed
        reason = _pulse.explain() or f"the exchange with the other ranks failed ({str(error).splitlines()[0]})"
        _end(reason)


def together(step: Callable[[], T]) -> T:
    """Do a step on every rank and return its value. If it fails on any, all end, and one of them says why."""
    if not _pulse:
        return step()
    value = error = None
    try:
        value = step()
    except UserError as problem:
        error = problem
    failed = [rank for rank, text in enumerate(gather(error and str(error))) if text]
    if not failed:
        return value
    if failed[0] == rank():
        raise error
    _end_without_a_word()


def one_first(step: Callable[[], T]) -> T:
    """Do a step on every rank, but on one rank of each machine before the others, which find there what it wrote."""
    goes_first = on_this_machine()[0] == 0
    value = together(step if goes_first else lambda: None)
    return together((lambda: value) if goes_first else step)


def reject_differences(facts: Callable[[], dict[str, str]]) -> None:
    """Raise a `UserError` that names two ranks and what differs, unless the code and these facts of all ranks agree."""
    if not _pulse:
        return
    own = {"code": _digest_of_code(), "version of torch": torch.__version__, **facts()}
    for other, theirs in enumerate(found := gather(own)):
        for name, value in theirs.items():
            if value != found[0][name]:
                here, there = (_pulse.others[i].host if i != rank() else _pulse.state.host for i in (0, other))
                fail(UserError(f"rank {other} on {there} has another {name} than rank 0 on {here}: {value}, not "
                               f"{found[0][name]}; give all machines the same files and the same command"))


def _digest_of_code() -> str:
    """Return a digest of the modules of this repository that are loaded."""
    code = Path(__file__).parent.parent
    paths = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    names = {path.relative_to(code).as_posix(): path for path in paths if path.is_relative_to(code)}
    digest = hashlib.sha256()
    for name in sorted(names):
        if not name.startswith("."):  # a virtual environment
            digest.update(f"{name}\0".encode() + names[name].read_bytes())
    return digest.hexdigest()[:12]


class SharedProgress(Progress):
    """The progress of a task that all ranks do together. The first rank shows it; every rank counts its own steps."""

    def __enter__(self) -> "SharedProgress":
        if _pulse:
            _pulse.state.task += 1
            _pulse.state.done = 0
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        if not _pulse:
            super().advance(steps, note)
            return
        _pulse.step(steps)
        check()
        self.look(note)

    def look(self, note: str = "") -> None:
        """Show what all ranks have done by now."""
        super().advance(max(0, _pulse.state.done + _pulse.done_elsewhere() - self.done), note)


def begin(doing: str) -> None:
    """Tell the other ranks what this one does now, such as "fold 2 of epoch 3"; its steps are those of the progress."""
    if _pulse:
        _pulse.begin(doing)
