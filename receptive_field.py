"""Print the exact receptive field of a network, and measure which pixels a trained model uses (report, section 6.4).

    python receptive_field.py runs/dice_ce
    python receptive_field.py runs/dice_ce runs/dice runs/small_dice_ce --format png pdf
    python receptive_field.py --theory --config configs/dice_ce.yaml
    python receptive_field.py --as-published

The first two measure |d logit / d input| by autograd on tiles, on zeros as in the report, on noise and before training.
They write numbers and figures to RUN/receptive_field, those of several runs to runs/receptive_field-A-B-C
(fields/report.py lists the files). --theory prints the exact field (common/geometry.py). --as-published repeats the
report's procedure, which gives 172, 84 and 116 pixels, and says why.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import Config, Model
from common.config_files import load_config
from common.console import UserError, argument_parser, run
from common.memory import enough_memory, reuse_memory
from common.result_folders import check_replaceable, names_in, replacing_folder
from evaluation import arguments
from evaluation.arguments import mark
from fields import theory

if TYPE_CHECKING:  # --theory must print at once: torch takes seconds to import, so functions import what needs it
    from evaluation.candidates import Candidate
    from fields.numbers import MeasuredRun

PIXELS = 32  # of each class
REPORT_NETWORKS = {"the report's large network": (32, 64, 128, 256, 512),
                   "the report's small network": (32, 64, 128, 256)}
FORMATS = ("png", "pdf", "svg")
LESS_MEMORY = "close other programs, use --precision bf16, or measure on the CPU (--device cpu)"


def parser_of_arguments() -> ArgumentParser:
    parser = argument_parser(__doc__)
    arguments.add_run_arguments(parser)
    parser.add_argument("--theory", action="store_true", help="print the exact field of --config, of runs, or of the "
                        "report's networks; needs no weights")
    parser.add_argument("--as-published", action="store_true", help="repeat the report's procedure on runs, or on "
                        "untrained networks")
    parser.add_argument("--config", metavar="YAML", help="whose network, for --theory and --as-published")
    parser.add_argument("--pixels", type=int, default=PIXELS, metavar="N", help="output pixels of each class "
                        "(default: %(default)s)")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"], help="of the figures (default: png)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: RUN/receptive_field, or for several runs "
                        "receptive_field-A-B-C beside the first)")
    return parser


def check_arguments(parser: ArgumentParser, args: Namespace, runs: Sequence[str]) -> None:
    """Reject arguments that do not go together, before anything is read."""
    if args.theory:
        arguments.reject_unused(parser, args, ("theory", "config"), "with --theory")
    elif args.as_published:
        with_weights = ("checkpoint", "device") if runs else ()
        arguments.reject_unused(parser, args, ("as_published", "config", *with_weights), "with --as-published")
    elif not runs:
        raise UserError("no run given: name at least one run folder, e.g. runs/dice_ce, or use --theory or "
                        "--as-published")
    if args.config and (runs or not (args.theory or args.as_published)):
        raise UserError("--config has no effect with a run, which has its own config; leave it out")
    arguments.check_checkpoint_argument(args, runs)
    if args.pixels < 1:
        raise UserError(f"--pixels must be at least 1; it is {args.pixels}")


def default_folder(candidates: Sequence["Candidate"], args: Namespace) -> Path:
    """Return the output folder, named after what is measured and how."""
    return arguments.output_folder(candidates, "receptive_field", "receptive_field", [
        mark(args.split, "test"), mark(args.precision, "auto"), mark(args.pixels, PIXELS, "pixels-{}")])


def architectures(folders: Sequence[str], config: str | None, overrides: Sequence[str]) -> dict[str, Config]:
    """Return the networks of a config or of runs, without weights; those of the report if neither is given."""
    if config:
        return {config: load_config(config, overrides)}
    if overrides:
        raise UserError(f"{overrides[0]} changes a config: name one with --config, e.g. configs/dice_ce.yaml")
    if not folders:
        return {name: Config(model=Model(widths=widths)) for name, widths in REPORT_NETWORKS.items()}
    configs = {}
    for name in folders:
        folder = arguments.run_folder_of(Path(name)) if Path(name).suffix == ".pt" else Path(name)
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: no such run (it has no config.yaml)")
        configs[name] = load_config(folder / "config.yaml")
    return configs


def read_candidates(args: Namespace, runs: Sequence[str], overrides: Sequence[str]) -> list["Candidate"]:
    from evaluation.candidates import candidate_of_run, with_distinct_names

    return with_distinct_names([candidate_of_run(Path(folder), args.checkpoint, overrides, flips=False,
                                                 precision=args.precision) for folder in runs])


def published_procedure(networks: dict[str, Config], candidates: Sequence["Candidate"]) -> str:
    """Return what the report's procedure prints for trained models, and for these networks without training."""
    import torch

    from fields.published import describe_published
    from training.checkpoints import build_model

    models = {f"{candidate.name}, epoch {candidate.epoch}": candidate.model for candidate in candidates}
    for name, config in networks.items():
        torch.manual_seed(0)
        models[f"{name}, untrained"] = build_model(config)
    return describe_published(models)


def measure_runs(candidates: Sequence["Candidate"], split: str, count: int) -> list["MeasuredRun"]:
    """Measure every run on the tiles of its own data root; all inputs are checked before the first computation."""
    from evaluation.test_set import open_test_set
    from fields import borders, gradients, sampling
    from fields.numbers import MeasuredRun

    test_sets = [open_test_set([candidate], split) for candidate in candidates]
    drawn = [sampling.draw_pixels(*pair, count) for pair in zip(candidates, test_sets, strict=True)]
    return [MeasuredRun(candidate, test_set, gradients.measure_run(candidate, test_set, pixels),
                        borders.measure_border(candidate, test_set))
            for candidate, test_set, pixels in zip(candidates, test_sets, drawn, strict=True)]


def measure_and_write(candidates: Sequence["Candidate"], args: Namespace) -> None:
    from fields import report

    out = args.out or default_folder(candidates, args)
    sources = [*(candidate.source for candidate in candidates),
               *(Path(candidate.config.data.root) for candidate in candidates)]
    lists = [candidate.config.data.list_folder for candidate in candidates]
    check_replaceable(out, [*sources, *lists], None if args.out else sources)
    if out.is_dir() and any(out.iterdir()) and not (out / "fields.json").is_file():
        raise UserError(f"{out} would be replaced, but contains results of another command; choose another folder")
    with enough_memory(LESS_MEMORY):
        measured = measure_runs(candidates, args.split, args.pixels)
    with replacing_folder(out, sources) as partial:
        contents = report.write(partial, measured, args.format)
    print(report.summary(contents))
    print(f"wrote {out}: {names_in(out)}")


def main() -> None:
    parser = parser_of_arguments()
    args = parser.parse_intermixed_args()
    reuse_memory()
    runs, overrides = arguments.runs_and_overrides(args)
    check_arguments(parser, args, runs)
    if args.theory:
        networks = architectures(runs, args.config, overrides)
        print("\n\n".join(theory.describe(f"{name} (model.widths {list(config.model.widths)})",
                                          len(config.model.widths)) for name, config in networks.items()))
    elif args.as_published:
        networks = {} if runs else architectures([], args.config, overrides)
        print(published_procedure(networks, read_candidates(args, runs, overrides)))
    else:
        measure_and_write(read_candidates(args, runs, overrides), args)


if __name__ == "__main__":
    run(main)
