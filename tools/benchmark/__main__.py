"""How fast is it? Ours against the plain way, side by side in one run.

    python -m tools.benchmark                                # on data/demo (tools/make_demo_data.py)
    python -m tools.benchmark --quick --json speed.json
    python -m tools.benchmark --device cuda --json speed.json

Machines are shared and noisy: the sides take turns, each in a process of its own, and the table quotes medians and the
range of the ratios. Where our scripts keep memory (memory.reuse_memory), the plain way runs twice: `same` with that
too, and `shipped` as it comes. `roof` is the share of what the hardware could do at most (roofline.py).

    train_step       one step of the report's network on 16 crops of 256 x 256 (--quick: 4), ours from the store on
    ..._channels_last, _bf16, _both   named only: the plain training step with these parts of ours
    inference_512    500 x 500 tiles mirrored to 512 x 512, as evaluate.py does it with a thousand tiles or more;
                     ..._few: with fewer; ..._float32: the exact mode
    ..._compiled     with --device cuda: train.compile=true, and compiled inference, which train.py and evaluate.py do
                     not do there unasked
    ..._monai, _smp  the same against MONAI's BasicUNet and segmentation_models_pytorch's Unet(resnet34), if installed
                     (requirements-dev.txt)
    crops            256 x 256 crops of 500 x 500 tiles as uint8, one core; against a DataLoader of compressed npz files
                     whose samples come normalised; crops_normalised: ours normalised too
    snapshot         copy weights and Adam state and put them back; against deepcopy
    filter_check     Algorithm 1 on a decoded tile, one core: scipy's float64 Gaussian, line by line
    filter_pass      a tile from files to verdict, one core: the original's path of decoding, check and compressed npz
                     of what is kept; ours writes no npz, and measures the other direction and the mask's shift besides
    filter_judge     the same, with no npz on either side
    filter_workers   judging all tiles on one process and on two, start of the processes included
    filter_memory    peak memory of the largest process that judges, for a tenth of the tiles and for all
    filter_verdicts  verdicts of Algorithm 1 on borderline variants of the tiles that differ from the literal ones
    field_map        d logit / d input of one pixel of the report's network: on the smallest input that holds the field,
                     with a decoder that computes the centre only, channels last, bfloat16 where the hardware has it;
                     against float32 on a 256 x 256 input
    field_maps       the same for 64 pixels, several in one backward pass against one each
    field_float32    field_maps with float32 on both sides
    epoch, scaling   with --device cuda, or named (hours on a CPU): the report's epoch, and what a step costs by crop,
                     batch, widths and tiles; on a GPU compiled

What was measured is written after each benchmark, so that an interrupted run keeps what it has.
"""

import json
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.console import Progress, UserError, argument_parser, percent, run, table
from common.files import write_text
from common.workers import cores
from tools.benchmark.race import Race, Setting, Sides, compete, in_new_process

PACKAGES = ("torch", "numpy", "scipy", "pillow", "monai", "segmentation-models-pytorch")
PARTS = ("train_step_channels_last", "train_step_bf16", "train_step_both")
QUICK = ("train_step", "inference_512", "crops", "snapshot", "filter_check", "filter_pass", "filter_verdicts",
         "field_map")
ONLY_BY_NAME = {"cpu": ("epoch", "scaling", *PARTS), "cuda": PARTS}
ROUNDS, QUICK_ROUNDS = 5, 2  # at least


def benchmarks(device: str) -> dict:
    """Every benchmark by name: a race, or a function of a `Setting` that gives one row or several.

    Modules that need torch are imported in functions, since every process that the benchmark starts reads this file.
    """
    from tools.benchmark import fields, filtering, network, scaling

    return network.races(device) | filtering.RACES | filtering.MEASUREMENTS | fields.RACES | scaling.MEASUREMENTS


def rows_of(name: str, setting: Setting, sides: Sides) -> Iterator[dict]:
    task = benchmarks(setting.device)[name]
    if isinstance(task, Race):
        yield {"name": name, **compete(task, setting, QUICK_ROUNDS if setting.quick else ROUNDS, sides)}
        return
    found = task(setting)
    for row in [found] if isinstance(found, dict) else found:
        yield {"name": name, **row}


def weighed(row: dict, peaks: dict[str, float]) -> dict:
    """The row with FLOP and shares of the roofline in the place of lists of operations."""
    from tools.benchmark import roofline

    scale = 1000 if row["unit"].startswith("ms") else 1
    row = dict(row)
    for side in ("ours", "baseline"):
        work = row.pop(f"work_{side}", None)
        if work:
            items = row.pop(f"items_{side}")
            row[f"gflop_{side}"] = roofline.flop(work) / 1e9 / items
            row[f"roofline_{side}"] = scale * roofline.bound(work, peaks) / items / row[side]
    return row


def processor() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return named.group(1) if named else platform.processor() or platform.machine()


def machine(setting: Setting) -> str:
    """What it was measured on."""
    found = [processor(), f"{cores()} cores", f"Python {platform.python_version()}"]
    if setting.device == "cuda":
        import torch

        found.insert(0, torch.cuda.get_device_name())
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def describe(row: dict) -> list[str]:
    def ratio(which: str) -> str:
        if row[f"ratio_{which}"] is None:
            return ""
        low, high = row[f"range_{which}"]
        return f"{row[f'ratio_{which}']:.2f} ({low:.2f} to {high:.2f})"

    def number(name: str) -> str:
        return "" if row.get(name) is None else f"{row[name]:.3g}"

    same, shipped = ratio("same_allocator"), ratio("as_shipped")
    unit = row["unit"] + (f" of {row['batch_ours']}" if "batch_ours" in row else "")
    return [row["name"], number("ours"), number("baseline"), unit, same, "" if shipped == same else shipped,
            number("gflop_ours"), number("gflop_baseline"),
            percent(row["roofline_ours"]) if "roofline_ours" in row else ""]


def main() -> None:
    parser = argument_parser(__doc__, prog="python -m tools.benchmark")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), metavar="DIR",
                        help="folder of demo tiles (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the above (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}, with fewer images, tiles and "
                        "rounds: a first impression in two minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    known = benchmarks(args.device)
    names = args.only or [name for name in known if name not in ONLY_BY_NAME[args.device]
                          and (name in QUICK or not args.quick)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no such benchmark here; expected some of {', '.join(known)}")
    if not (args.data / "truth.csv").is_file():
        raise UserError(f"{args.data}: no demo tiles; `python -m tools.make_demo_data {args.data}` makes them")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder; make it first")
    measure(names, Setting(args.data.resolve(), args.quick, args.device), args.json)


def measure(names: list[str], setting: Setting, out: Path | None) -> None:
    """Run benchmarks, print their table, write their rows: also of those that an interruption lets finish."""
    import torch

    from tools.benchmark import roofline

    if setting.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine, or this torch, has no CUDA GPU that can be used")
    named = machine(setting)
    print(named, flush=True)
    peaks, rows = in_new_process(roofline.peaks, setting), []

    def save() -> list[dict]:
        facts = {"device": setting.device, "quick": setting.quick, "machine": named, "peaks": peaks}
        found = [weighed(row, peaks) | facts for row in rows]
        if out:
            write_text(out, json.dumps(found, indent=2) + "\n")
        return found

    try:
        with Progress("", len(names), "benchmark") as progress, Sides() as sides:
            for name in names:
                progress.title = name
                for row in rows_of(name, setting, sides):
                    rows.append(row)
                    save()
                progress.advance()
        if not setting.quick:  # a neighbour may have disturbed the first time
            again = in_new_process(roofline.peaks, setting)
            peaks = {what: max(peak, again[what]) for what, peak in peaks.items()}
    finally:
        print(table(["benchmark", "ours", "baseline", "unit", "baseline / ours: same", "shipped", "GFLOP", "baseline",
                     "roof"], [describe(row) for row in save()]))
        rates = [f"{peaks[dtype] / 1e9:,.0f} GFLOP/s in {dtype}" for dtype in ("float32", "bfloat16") if dtype in peaks]
        print(f"at most {', '.join(rates)}, {peaks['bytes'] / 1e9:,.0f} GB/s"
              + ("; --quick is a first impression, not to be quoted" if setting.quick else ""))


if __name__ == "__main__":
    run(main)
