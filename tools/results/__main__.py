"""Train every row of a plan with several seeds, compare the rows, and write a page with tables and pictures.

    python -m tools.results demo --plan           # what is left, and how long it will take
    python -m tools.results demo
    python -m tools.results ebhi --only augmentation
    python -m tools.results ebhi --score          # train nothing: score what is complete, and write the page
    python -m tools.results my_plan.yaml --out my_results

A plan, such as configs/results/demo.yaml, names the settings of each row, and which rows are compared. Each run is one
of train.py in runs/PLAN-ROW-seedN. What is complete stays as it is, what was interrupted goes on, and comparisons whose
numbers are kept in OUT (docs/results/PLAN) are not trained again. After each seed the comparisons are scored, by
evaluate.py into runs/PLAN-COMPARISON; their numbers go to OUT/COMPARISON.json and OUT/metrics/COMPARISON. The page
OUT/results.md and its pictures are made from these files alone. To repeat what docs/results holds, give another OUT.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from common.console import UserError, argument_parser, run, table
from common.workers import cores
from tools.results import numbers, page
from tools.results.plan import Comparison, Plan, Run, load_plan
from tools.results.runs import duration, prepare, seconds_left, state, train


def what_is_left(plan: Plan, comparisons: Sequence[Comparison], out: Path) -> list[Run]:
    """Return the runs that the comparisons need, seed by seed, without comparisons whose numbers are complete."""
    needed = {row: None for comparison in comparisons for row in comparison.rows
              if not numbers.has_all(numbers.read_numbers(out, plan, comparison), plan)}
    return [plan.runs[row][i] for i in range(len(plan.seeds)) for row in needed]


def show(plan: Plan, comparisons: Sequence[Comparison], left: Sequence[Run], jobs: int) -> str:
    """Return the state of the runs of the comparisons as a table, and how long those that are left will take."""
    names, rows_of = {run.name for run in left}, {row for comparison in comparisons for row in comparison.rows}
    rows = [[row, *(state(run) if run.name in names else "numbers kept" for run in runs)]
            for row, runs in plan.runs.items() if row in rows_of]
    text = table(["row", *(f"seed {seed}" for seed in plan.seeds)], rows)
    todo = [run for run in left if state(run) != "complete"]
    seconds = seconds_left(todo, [run for runs in plan.runs.values() for run in runs])
    time = "unknown before the first epoch is done" if seconds is None else f"about {duration(seconds / jobs)}"
    return f"{text}\n\nruns to train: {len(todo)}, {jobs} at once; time: {time}" if todo else f"{text}\n\nall trained"


def score(plan: Plan, comparisons: Sequence[Comparison], out: Path) -> None:
    """Score what is complete of the comparisons, and write the page of all."""
    for comparison in comparisons:
        numbers.measure(plan, comparison, out)
    page.write(out, plan, {comparison.name: found for comparison in plan.comparisons
                           if (found := numbers.read_numbers(out, plan, comparison))}, out / "metrics")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("plan", help="a file of configs/results, such as demo, or the path of a YAML file")
    parser.add_argument("--plan", dest="only_plan", action="store_true", help="only show what is left to do")
    parser.add_argument("--score", action="store_true", help="train nothing: score what is complete, write the page")
    parser.add_argument("--only", nargs="+", metavar="COMPARISON", help="train and score only these comparisons")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs that train at once (default: one for each core, "
                        "with one thread; on a GPU 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: docs/results/PLAN)")
    args = parser.parse_args()
    plan = load_plan(args.plan)
    out = args.out or Path("docs/results") / plan.name
    known = {comparison.name: comparison for comparison in plan.comparisons}
    unknown = [name for name in args.only or () if name not in known]
    if unknown:
        raise UserError(f"--only {unknown[0]}: {plan.path} has the comparisons {', '.join(known)}")
    chosen = [known[name] for name in args.only] if args.only else plan.comparisons
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1; it is {args.jobs}")
    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    jobs = args.jobs or (1 if on_gpu else cores())
    left = what_is_left(plan, chosen, out)
    print(show(plan, chosen, left, jobs), flush=True)
    if args.only_plan:
        return
    if args.score:
        score(plan, chosen, out)
    else:
        prepare(plan, left)
        for seed in plan.seeds:
            of_seed = [run for run in left if run.config.seed == seed]
            train(of_seed, jobs, 0 if on_gpu else max(1, cores() // jobs), f"train, seed {seed}")
            score(plan, chosen, out)
    print(f"wrote {out / 'results.md'}")


if __name__ == "__main__":
    run(main)
