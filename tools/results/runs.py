"""Train what a plan lacks, several runs at once, and say how long it will take."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from common.config import Data
from common.console import Progress, UserError
from common.workers import THREAD_VARIABLES
from dataset import TILE_LIST
from tools.other_networks import predictions_of
from tools.results.plan import Plan, Run
from train import reason_to_end, reject_another, settings_of_resumption
from training.run_folder import read_metrics

CODE = Path(__file__).parent.parent.parent
SECONDS_BETWEEN_LOOKS = 2.0  # at the runs that are being trained


def epochs_done(run: Run) -> int:
    return len(read_metrics(run.folder))


def is_complete(run: Run) -> bool:
    """Return whether nothing of a run is left to do. Raise a `UserError` if its folder holds other settings."""
    reject_another(run.config, run.folder)
    return bool(reason_to_end(read_metrics(run.folder), run.config)) and (
        not run.network or predictions_of(run.folder).is_dir())


def epochs_left(run: Run) -> int:
    return 0 if is_complete(run) else run.config.train.epochs - epochs_done(run)


def seconds_left(runs: Sequence[Run], known: Sequence[Run]) -> float | None:
    """Return how long one process trains `runs`; None before an epoch of any known run is done.

    An epoch takes the median of the epochs that runs of the same row did, or else of all that are known.
    """
    seconds: dict[str, list[float]] = {}
    for run in known:
        seconds.setdefault(_without_seed(run), []).extend(row["seconds"] for row in read_metrics(run.folder))
    of_all = [value for values in seconds.values() for value in values]
    if not of_all:
        return None
    return sum(epochs_left(run) * median(seconds.get(_without_seed(run)) or of_all) for run in runs)


def _without_seed(run: Run) -> str:
    return run.name.rpartition("-seed")[0]


def prepare(plan: Plan, runs: Sequence[Run]) -> None:
    """Make the tiles and the list of tiles of every run that has none, by the plan's commands or data_filter.py."""
    for run in runs:
        _make_tiles(plan, run.config.data)
        if not (run.config.data.list_folder / TILE_LIST).exists():
            words = [word for word in run.arguments if not word.startswith(("name=", "seed="))]
            _call(shlex.join(["python", "data_filter.py", *words]), run.name)
    if runs:
        _make_tiles(plan, plan.tested(next(iter(plan.rows))))


def _make_tiles(plan: Plan, data: Data) -> None:
    """Run the plan's commands for the folder of the tiles and for that of their list, if they are missing."""
    if not Path(data.root).is_dir():
        commands = plan.prepare.get(data.root, [])
        if not commands or any("SOURCE" in each for each in commands):
            raise UserError("; ".join([f"{data.root}: no such folder of tiles",
                                       *(f"make it with: {each}" for each in commands)]))
        for each in commands:
            _call(each, data.root)
    if data.cache and not (data.list_folder / TILE_LIST).exists():
        for each in plan.prepare.get(data.cache, []):
            _call(each, data.cache)


def _call(words: str, purpose: str) -> None:
    """Run a command of this repository, as it is written for a shell in its folder."""
    print(f"\n{purpose}: {words}", flush=True)
    first, *others = shlex.split(words)
    script = [str(CODE / word) if word.endswith(".py") and "/" not in word else word for word in others]
    if subprocess.run([sys.executable if first == "python" else first, *script], env=_environment()).returncode:
        raise UserError(f"{purpose}: the command above failed; the same command as before goes on from there")


def _environment(threads: int = 0) -> dict[str, str]:
    path = os.pathsep.join([str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | (dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {})


@dataclass
class _Trainer:
    """Trains runs in processes of their own, which end with this one."""

    threads: int  # of each process; 0 is as many as torch takes
    processes: list[subprocess.Popen] = field(default_factory=list)
    is_ended: bool = False

    def train(self, run: Run) -> None:
        """Train a run, or go on with it. Its messages go to runs/NAME.log, which is removed if all went well."""
        if self.is_ended:
            return
        if run.network:
            words = ["-m", "tools.other_networks", run.network, *run.arguments]
        elif run.folder.exists():
            words = [str(CODE / "train.py"), "--resume", str(run.folder), *settings_of_resumption(run.config)]
        else:
            words = [str(CODE / "train.py"), *run.arguments]
        log = run.folder.with_name(f"{run.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen([sys.executable, *words], env=_environment(self.threads), stdout=file,
                                       stderr=subprocess.STDOUT)
            self.processes.append(process)
            code = process.wait()
        if code and not self.is_ended:
            self.end()
            last = (log.read_text(encoding="utf-8").strip().splitlines() or [f"it ended with code {code}"])[-1]
            raise UserError(f"{run.name}: {last.removeprefix('error: ')} ({log} has more). The same command goes on "
                            "with what is left")
        if not code:
            log.unlink()

    def end(self) -> None:
        self.is_ended = True
        for process in self.processes:
            process.terminate()


def train(runs: Sequence[Run], jobs: int, threads: int, title: str) -> None:
    """Train the runs that are not complete, `jobs` at once. The first error ends all."""
    left = [run for run in runs if not is_complete(run)]
    before = {run.name: epochs_done(run) for run in left}
    total = sum(run.config.train.epochs - before[run.name] for run in left)
    trainer = _Trainer(threads)
    with ThreadPoolExecutor(jobs) as pool, Progress(title, total, "epoch") as progress:
        futures = [pool.submit(trainer.train, run) for run in left]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                running = [run for run in left if run.folder.exists()]
                now = sum(epochs_done(run) - before[run.name] for run in running)
                complete = len(left) - len(waiting)
                progress.advance(now - progress.done, f"{complete} of {len(left)} runs complete")
        except KeyboardInterrupt:
            raise KeyboardInterrupt("give the same command again, and it goes on from here") from None
        finally:
            for future in futures:
                future.cancel()
            trainer.end()


def state(run: Run) -> str:
    """Return how far a run is, for people."""
    done = epochs_done(run)
    return "complete" if is_complete(run) else f"epoch {done} of {run.config.train.epochs}" if done else "-"


def duration(seconds: float) -> str:
    """Return a time in the words of people: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
