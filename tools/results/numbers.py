"""The numbers of a comparison, in files small enough to be kept: OUT/COMPARISON.json and OUT/metrics/COMPARISON/."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from common import palette
from common.console import UserError
from common.files import write_text
from tools.other_networks import predictions_of
from tools.results import pictures
from tools.results.measurements import blank_spots, receptive_fields
from tools.results.plan import Comparison, Plan, Run
from tools.results.runs import CODE, is_complete
from training.run_folder import read_metrics

ENVIRONMENT = ("started", "commit", "device", "precision", "threads")  # that is kept of a run
TEST_SET = ("tiles_identity", "tiles", "groups", "classes", "intervals", "best_constant")


def path_of(out: Path, comparison: Comparison) -> Path:
    return out / f"{comparison.name}.json"


def metrics_of(out: Path, comparison: Comparison) -> Path:
    """Return the folder of the metrics.csv of each run: another comparison may have the same run of another machine."""
    return out / "metrics" / comparison.name


def read_numbers(out: Path, plan: Plan, comparison: Comparison) -> dict | None:
    """Return the numbers of a comparison; None if there are none, or if they are of other settings."""
    path = path_of(out, comparison)
    if not path.is_file():
        return None
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
        settings = [[row["row"], row["settings"]] for row in numbers["rows"]]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not the numbers of a comparison ({error!r}); restore the file or remove "
                        "it") from None
    wanted = [[label, plan.settings_of(row)] for label, row in zip(comparison.labels, comparison.rows, strict=True)]
    return numbers if settings == wanted and numbers.get("test", "") == plan.test else None


def has_all(numbers: dict | None, plan: Plan) -> bool:
    """Return whether a comparison's numbers are of all seeds of the plan."""
    return numbers is not None and {*plan.seeds} <= {*numbers["seeds"]}


def complete_runs(plan: Plan, comparison: Comparison) -> dict[str, list[Run]]:
    """Return the runs of each row for the seeds that every row of the comparison has completed."""
    runs = {row: plan.runs[row] for row in comparison.rows}
    complete = [i for i in range(len(plan.seeds)) if all(is_complete(of_row[i]) for of_row in runs.values())]
    return {row: [of_row[i] for i in complete] for row, of_row in runs.items()}


def measure(plan: Plan, comparison: Comparison, out: Path) -> None:
    """Score the complete runs of a comparison and write its numbers, unless a row has no complete run.

    Numbers of the same runs stay as they are, and so do numbers of more seeds, whose runs may lie on another machine.
    """
    runs, earlier = complete_runs(plan, comparison), read_numbers(out, plan, comparison)
    seeds = [run.config.seed for run in runs[comparison.rows[0]]]
    facts = [[_facts(run) for run in of_row] for of_row in runs.values()]
    if not seeds or (earlier and len(earlier["seeds"]) > len(seeds)):
        return
    beside = {"merge": [*plan.merge], "show": [*comparison.show]}
    if (earlier and all(earlier.get(name, []) == value for name, value in beside.items())
            and [_without_scores(row) for row in earlier["rows"]] == facts):
        return
    folder = Path("runs") / f"{plan.name}-{comparison.name}"
    print(f"score {comparison.name}: {folder / 'report.html'}", flush=True)
    scores = _evaluate(plan, [run for of_row in runs.values() for run in of_row], folder)
    if len(scores["experiments"] or scores["entries"]) != len(runs):
        raise UserError(f"{plan.path}: {comparison.name}: two rows have the same tiles and settings, so that they are "
                        "not two rows; remove one")
    metrics_of(out, comparison).mkdir(parents=True, exist_ok=True)
    more = measure_more(plan, comparison, runs, folder, out)
    rows, entries = [], {entry["name"]: entry for entry in scores["entries"]}
    for number, (label, (row, of_row)) in enumerate(zip(comparison.labels, runs.items(), strict=True)):
        found = scores["experiments"][number] if scores["experiments"] else entries[of_row[0].name]
        rows.append({
            "row": label, "settings": plan.settings_of(row), "scores": found["scores"],
            "difference_to_first": found["difference_to_first"],
            "merged": {part["merge"]: part["rows"][number] for part in scores["merged"] if not part["part"]},
            "runs": [fact | _values(entries[run.name]) | more.get(run.name, {})
                     for run, fact in zip(of_row, facts[number], strict=True)]})
    numbers = {"seeds": seeds, **{name: scores[name] for name in TEST_SET}, "test": plan.test, **beside, "rows": rows}
    for of_row in runs.values():
        for run in of_row:
            write_text(metrics_of(out, comparison) / f"{run.name}.csv",
                       (run.folder / "metrics.csv").read_text(encoding="utf-8"))
    write_text(path_of(out, comparison), json.dumps(numbers, indent=1) + "\n")


def _evaluate(plan: Plan, runs: Sequence[Run], folder: Path) -> dict:
    """Return scores.json of all runs; the page and the pictures of the evaluation lie in `folder`."""
    ours = [str(run.folder) for run in runs if not run.network]
    words = [str(CODE / "evaluate.py"), *(ours or ["--config", plan.config]), *plan.test_words, "--out", str(folder)]
    for run in runs:
        words += ["--predictions", str(predictions_of(run.folder))] if run.network else []
    for merge in plan.merge:
        words += ["--merge", merge]
    if subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the runs of {folder.name} were not scored, see above")
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def measure_more(plan: Plan, comparison: Comparison, runs: dict[str, list[Run]], folder: Path,
                 out: Path) -> dict[str, dict]:
    """Measure what a comparison shows beside its scores, draw what needs the runs, and return the numbers of each run.

    `folder` is that of the evaluation.
    """
    more: dict[str, dict] = {run.name: {} for of_row in runs.values() for run in of_row}
    labels = {run.name: predictions_of(run.folder) if run.network else folder / "predictions" / run.name
              for of_row in runs.values() for run in of_row}
    first = comparison.rows[0]
    config, split = replace(plan.runs[first][0].config, data=plan.tested(first)), "all" if plan.test else "test"
    if "predictions" in comparison.show:
        shown = {label: labels[of_row[0].name] for label, of_row in zip(comparison.labels, runs.values(), strict=True)}
        palette.save(pictures.predictions(config, split, folder / "tiles.csv", shown),
                     out / f"{comparison.name}-predictions.png")
    if "fields" in comparison.show:
        for name, found in receptive_fields(plan, runs, Path(f"{folder}-fields"),
                                            out / f"{comparison.name}-fields.png").items():
            more[name]["fields"] = found
    if "blank" in comparison.show:
        for name, share in blank_spots(config, split, labels).items():
            more[name]["blank"] = share
    return more


def _facts(run: Run) -> dict:
    """Return how a run was made. Its last start counts, if it was resumed."""
    starts = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    history = read_metrics(run.folder)
    return {"name": run.name, "seed": run.config.seed, **{name: starts[-1][name] for name in ENVIRONMENT},
            "torch": starts[-1]["packages"]["torch"], "starts": len(starts), "epochs": len(history),
            "best_epoch": min(history, key=lambda row: row["val_loss"])["epoch"],
            "seconds_per_epoch": round(median(row["seconds"] for row in history), 1)}


def _values(entry: dict) -> dict:
    """Return the scores of a run without their intervals."""
    return {"scores": {
        name: score["value"] if "value" in score else {column: number["value"] for column, number in score.items()}
        for name, score in entry["scores"].items()}}


def _without_scores(row: dict) -> list[dict]:
    return [{name: value for name, value in run.items() if name not in ("scores", "fields", "blank")}
            for run in row["runs"]]
