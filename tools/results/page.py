"""Write the page of a plan, OUT/results.md, and a picture of each comparison from their numbers."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from common import palette
from common.console import command, markdown_table
from common.files import write_text
from evaluation.report import interval_cell
from tools.results.plan import Comparison, Plan

CLOSE = 0.02  # of the mean Dice: the least space beside the points of a picture


def write(out: Path, plan: Plan, found: dict[str, dict]) -> None:
    """Write the page from the numbers of comparisons by name; comparisons without numbers are named."""
    parts = [f"# {plan.title}", introduction(plan)]
    for comparison in plan.comparisons:
        parts += [f"## {comparison.name.replace('-', ' ').replace('_', ' ').capitalize()}", comparison.question]
        numbers = found.get(comparison.name)
        if numbers is None:
            parts.append("Not run yet.")
            continue
        palette.save(picture(numbers), out / f"{comparison.name}.png")
        parts += [description(numbers), markdown_table(*table(numbers)), settings(plan, comparison),
                  f"![The mean Dice of each row with its interval, and of each seed]({comparison.name}.png)"]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.md", "\n\n".join(parts) + "\n")


def introduction(plan: Plan) -> str:
    config = f"`{plan.config}`" + (f" with `{plan.settings}`" if plan.settings else "")
    return (f"Made by `{command('python', '-m', 'tools.results', plan.word)}` from its runs. All rows begin with "
            f"{config}. Dice is the hard Dice of all test pixels, as a mean over classes and seeds. Its 95 % interval "
            "holds the chance of slides or patients and, with several seeds, that of seeds. Differences are to the "
            "first row.")


def description(numbers: dict) -> str:
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
    return (f"Test set: {numbers['tiles']} tiles{groups}. {seeds[0].upper()}{seeds[1:]}. {all_of('device')}, "
            f"{all_of('threads')} thread(s) for each run, {all_of('precision')}, torch {all_of('torch')}, commit "
            f"{commits}, {when}.")


def table(numbers: dict) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of a comparison."""
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


def _cell(score: dict | None, form: str = ".3f") -> str:
    return "" if not score or score["value"] is None else format(score["value"], form)


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def settings(plan: Plan, comparison: Comparison) -> str:
    """List the settings of each row."""
    return "\n".join(f"- {row}: " + (f"`{plan.rows[row]}`" if plan.rows[row] else "nothing else")
                     for row in comparison.rows)


def picture(numbers: dict) -> Figure:
    """Draw the mean Dice of each row with its interval as a line, and that of each seed as a small point."""
    rows = numbers["rows"]
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(rows)), dpi=110, layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        mean, colour = row["scores"]["dice"]["mean"], palette.SERIES[place % len(palette.SERIES)]
        if mean["low"] is not None:
            axis.plot([mean["low"], mean["high"]], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot(mean["value"], place, "o", color=colour, markersize=8)
        seeds = [run["scores"]["dice"]["mean"] for run in row["runs"]]
        if len(seeds) > 1:
            axis.plot(seeds, [place + 0.22] * len(seeds), "|", color=colour, markersize=8, markeredgewidth=1.5)
    axis.axvline(rows[0]["scores"]["dice"]["mean"]["value"], color="grey", linestyle=":", linewidth=1)
    axis.set(yticks=range(len(rows)), yticklabels=[row["row"] for row in rows], ylim=(len(rows) - 0.5, -0.5),
             xlabel="mean Dice, 95 % interval" + ("; short lines: each seed" if len(numbers["seeds"]) > 1 else ""))
    low, high = axis.get_xlim()
    axis.set_xlim(max(0, low - CLOSE), min(1, high + CLOSE))
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
