"""Write the page of a plan, OUT/results.md, and the pictures of each comparison from their numbers."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

from common import palette
from common.console import command, markdown_table, percent
from common.files import write_text
from evaluation.report import interval_cell
from tools.results import pictures
from tools.results.plan import Comparison, Plan
from training.run_folder import read_metrics_file

Table = tuple[list[str], list[list[str]]]  # header and rows


def write(out: Path, plan: Plan, found: dict[str, dict], metrics: Path) -> None:
    """Write the page from the numbers of comparisons by name, and the metrics.csv of their runs in folders by name.

    Comparisons without numbers are named. Pictures that need the runs were drawn into `out` when they were measured.
    """
    parts = [f"# {plan.title}", introduction(plan)]
    for comparison in plan.comparisons:
        parts += [f"## {comparison.name.replace('-', ' ').replace('_', ' ').capitalize()}", comparison.question]
        numbers = found.get(comparison.name)
        if numbers:
            parts += section(plan, comparison, numbers, out, metrics / comparison.name)
        else:
            call = command("python", "-m", "tools.results", plan.word, "--only", comparison.name)
            parts.append(f"Not run yet: `{call}`")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.md", "\n\n".join(parts) + "\n")


def introduction(plan: Plan) -> str:
    config = f"`{plan.config}`" + (f" with `{plan.settings}`" if plan.settings else "")
    return (f"Made by `{command('python', '-m', 'tools.results', plan.word)}` from its runs. All rows begin with "
            f"{config}. Dice is the hard Dice of all test pixels, as a mean over classes and seeds. Its 95 % interval "
            "holds the chance of slides or patients and, with several seeds, that of seeds. Differences are to the "
            "first row.")


def section(plan: Plan, comparison: Comparison, numbers: dict, out: Path, metrics: Path) -> list[str]:
    """Return the paragraphs of a comparison, and draw what its numbers show."""
    name = comparison.name
    palette.save(pictures.scores(numbers), out / f"{name}.png")
    parts = [description(plan, numbers), markdown_table(*scores(numbers)), settings(plan, comparison),
             f"![The mean Dice of each row with its interval, and of each seed]({name}.png)",
             f"Other scores. {OTHER_SCORES}", markdown_table(*other_scores(numbers))]
    show = numbers.get("show", [])
    if "curves" in show:
        histories = {row["row"]: [read_metrics_file(metrics / f"{run['name']}.csv") for run in row["runs"]]
                     for row in numbers["rows"]}
        palette.save(pictures.curves(histories), out / f"{name}-curves.png")
        parts += [f"![Training and validation loss of every run]({name}-curves.png)", CURVES,
                  markdown_table(*unrest(histories))]
    if "predictions" in show:
        parts += [f"*Predictions of the first seed, from tiles with low to tiles with high accuracy.*\n\n"
                  f"![Image, truth and the prediction of each row for some tiles]({name}-predictions.png)"]
    if "fields" in show:
        parts += [FIELDS, markdown_table(*fields(numbers)),
                  f"![Maps of the gradient of the first seed of each row]({name}-fields.png)"]
    return parts


def description(plan: Plan, numbers: dict) -> str:
    """Say of what and by what the numbers are."""
    runs = [run for row in numbers["rows"] for run in row["runs"]]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(run[name]) for run in runs}))

    days = sorted(run["started"][:10] for run in runs)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    seeds = f"seeds {', '.join(map(str, numbers['seeds']))}" if len(numbers["seeds"]) > 1 else (
        f"one seed, {numbers['seeds'][0]}: another one may differ as much as the rows do")
    groups = f" of {numbers['groups']} slides or patients" if numbers["groups"] else ""
    commits = ", ".join(sorted({(run["commit"] or "unknown")[:7] for run in runs}))
    others = f" (`{plan.test}`)" if plan.test else ""
    return (f"Test set: {numbers['tiles']} tiles{groups}{others}. {seeds[0].upper()}{seeds[1:]}. {all_of('device')}, "
            f"{all_of('threads')} thread(s) for each run, {all_of('precision')}, torch {all_of('torch')}, commit "
            f"{commits}, {when}.")


def scores(numbers: dict) -> Table:
    """Return the main table of a comparison."""
    classes, merges = numbers["classes"], list(numbers["rows"][0]["merged"])
    of_seeds = len(numbers["seeds"]) > 1
    header = ["", "Dice", "95 % interval", "difference", "95 % interval", *(["of each seed"] if of_seeds else []),
              *classes, *merges, "epochs", "s/epoch"]
    rows = []
    for row in numbers["rows"]:
        dice, difference = row["scores"]["dice"], row["difference_to_first"].get("dice", {}).get("mean")
        cells = [row["row"], _cell(dice["mean"]), interval_cell(dice["mean"], ".3f"), _cell(difference, "+.3f"),
                 interval_cell(difference, "+.3f")]
        if of_seeds:
            cells.append(", ".join(f"{run['scores']['dice']['mean']:.3f}" for run in row["runs"]))
        cells += [_cell(dice[name]) for name in classes]
        cells += [_cell(row["merged"][name]["dice"]) for name in merges]
        cells += [_range([run["epochs"] for run in row["runs"]]),
                  _range([round(run["seconds_per_epoch"]) for run in row["runs"]])]
        rows.append(cells)
    constant = numbers["best_constant"]
    rows.append([f"all {constant['class']}", f"{constant['dice_mean']:.3f}", *[""] * (len(header) - 2)])
    return header, rows


OTHER_SCORES = ("Soft Dice and accuracy are the report's DICE and ACC. HD95 is the 95th percentile of the distance "
                "between the outlines of truth and prediction, as a mean over tiles and classes. Differences are to "
                "the first row, with their 95 % intervals.")


def other_scores(numbers: dict) -> Table:
    """Return the table of the report's scores, of distances and of calibration."""
    header = ["", "soft Dice", "difference", "accuracy", "difference", "HD95 px", "difference", "calibration error"]
    has_blank = any("blank" in run for row in numbers["rows"] for run in row["runs"])
    rows = []
    for row in numbers["rows"]:
        cells = [row["row"]]
        for name, form in (("soft_dice", ".3f"), ("pixel_accuracy", ".3f"), ("tile_hd95", ".1f")):
            score, difference = (_of_mean(part.get(name)) for part in (row["scores"], row["difference_to_first"]))
            cells += [_cell(score, form), _with_interval(difference, f"+{form}")]
        cells.append(_cell(row["scores"].get("ece")))
        if has_blank:
            values = [run["blank"] for run in row["runs"] if run.get("blank") is not None]
            cells.append(", ".join(percent(value) for value in values))
        rows.append(cells)
    return [*header, *(["blank spots in tissue that are called background, by seed"] if has_blank else [])], rows


CURVES = ("Unrest is the sum of all rises of the validation loss from epoch to epoch, as a share of its fall from the "
          "first epoch to its minimum: 0 is a loss that only falls. It does not depend on the scale of a loss.")


def unrest(histories: dict[str, list[list[dict]]]) -> Table:
    """Return a table of the best epochs of each row, and of how unsteady the validation loss is."""
    rows = []
    for row, runs in histories.items():
        losses = [[epoch["val_loss"] for epoch in history] for history in runs]
        best = [str(1 + of_run.index(min(of_run))) for of_run in losses]
        rises = [sum(max(0.0, after - before) for before, after in pairwise(of_run)) / (of_run[0] - min(of_run))
                 if of_run[0] > min(of_run) else float("inf") for of_run in losses]
        rows.append([row, ", ".join(best), ", ".join(f"{value:.2f}" for value in rises), f"{mean(rises):.2f}"])
    return ["", "best epochs", "unrest of each seed", "mean"], rows


FIELDS = ("Effective receptive fields of the first seed: the radius r95 in pixels of the disc that holds 95 % of the "
          "squared gradient, each pixel counting equally, and which share of gradient x activation comes by each path "
          "([Receptive fields](../../receptive-fields.md)). Level 1 is the finest one.")


def fields(numbers: dict) -> Table:
    """Return the table of effective receptive fields."""
    measured = {row["row"]: row["runs"][0]["fields"] for row in numbers["rows"] if "fields" in row["runs"][0]}
    inside = [name for name in (*numbers["classes"], "all") if any(name in found["r95"] for found in measured.values())]
    paths = list(dict.fromkeys(path for found in measured.values() for path in found["paths"]))
    rows = [[row, " or ".join(map(str, found["theory_px"])),
             *(_number(found["r95"].get(name), ".1f") for name in inside), _number(found["r95_untrained"], ".1f"),
             *(_number(found["paths"].get(path), ".1%") for path in paths)] for row, found in measured.items()]
    return ["", "theory px", *(f"r95 in {name}" for name in inside), "before training", *paths], rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _of_mean(score: dict | None) -> dict | None:
    return score.get("mean", score) if score else None


def _cell(score: dict | None, form: str = ".3f") -> str:
    return "" if not score or score["value"] is None else format(score["value"], form)


def _with_interval(score: dict | None, form: str) -> str:
    interval = interval_cell(score, form)
    return _cell(score, form) + (f" ({interval})" if interval else "")


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def settings(plan: Plan, comparison: Comparison) -> str:
    """List the settings of each row, and the name that the plan gives it if that is another one."""
    return "\n".join(f"- {label}{f' ({row})' if row != label else ''}: " + ", ".join([
        *([f"{plan.networks[row]} (tools/other_networks.py)"] if row in plan.networks else []),
        *([f"`{plan.rows[row]}`"] if plan.rows[row] else [])] or ["nothing else"])
        for label, row in zip(comparison.labels, comparison.rows, strict=True))
