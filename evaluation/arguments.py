"""Arguments that evaluate.py and receptive_field.py have in common, and the names of the folders that they write."""

from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.console import UserError
from common.files import file_name

if TYPE_CHECKING:  # parsing arguments needs no torch, whose import takes seconds
    from evaluation.candidates import Candidate

MAY_CHANGE = ("device", "data.root")  # settings of a trained model
ALWAYS_USED = ("runs", "traceback")
LONGEST_NAME = 120  # of a folder


def add_run_arguments(parser: ArgumentParser) -> None:
    """Which trained models, on which tiles, and how they compute."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders or checkpoint files, e.g. runs/dice_ce, "
                        f"and overrides (with a run only of {' and '.join(MAY_CHANGE)})")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|PATH", help="(default: %(default)s)")
    parser.add_argument("--split", choices=("test", "train", "all"), default="test", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto is bf16 where "
                        "the hardware has it (default: %(default)s)")
    parser.add_argument("--device", help="auto, cuda, cuda:N, mps or cpu (default: the run's)")


def runs_and_overrides(args: Namespace) -> tuple[list[str], list[str]]:
    """The positional arguments, told apart: a path that exists is a run, even with a = in its name."""
    runs = [argument for argument in args.runs if "=" not in argument or Path(argument).exists()]
    overrides = [argument for argument in args.runs if argument not in runs]
    if args.device:
        overrides.append(f"device={args.device}")
    return runs, overrides


def reject_unused(parser: ArgumentParser, args: Namespace, used: Collection[str], when: str) -> None:
    """Raise a `UserError` if an option was given that has no effect `when`, e.g. "with --theory"."""
    for name, value in vars(args).items():
        if name not in used and name not in ALWAYS_USED and value != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect {when}; leave it out")


def check_checkpoint_argument(args: Namespace, runs: Sequence[str]) -> None:
    """Reject a --checkpoint that cannot belong to these runs."""
    if len(runs) > 1 and args.checkpoint not in ("best", "last"):
        raise UserError("--checkpoint PATH goes with one run; to use a checkpoint of each of several runs, name the "
                        "checkpoint files instead of the run folders")
    files = [run for run in runs if Path(run).suffix == ".pt"]
    if files and args.checkpoint != "best":
        raise UserError(f"--checkpoint {args.checkpoint} goes with run folders, and {files[0]} is a checkpoint already")


def mark(value: object, default: object, form: str = "{}") -> str:
    """The part of a folder's name that says that an option is not the default; "" if it is."""
    return "" if value == default else form.format(value)


def output_folder(candidates: Sequence["Candidate"], of_one: str, of_several: str, marks: Sequence[str]) -> Path:
    """Where results go if no --out is given: RUN/`of_one`, or `of_several`-A-B-C beside the first run.

    The name ends with the `marks` that are not empty, so that other options do not replace these results.
    """
    first = candidates[0]
    names = [file_name(candidate.name.rpartition("/")[2]) for candidate in candidates]
    if len(candidates) > 1:
        folder, own = first.beside / f"{of_several}-{'-'.join(names)}"[:LONGEST_NAME], ""
    elif first.run:
        folder, own = first.run / of_one, mark(first.is_best, True, first.source.stem)
    else:
        folder, own = first.beside / f"{names[0]}-{of_one}", ""
    return folder.with_name("-".join(part for part in (folder.name, own, *marks) if part))
