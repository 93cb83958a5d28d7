"""Compare the speed of our code with that of plain PyTorch, NumPy and SciPy, side by side in one run.

    python -m tools.benchmark                                # on data/demo (tools/make_demo_data.py)
    python -m tools.benchmark --quick --json speed.json
    python -m tools.benchmark --device cuda --json speed.json

Machines are shared and noisy. Therefore the sides take turns, each in its own process, and the table shows medians and
the range of the ratios. If our scripts keep memory for reuse (common/memory.py), the plain way runs twice: column
`same` keeps memory too, column `shipped` does not. `roof` is the share of the hardware's limit (roofline.py).

    train_step       one step of the report's network on 16 crops of 256 x 256 (--quick: 4), ours from the store on
    ..._channels_last, ..._bf16, ..._both
                     only with --only: the plain training step with these parts of ours
    augmentation     cut a batch and augment it by all of configs/augmented.yaml, against the training step without it:
                     at a ratio of 20 augmentation adds at most 5 %; ..._demo: with the network, crops and batches of
                     configs/demo.yaml
    inference_512    500 x 500 tiles mirrored to 512 x 512, as evaluate.py does it with a thousand tiles or more;
                     ..._few: with fewer tiles; ..._float32: the exact mode
    ..._compiled     with --device cuda: train.compile=true, and compiled inference, which train.py and evaluate.py do
                     not do there by default
    ..._monai, _smp  the same against MONAI's BasicUNet and segmentation_models_pytorch's Unet(resnet34), if installed
                     (requirements-dev.txt)
    crops            256 x 256 crops of 500 x 500 tiles as uint8 on one core, against a DataLoader that reads compressed
                     npz files and normalises its samples; crops_normalised: ours normalised too
    snapshot         copy weights and Adam state and put them back, against deepcopy
    filter_check     Algorithm 1 on a decoded tile on one core, against the report's lines
    filter_register  find the shift and rotation of a mask on the coarse grid: by Fourier transforms, against loops over
                     all moves
    filter_pass      a tile from files to verdict on one core, against the original's way: decode, check, write what is
                     kept as compressed npz. Ours writes no npz, but also measures unmarked tissue and the mask's shift
    filter_judge     the same without npz on either side
    filter_workers   judge all tiles with one process and with two, including the start of the processes
    filter_memory    peak memory of the largest process that judges, for a tenth of the tiles and for all
    field_map        d logit / d input of one pixel of the report's network: on the smallest input that holds the field,
                     with a decoder that computes only the centre, channels last, bfloat16 if the hardware has it;
                     against float32 on a 256 x 256 input
    field_maps       the same for 64 pixels, several in one backward pass against one each
    field_float32    field_maps with float32 on both sides
    many_tiles       only with --only: filter, packing and start of training for 1,000, 10,000 and 100,000 small tiles
    epoch, scaling   with --device cuda or --only (hours on a CPU): the report's epoch, and the cost of a step by crop,
                     batch, widths and number of tiles; compiled on a GPU

The results are written after each benchmark, so that an interrupted run keeps them.
"""

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.console import Progress, UserError, argument_parser, percent, run, table
from common.files import write_text
from common.workers import cores, processor
from tools.benchmark.race import Race, Setting, Sides, compete, in_new_process

PACKAGES = ("torch", "numpy", "scipy", "pillow", "monai", "segmentation-models-pytorch")
PARTS = ("train_step_channels_last", "train_step_bf16", "train_step_both")
QUICK = ("train_step", "inference_512", "crops", "snapshot", "filter_check", "filter_pass", "field_map")
ONLY_BY_NAME = {"cpu": ("epoch", "scaling", "many_tiles", *PARTS), "cuda": ("many_tiles", *PARTS)}
ROUNDS, QUICK_ROUNDS = 5, 2  # or more (race.py)


def benchmarks(device: str) -> dict:
    """Return every benchmark by name: a race, or a function of a `Setting` that returns one row or several.

    Modules that need torch are imported in functions, because every process that the benchmark starts reads this file.
    """
    from tools.benchmark import fields, filtering, many_tiles, network, scaling

    return (network.races(device) | filtering.RACES | filtering.MEASUREMENTS | fields.RACES | scaling.MEASUREMENTS
            | many_tiles.MEASUREMENTS)


def rows_of(name: str, setting: Setting, sides: Sides) -> Iterator[dict]:
    """Run one benchmark and yield its rows."""
    task = benchmarks(setting.device)[name]
    if isinstance(task, Race):
        yield {"name": name, **compete(task, setting, QUICK_ROUNDS if setting.quick else ROUNDS, sides)}
        return
    found = task(setting)
    for row in [found] if isinstance(found, dict) else found:
        yield {"name": name, **row}


def with_roofline(row: dict, peaks: dict[str, float]) -> dict:
    """Return the row with GFLOP and shares of the roofline instead of lists of operations."""
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


def machine(setting: Setting) -> str:
    """Return the hardware and the versions of the packages as one line."""
    facts = [processor(), f"{cores()} cores", f"Python {platform.python_version()}"]
    if setting.device == "cuda":
        import torch

        facts.insert(0, torch.cuda.get_device_name())
    for package in PACKAGES:
        try:
            facts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            facts.append(f"no {package}")
    return ", ".join(facts)


def table_row(row: dict) -> list[str]:
    """Return the cells of a row for the table."""
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
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these benchmarks (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}, with fewer images, tiles and "
                        "rounds: a first impression in two minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    args = parser.parse_args()
    known = benchmarks(args.device)
    names = args.only or [name for name in known if name not in ONLY_BY_NAME[args.device]
                          and (name in QUICK or not args.quick)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no such benchmark here; expected some of {', '.join(known)}")
    if not (args.data / "truth.csv").is_file():
        raise UserError(f"{args.data}: no demo tiles; make them with `python -m tools.make_demo_data {args.data}`")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder; make it first")
    measure(names, Setting(args.data.resolve(), args.quick, args.device), args.json)


def measure(names: list[str], setting: Setting, out: Path | None) -> None:
    """Run benchmarks, print their table and write their rows. An interruption keeps the rows measured so far."""
    import torch

    from tools.benchmark import roofline

    if setting.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine, or this torch, has no CUDA GPU that can be used")
    description = machine(setting)
    print(description, flush=True)
    peaks, rows = in_new_process(roofline.peaks, setting), []

    def save() -> list[dict]:
        facts = {"device": setting.device, "quick": setting.quick, "machine": description, "peaks": peaks}
        finished = [with_roofline(row, peaks) | facts for row in rows]
        if out:
            write_text(out, json.dumps(finished, indent=2) + "\n")
        return finished

    try:
        with Progress("", len(names), "benchmark") as progress, Sides() as sides:
            for name in names:
                progress.title = name
                for row in rows_of(name, setting, sides):
                    rows.append(row)
                    save()
                progress.advance()
        if not setting.quick:  # another program may have disturbed the first time
            again = in_new_process(roofline.peaks, setting)
            peaks = {what: max(peak, again[what]) for what, peak in peaks.items()}
    finally:
        print(table(["benchmark", "ours", "baseline", "unit", "baseline / ours: same", "shipped", "GFLOP", "baseline",
                     "roof"], [table_row(row) for row in save()]))
        rates = [f"{peaks[dtype] / 1e9:,.0f} GFLOP/s in {dtype}" for dtype in ("float32", "bfloat16") if dtype in peaks]
        print(f"limits of the hardware: {', '.join(rates)}, {peaks['bytes'] / 1e9:,.0f} GB/s")
        if setting.quick:
            print("--quick gives a first impression; do not quote it")


if __name__ == "__main__":
    run(main)
