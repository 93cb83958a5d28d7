"""Define the arguments that evaluate.py and receptive_field.py share, and name the folders that they write."""

from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.console import UserError
from common.files import file_name

if TYPE_CHECKING:  # torch takes seconds to import, and parsing arguments does not need it
    from evaluation.candidates import Candidate

MAY_CHANGE = ("device", "data.root", "data.cache")  # settings of a trained model that an override may change
ALWAYS_USED = ("runs", "traceback")
LONGEST_NAME = 120  # characters in the name of a folder


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that choose trained models, tiles, precision and device."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders or checkpoint files, e.g. runs/dice_ce, "
                        f"and overrides (with a run only of {', '.join(MAY_CHANGE)})")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|PATH", help="(default: %(default)s)")
    parser.add_argument("--split", choices=("test", "train", "all"), default="test", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto is bf16 where "
                        "the hardware supports it (default: %(default)s)")
    parser.add_argument("--device", help="auto, cuda, cuda:N, mps or cpu (default: the run's)")


def runs_and_overrides(args: Namespace) -> tuple[list[str], list[str]]:
    """Split the positional arguments. A path that exists is a run, even if its name contains "="."""
    runs = [argument for argument in args.runs if "=" not in argument or Path(argument).exists()]
    overrides = [argument for argument in args.runs if argument not in runs]
    if args.device:
        overrides.append(f"device={args.device}")
    return runs, overrides


def run_folder_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint file, which lies in it or in its folder checkpoints."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def reject_unused(parser: ArgumentParser, args: Namespace, used: Collection[str], when: str) -> None:
    """Raise a `UserError` if an option was given that has no effect `when`, e.g. "with --theory"."""
    for name, value in vars(args).items():
        if name not in used and name not in ALWAYS_USED and value != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect {when}; leave it out")


def check_checkpoint_argument(args: Namespace, runs: Sequence[str]) -> None:
    """Raise a `UserError` if --checkpoint cannot belong to these runs."""
    if len(runs) > 1 and args.checkpoint not in ("best", "last"):
        raise UserError("--checkpoint PATH works with one run; to use a checkpoint of each of several runs, name the "
                        "checkpoint files instead of the run folders")
    files = [run for run in runs if Path(run).suffix == ".pt"]
    if files and args.checkpoint != "best":
        raise UserError(f"--checkpoint {args.checkpoint} works with run folders, but {files[0]} is a checkpoint file; "
                        "leave --checkpoint out")


def mark(value: object, default: object, form: str = "{}") -> str:
    """Return the part of a folder's name that says that an option is not the default, or "" if it is."""
    return "" if value == default else form.format(value)


def output_folder(candidates: Sequence["Candidate"], of_one: str, of_several: str, marks: Sequence[str]) -> Path:
    """Return the folder of results if there is no --out: RUN/`of_one`, or `of_several`-A-B-C beside the first run.

    The name ends with the `marks` that are not empty, so that other options do not replace these results.
    """
    first, checkpoint = candidates[0], ""
    names = [file_name(candidate.name.rpartition("/")[2]) for candidate in candidates]
    if len(candidates) > 1:
        folder = first.parent_folder / f"{of_several}-{'-'.join(names)}"[:LONGEST_NAME]
    elif first.run:
        folder, checkpoint = first.run / of_one, "" if first.is_best else first.source.stem
    else:
        folder = first.parent_folder / f"{names[0]}-{of_one}"
    return folder.with_name("-".join(part for part in (folder.name, checkpoint, *marks) if part))
