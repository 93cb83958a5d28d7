"""What is repair worth? Train the same network on masks that were dropped, repaired or left clean, and compare.

    python -m tools.repair_accuracy runs/repair                              # 480 tiles, 3 seeds
    python -m tools.repair_accuracy runs/small --tiles 96 --slides 12 --seeds 1 train.epochs=2

For each seed it makes demo tiles with planted defects, and test tiles of other slides with clean masks. It filters the
tiles in six ways and trains the network of configs/demo.yaml on each result:

    report          the report's rules: sparse and misregistered tiles are dropped
    audit           also unmarked and shifted ones (max_unmarked, max_shift)
    repair          masks are repaired instead, where possible (filter.repair)
    repair + model  the same, with models that were cross-fitted on the repaired tiles
    relabel         and predictions of these models in place of masks that cannot be repaired (filter.relabel)
    clean           all tiles with the clean masks: the ceiling

The first slide is held out of every training. Prints and writes OUT/repair.md, with the share of the gap in Dice
between `report` and `clean` that each of the others closes. Everything is kept in OUT; the same command goes on where
it was interrupted, and one with more --seeds adds them.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.bootstrap import interval, resampled_weights
from common.config import Config
from common.config_files import load_config
from common.console import Progress, UserError, argument_parser, markdown_table, run, table
from common.files import write_text
from common.masks import read_mask
from common.workers import THREAD_VARIABLES, cores
from evaluation.candidates import candidate_of_run
from evaluation.metrics import confusion, dice, mean_present
from tools.cross_fit import finished, part_config
from tools.filter_accuracy import Kept, read_truth

CODE = Path(__file__).parent.parent
CONFIG = CODE / "configs" / "demo.yaml"
REPORT = ["filter.max_unmarked=off", "filter.max_shift=off"]
REPAIR = ["filter.repair=true"]
ARMS = {"report": REPORT, "audit": [], "repair": REPAIR, "clean": [*REPORT, "data.masks=truth/mask#{key}.png"],
        "repair + model": REPAIR, "relabel": [*REPAIR, "filter.relabel=true"]}
ASK_MODELS = ("repair + model", "relabel")  # after the models were trained on `repair`
SHOWN = ("report", "audit", "repair", "repair + model", "relabel", "clean")
PARTS = 3
TEST_SEEDS = 1000  # is added to the seed, for the slides of the test tiles


@dataclass(frozen=True)
class Trial:
    """One seed: where its files lie and with which settings it runs."""

    folder: Path
    overrides: tuple[str, ...]

    def settings(self, arm: str) -> list[str]:
        # one slide is the least that a list can hold out; the test tiles here are others
        return [f"data.root={self.folder / 'data'}", f"data.cache={self.folder / arm}",
                f"data.test_groups=[{self.held_out}]", *ARMS[arm], f"name={arm.replace(' ', '')}", *self.overrides]

    @cached_property
    def held_out(self) -> str:
        return min(row["slide"] for row in read_truth(self.folder / "data").values())

    def config(self, arm: str) -> Config:
        return load_config(CONFIG, self.settings(arm))

    def call(self, *words: object) -> None:
        """Run a script with one thread in this trial's folder; its output goes to log.txt there."""
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, "1") | {"PYTHONPATH": str(CODE)}
        with (self.folder / "log.txt").open("a") as log:
            done = subprocess.run([sys.executable, *map(str, words)], cwd=self.folder, env=environment, stdout=log,
                                  stderr=subprocess.STDOUT)
        if done.returncode:
            raise UserError(f"{' '.join(map(str, words))} failed; {self.folder / 'log.txt'} says why")

    def filter(self, arm: str) -> None:
        if not (self.folder / arm / "tiles.csv").exists():
            models = [self.folder / "runs" / f"repair.part{part}" for part in range(1, PARTS + 1)]
            self.call(CODE / "data_filter.py", "--config", CONFIG, *self.settings(arm), "--workers", 1,
                      *(["--model", *models] if arm in ASK_MODELS else []))

    def train(self, arm: str, part: int | None = None) -> None:
        config, own = self.config(arm), []
        if part:
            config = part_config(config, part, PARTS)
            own = [f"name={config.name}", f"train.leave_out={config.train.leave_out}"]
        folder = self.folder / "runs" / config.name
        if finished(config, folder):
            return
        self.call(CODE / "train.py", *(["--resume", f"runs/{config.name}"] if folder.exists() else
                                       ["--config", CONFIG, *self.settings(arm), *own]))


def reject_other_settings(out: Path, settings: dict) -> None:
    """Raise a `UserError` if OUT was begun with other settings; remember them if it is new."""
    path = out / "settings.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if settings[name] != earlier.get(name)]
        if changed:
            raise UserError(f"{out}: was begun with {changed[0]} = {earlier.get(changed[0])}, not "
                            f"{settings[changed[0]]}; use the same, or choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: holds other files; choose another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1) + "\n")


def at_once(jobs: Sequence[Callable[[], Any]], progress: Progress) -> list:
    """Run jobs on all cores, one thread each, and return their results in order."""
    results = []
    with ThreadPoolExecutor(cores()) as pool:
        for done in [pool.submit(job) for job in jobs]:
            results.append(done.result())
            progress.advance()
    return results


def make_tiles(folder: Path, tiles: int, slides: int, seed: int, *options: str) -> None:
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "tools.make_demo_data", str(folder), "--tiles", str(tiles), "--slides",
                        str(slides), "--seed", str(seed), *options], cwd=CODE, check=True, stdout=subprocess.DEVNULL)


def test_counts(trial: Trial, arm: str, test: Path) -> tuple[list[str], np.ndarray]:
    """Return the slide and the confusion (K, K) of each test tile against its clean mask."""
    candidate = candidate_of_run(trial.folder / "runs" / trial.config(arm).name, "best", [], flips=False)
    data, slides, counts = load_config(CONFIG).data, [], []
    with (test / "truth.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            image = torch.from_numpy(np.array(Image.open(test / f"frames/frame#{row['key']}.png")))[None]
            target = torch.from_numpy(read_mask(test / f"truth/mask#{row['key']}.png", data)).long()[None]
            prediction = candidate.predictor.logits(image.to(candidate.device)).argmax(1).cpu()
            counts.append(confusion(prediction, target, len(data.classes))[0].numpy())
            slides.append(row["slide"])
    return slides, np.array(counts)


def score(trial: Trial, test: Path, arm: str) -> tuple[tuple[list[str], np.ndarray], Kept]:
    """Return the `test_counts` of a model, and what the filter left of the training tiles."""
    return test_counts(trial, arm, test), Kept.of(trial.folder / "data", trial.config(arm).data)


def scores(results: Sequence[tuple[list[str], np.ndarray]]) -> np.ndarray:
    """Return the pooled Dice of each seed, averaged over classes, and those of resampled slides: (seeds, 1 + R)."""
    return np.array([mean_present(dice(np.tensordot(resampled_weights(groups, seed), counts, 1)))
                     for seed, (groups, counts) in enumerate(results)])


def closed(values: dict[str, np.ndarray], arm: str) -> str:
    """Return the share of the gap in the mean Dice between `report` and `clean` that is closed."""
    if arm in ("report", "clean"):
        return ""
    report, other, clean = (values[name][:, 0].mean() for name in ("report", arm, "clean"))
    return f"{(other - report) / (clean - report):.0%}" if clean > report else "no gap"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("out", type=Path, help="the folder for all files, e.g. runs/repair")
    for name, default in (("tiles", 480), ("slides", 24), ("test-tiles", 120), ("test-slides", 12), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--visible-defects", action="store_true", help="plant only what a filter sees best")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other settings than demo.yaml")
    args = parser.parse_intermixed_args()
    options = ["--visible-defects"] if args.visible_defects else []
    reject_other_settings(args.out, {name: value for name, value in vars(args).items() if name not in (
        "out", "seeds", "traceback")})
    trials, tests = [], []
    for seed in range(1, args.seeds + 1):
        folder = (args.out / f"seed{seed}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make_tiles(folder / "data", args.tiles, args.slides, seed, *options)
        make_tiles(folder / "test", args.test_tiles, args.test_slides, seed + TEST_SEEDS)
        trials.append(Trial(folder, (f"seed={seed}", *args.overrides)))
        tests.append(folder / "test")
    first = [arm for arm in ARMS if arm not in ASK_MODELS]
    work = [
        [partial(t.filter, arm) for t in trials for arm in first],
        [*(partial(t.train, "repair", part) for t in trials for part in range(1, PARTS + 1)),
         *(partial(t.train, arm) for t in trials for arm in first)],
        [partial(t.filter, arm) for t in trials for arm in ASK_MODELS],
        [partial(t.train, arm) for t in trials for arm in ASK_MODELS],
    ]
    with Progress("filter and train", sum(map(len, work)), "step") as progress:
        for jobs in work:  # each needs those before it
            at_once(jobs, progress)
    torch.set_num_threads(1)
    values, left = {}, {}
    with Progress("score", len(SHOWN) * len(trials), "model") as progress:
        for arm in SHOWN:
            results = at_once([partial(score, *pair, arm) for pair in zip(trials, tests, strict=True)], progress)
            counts, left[arm] = zip(*results, strict=True)
            values[arm] = scores(counts)
    slides, rows = args.test_slides * args.seeds, []
    for arm in SHOWN:
        means = [np.mean([getattr(one, name) for one in left[arm]]) for name in Kept.__annotations__]
        mean = values[arm].mean(axis=0)
        low, high = interval(mean, slides)
        rows.append([arm, *(f"{value:.1%}" for value in means[:2]), f"{means[2]:.2%}", f"{means[3]:.0%}",
                     f"{mean[0]:.3f} ({low:.3f} to {high:.3f})", closed(values, arm),
                     " ".join(f"{value:.3f}" for value in values[arm][:, 0])])
    header = ["masks", "tiles kept", "pixels kept", "wrong pixels", "moved masks dropped", "Dice on clean test masks",
              "of the gap closed", "by seed"]
    print(table(header, rows))
    write_text(args.out / "repair.md", markdown_table(header, rows) + "\n")
    print(f"\nwrote {args.out / 'repair.md'}")


if __name__ == "__main__":
    run(main)
