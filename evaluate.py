"""Score trained models on tiles that training never saw, compare them, and show their errors (report, section 6).

    python evaluate.py runs/dice_ce
    python evaluate.py runs/ce runs/wce runs/dice runs/dice_ce --flips
    python evaluate.py runs/dice_ce --predictions other_tool/labels
    python evaluate.py --predictions other_tool/labels --config configs/dice_ce.yaml
    python evaluate.py runs/demo-seed0 runs/demo-seed1 runs/demo-seed2 --merge gland=tissue,tumour
    python evaluate.py runs/dice_ce --images FOLDER
    torchrun --nproc-per-node 4 evaluate.py runs/dice_ce

Tiles are mirrored up to the size that the network takes, and predictions are cropped back. The network computes in
bfloat16 if the hardware supports it; --precision float32 is exact (docs/performance.md compares both). Scores, tables,
pictures and a page go to RUN/evaluation (evaluation/report.py lists the files), those of several runs to
runs/comparison-A-B-C. Runs that differ only in their seed become one row, the mean over seeds. --images needs no masks:
it writes label images, overlays and the areas of the classes to RUN/predictions-FOLDER.
"""

import hashlib
import math
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from common import ranks
from common.config_files import load_config
from common.console import UserError, argument_parser, run, warn
from common.files import file_name
from common.memory import enough_memory, reuse_memory
from common.result_folders import check_replaceable, names_in, replacing_folder
from dataset import found_in
from evaluation import arguments, page, report, unlabelled
from evaluation.arguments import mark
from evaluation.candidates import (
    Candidate,
    candidate_of_labels,
    candidate_of_run,
    ensemble_of,
    with_distinct_names,
)
from evaluation.experiments import explain_separate_seeds
from evaluation.results import Evaluation, Merge
from evaluation.scoring import score
from evaluation.test_set import TestSet, open_test_set, tiles_of_split

TOLERANCE = 3.0  # pixels
PICTURES = 5
MOST_PICTURES = 50  # rows of tiles.png
LESS_MEMORY = "close other programs, give smaller images (--images), or compute on the CPU (--device cpu)"


def evaluate(candidates: Sequence[Candidate], test_set: TestSet, out: Path, tolerance: float = TOLERANCE,
             keys: Sequence[str] = (), pictures: int = PICTURES, merges: Sequence[Merge] = (),
             part_of: str = "") -> dict:
    """Score every candidate, replace the folder `out`, and return the contents of scores.json.

    With several ranks the first one alone writes and returns them.
    """
    report.reject_unknown_keys(test_set, keys)
    with replacing_folder(out, sources_of(candidates)) if ranks.is_first() else nullcontext(out) as partial:
        scored = [score(candidate, test_set, tolerance, partial / "predictions" / file_name(candidate.name))
                  for candidate in candidates]
        if not ranks.is_first():
            return {}
        tallies, label_images = (list(parts) for parts in zip(*scored, strict=True))
        evaluation = Evaluation(test_set, list(candidates), tallies, label_images, tolerance, tuple(merges), part_of)
        contents = report.write(partial, evaluation, keys, pictures)
        page.write(partial, evaluation, contents)
    return contents


def sources_of(candidates: Sequence[Candidate]) -> list[Path]:
    """Return what an evaluation is made from; a later evaluation may replace results of the same sources."""
    sources = [source for candidate in candidates for source in candidate.sources]
    return [*dict.fromkeys(sources), Path(candidates[0].config.data.root)]


# ---------------------------------------------------------------------------------------------- arguments

def parser_of_arguments() -> ArgumentParser:
    parser = argument_parser(__doc__)
    arguments.add_run_arguments(parser)
    parser.add_argument("--flips", action="store_true", help="average over the 8 flips and turns (8 times the time)")
    parser.add_argument("--predictions", action="append", default=[], metavar="FOLDER",
                        help="label images of another tool: a folder, or a pattern with {key} in it; can be repeated")
    parser.add_argument("--config", metavar="YAML", help="describes the tiles, for --predictions without a run")
    parser.add_argument("--ensemble", action="store_true", help="also score the mean of the probabilities of all runs")
    parser.add_argument("--merge", action="append", default=[], metavar="NAME=CLASS,CLASS", help="also score these "
                        "classes as one, against the rest, e.g. gland=tissue,tumour; can be repeated")
    parser.add_argument("--by", default="", metavar="REGEX", help="with --merge: also for each part that this regular "
                        "expression finds in the keys")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="predict images that have no masks")
    parser.add_argument("--tiles", nargs="+", default=[], metavar="KEY", help="the tiles of tiles.png")
    parser.add_argument("--pictures", type=int, default=PICTURES, metavar="N", help="without --tiles: number of tiles, "
                        "from the worst to the best, in tiles.png (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="PX", help="tolerance of the surface "
                        "Dice (default: %(default)g)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: RUN/evaluation, "
                        "RUN/predictions-FOLDER, or for several runs comparison-A-B-C beside the first)")
    return parser


def check_arguments(parser: ArgumentParser, args: Namespace, runs: Sequence[str]) -> None:
    """Raise a `UserError` for arguments that do not work together, before any file is read."""
    if args.images:
        if len(runs) != 1 and not (args.ensemble and runs):
            raise UserError("--images takes one run, or several with --ensemble: python evaluate.py RUN --images "
                            "FOLDER")
        used = ("images", "checkpoint", "flips", "ensemble", "precision", "device", "out")
        arguments.reject_unused(parser, args, used, "with --images")
    elif runs and args.config:
        raise UserError("--config has no effect with a run, which has its own config; leave it out")
    elif not runs and args.predictions:
        used = ("predictions", "config", "split", "tiles", "pictures", "tolerance", "merge", "by", "device", "out")
        arguments.reject_unused(parser, args, used, "without a run: label images are scored as they are")
        if not args.config:
            raise UserError("--predictions without a run needs --config, which describes the tiles and mask values")
    elif not runs:
        hint = "; name it before --tiles, because the words after --tiles are keys" if args.tiles else ""
        raise UserError(f"no run given: name at least one run folder, e.g. runs/dice_ce{hint}")
    arguments.check_checkpoint_argument(args, runs)
    if args.ensemble and len(runs) < 2:
        raise UserError("--ensemble averages several runs: python evaluate.py RUN RUN --ensemble")
    if args.by and not args.merge:
        raise UserError("--by has no effect without --merge, e.g. --merge gland=tissue,tumour; leave it out")
    try:
        re.compile(args.by)
    except re.error as error:
        raise UserError(f"--by '{args.by}' is not a regular expression: {error}") from None
    if not 1 <= max(args.pictures, len(args.tiles)) <= MOST_PICTURES or args.pictures < 1:
        raise UserError(f"--pictures and --tiles draw 1 to {MOST_PICTURES} tiles; report.html shows all of them")
    if not 0 <= args.tolerance < math.inf:
        raise UserError(f"--tolerance must be a number of pixels, 0 or more; it is {args.tolerance:g}")


def read_candidates(args: Namespace, runs: Sequence[str], overrides: Sequence[str]) -> list[Candidate]:
    """Load and check every run and every folder of predictions."""
    candidates = [candidate_of_run(Path(folder), args.checkpoint, overrides, args.flips, args.precision)
                  for folder in runs]
    if args.ensemble:
        ensemble = ensemble_of(with_distinct_names(candidates))
        candidates = [ensemble] if args.images else [*candidates, ensemble]
    if args.predictions:
        config = candidates[0].config if candidates else load_config(args.config, overrides)
        tiles, rows = tiles_of_split(config, args.split)
        candidates += [candidate_of_labels(pattern, config, [tiles[i] for i in rows]) for pattern in args.predictions]
    return with_distinct_names(candidates)


def read_merges(texts: Sequence[str], classes: Sequence[str]) -> list[Merge]:
    """Read --merge NAME=CLASS,CLASS."""
    merges = []
    for text in texts:
        name, _, names = text.partition("=")
        name, found = name.strip(), tuple(dict.fromkeys(each.strip() for each in names.split(",")))
        if any(merge.name == name for merge in merges):
            raise UserError(f"--merge {text}: another --merge has the name {name}; choose another one")
        unknown = [each for each in found if each not in classes]
        if not name or unknown or len(found) >= len(classes):
            raise UserError(f"--merge {text}: write NAME=CLASS,CLASS with some, not all, of the classes "
                            f"{', '.join(classes)}")
        merges.append(Merge(name, found))
    return merges


def default_folder(candidates: Sequence[Candidate], args: Namespace) -> Path:
    """Return the output folder, named after what is evaluated and how."""
    name = f"predictions-{file_name(args.images.resolve().name)}" if args.images else "evaluation"
    return arguments.output_folder(candidates, name, "comparison", [
        mark(args.split, "test"), mark(args.flips, False, "flips"), mark(args.precision, "auto"),
        mark(args.tolerance, TOLERANCE, "tolerance-{:g}")])


def prepare(parser: ArgumentParser, args: Namespace) -> tuple[list[Candidate], list[Merge], Path, list[Path]]:
    """Check the arguments. Return what is evaluated, the classes to merge, the output folder and its sources."""
    runs, overrides = arguments.runs_and_overrides(args)
    check_arguments(parser, args, runs)
    candidates = read_candidates(args, runs, overrides)
    merges = read_merges(args.merge, candidates[0].config.data.classes)
    out = args.out or default_folder(candidates, args)
    sources = [*candidates[0].sources, args.images] if args.images else sources_of(candidates)
    label_images = [path for candidate in candidates for path in (candidate.label_images or {}).values()]
    lists = [candidate.config.data.list_folder for candidate in candidates]
    inputs = [*sources_of(candidates), *sources, *lists, *label_images, *([Path(args.config)] if args.config else [])]
    if ranks.is_first():
        check_replaceable(out, inputs, None if args.out else sources)
    return candidates, merges, out, sources


def open_tiles(candidates: Sequence[Candidate], args: Namespace) -> TestSet:
    test_set = open_test_set(candidates, args.split)
    if args.by and not any(found_in(tile.key, args.by) for tile in test_set.tiles):
        raise UserError(f"--by '{args.by}' is found in no key of the {args.split} tiles, such as "
                        f"{test_set.tiles[0].key}")
    return test_set


def digests_of_models(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Return a digest of each checkpoint, by which ranks compare what they predict with."""
    files = [source for candidate in candidates for source in candidate.sources if source.is_file()]
    return {f"file {path}": hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def main() -> None:
    parser = parser_of_arguments()
    args = parser.parse_intermixed_args()
    reuse_memory()
    with ranks.started(), enough_memory(LESS_MEMORY):
        candidates, merges, out, sources = ranks.together(lambda: prepare(parser, args))
        if args.images:
            images = ranks.on_first(lambda: unlabelled.find_images(args.images))
            ranks.reject_differences(lambda: digests_of_models(candidates))
            rows = unlabelled.predict_folder(candidates[0], images, out, sources)
            summary = unlabelled.summary(rows, candidates[0].config.data.classes) if ranks.is_first() else ""
        else:
            test_set = ranks.one_first(lambda: open_tiles(candidates, args))
            ranks.reject_differences(lambda: digests_of_models(candidates) | {
                "list of tiles": test_set.tiles_identity})
            for reason in explain_separate_seeds(candidates):
                warn(reason)
            contents = evaluate(candidates, test_set, out, args.tolerance, args.tiles, args.pictures, merges, args.by)
            summary = report.summary(contents) if ranks.is_first() else ""
        if ranks.is_first():
            print(f"{summary}\nwrote {out}: {names_in(out)}")


if __name__ == "__main__":
    run(main)
