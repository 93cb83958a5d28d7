"""Receptive fields: what theory says exactly, and what a trained model looks at (report, section 6.4).

    python receptive_field.py runs/dice_ce
    python receptive_field.py runs/dice_ce runs/dice runs/small_dice_ce --format png pdf
    python receptive_field.py --theory --config configs/dice_ce.yaml
    python receptive_field.py --as-published

The first two measure |d logit / d input| by autograd on tiles, on zeros as in the report, on noise and before training
(fields/measurement.py), and write numbers and figures to RUN/receptive_field, those of several runs to
runs/receptive_field-A-B-C (fields/report.py lists them). --theory prints the exact field (common/geometry.py).
--as-published repeats the report's procedure, which gives 172, 84 and 116 pixels, and says why.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import geometry
from common.config import Config, Model, load_config
from common.console import UserError, argument_parser, run
from common.files import names, refuse_loss, replacing_folder
from common.memory import enough_memory, reuse_memory

if TYPE_CHECKING:  # --theory answers at once: torch, whose import takes seconds, is imported where it is needed
    from evaluation.entries import Entry
    from fields.report import Run

PIXELS = 32  # of each class
REPORTS = {"the report's large network": (32, 64, 128, 256, 512), "the report's small network": (32, 64, 128, 256)}
FORMATS = ("png", "pdf", "svg")


# ---------------------------------------------------------------------------------------------- theory

def architectures(folders: Sequence[str], config: str | None, overrides: Sequence[str]) -> dict[str, Config]:
    """The networks that are asked about, without their weights; where none is named, the report's two."""
    if config:
        return {config: load_config(config, overrides)}
    if overrides:
        raise UserError(f"{overrides[0]} changes a config: name one with --config, e.g. configs/dice_ce.yaml")
    if not folders:
        return {name: Config(model=Model(widths=widths)) for name, widths in REPORTS.items()}
    found = {}
    for name in folders:
        folder = Path(name).parent.parent if Path(name).suffix == ".pt" else Path(name)
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: no such run (it has no config.yaml)")
        found[name] = load_config(folder / "config.yaml")
    return found


def theory(networks: dict[str, Config]) -> str:
    return "\n\n".join(geometry.describe(f"{name} (model.widths {list(config.model.widths)})",
                                             len(config.model.widths)) for name, config in networks.items())


# ---------------------------------------------------------------------------------------------- with weights

def published(networks: dict[str, Config], entries: Sequence["Entry"]) -> str:
    """The report's procedure on trained models, or on untrained ones of these networks."""
    import torch

    from fields import report
    from training.runs import build_model

    models = {f"{entry.name}, epoch {entry.epoch}": entry.model for entry in entries}
    for name, config in networks.items():
        torch.manual_seed(0)
        models[f"{name}, untrained"] = build_model(config)
    return report.published(models)


def measured(entries: Sequence["Entry"], split: str, count: int) -> list["Run"]:
    """Every run on the tiles of its own data root; all that can be refused is refused before anything is computed."""
    from evaluation.entries import ask
    from fields import measurement
    from fields.report import Run

    asked = [ask([entry], split) for entry in entries]
    drawn = [measurement.draw_pixels(entry, questions, count)
             for entry, questions in zip(entries, asked, strict=True)]
    found = []
    for entry, questions, pixels in zip(entries, asked, drawn, strict=True):
        fields = measurement.measure_run(entry, questions, pixels, entry.precision)
        border = measurement.measure_border(entry, questions)
        found.append(Run(entry, questions, fields, border, entry.precision))
    return found


def destination(entries: Sequence["Entry"], split: str, pixels: int, precision: str) -> Path:
    """The folder named after what is measured and how."""
    from evaluation.entries import in_file_names

    first = entries[0]
    if len(entries) > 1:
        named = [in_file_names(entry.name.rpartition("/")[2]) for entry in entries]
        folder = first.beside / f"receptive_field-{'-'.join(named)}"[:120]
    else:
        folder = first.run / "-".join(["receptive_field", *([] if first.is_best else [first.source.stem])])
    kind = ["" if split == "test" else split, "" if precision == "auto" else precision,
            "" if pixels == PIXELS else f"pixels-{pixels}"]
    return folder.with_name("-".join(filter(None, [folder.name, *kind])))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders or checkpoint files, e.g. runs/dice_ce, "
                        "and overrides (with a run only of device and data.root)")
    parser.add_argument("--theory", action="store_true", help="print the exact field of --config, of runs, or of the "
                        "report's networks; needs no weights")
    parser.add_argument("--as-published", action="store_true", help="repeat the report's procedure on runs, or on "
                        "untrained networks")
    parser.add_argument("--config", metavar="YAML", help="whose network, for --theory and --as-published")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="(default: %(default)s)")
    parser.add_argument("--split", choices=("test", "train", "all"), default="test", help="(default: %(default)s)")
    parser.add_argument("--pixels", type=int, default=PIXELS, metavar="N", help="output pixels of each class "
                        "(default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto is bf16 where "
                        "the hardware has it (default: %(default)s)")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"], help="of the figures (default: png)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: RUN/receptive_field, or for several runs "
                        "receptive_field-A-B-C beside the first)")
    parser.add_argument("--device", help="auto, cuda, cuda:N, mps or cpu (default: the run's)")
    args = parser.parse_intermixed_args()
    reuse_memory()
    folders = [argument for argument in args.runs if "=" not in argument or Path(argument).exists()]
    overrides = [argument for argument in args.runs if argument not in folders]
    if args.config and (folders or not (args.theory or args.as_published)):
        raise UserError("--config goes with --theory or --as-published and without runs: a run knows its config")
    if args.theory and args.as_published:
        raise UserError("--theory and --as-published are two questions; ask one at a time")
    if args.theory or args.as_published:
        of_weights = () if args.as_published and folders else ("checkpoint", "device")
        for name in ("split", "pixels", "precision", "format", "out", *of_weights):
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name} is of the measurement: --theory does without, and --as-published takes "
                                "--checkpoint and --device at most, with runs")
    if args.pixels < 1:
        raise UserError(f"--pixels must be at least 1; it is {args.pixels}")
    if args.theory:
        print(theory(architectures(folders, args.config, overrides)))
        return
    if not folders and not args.as_published:
        raise UserError("no run given: name at least one run folder, e.g. runs/dice_ce; --theory and --as-published "
                        "need none")
    from evaluation.entries import distinct, trained

    if args.device:
        overrides.append(f"device={args.device}")
    entries = distinct([trained(Path(folder), args.checkpoint, overrides, flips=False, precision=args.precision)
                        for folder in folders])
    if args.as_published:
        print(published({} if folders else architectures([], args.config, overrides), entries))
        return
    out = args.out or destination(entries, args.split, args.pixels, args.precision)
    sources = [*(entry.source for entry in entries), *(Path(entry.config.data.root) for entry in entries)]
    refuse_loss(out, sources, None if args.out else sources)
    if out.is_dir() and any(out.iterdir()) and not (out / "fields.json").is_file():
        raise UserError(f"{out} would be replaced, but holds results of something else; choose another folder")
    from fields import report

    with enough_memory("close other programs, take --precision bf16, or measure on the CPU (--device cpu)"):
        found = measured(entries, args.split, args.pixels)
    with replacing_folder(out, sources) as partial:
        contents = report.write(partial, found, args.format)
    print(report.summary(contents))
    print(f"wrote {out}: {names(out)}")


if __name__ == "__main__":
    run(main)
