"""Convert the published EBHI-Seg data set into tiles for this repository.

    python -m tools.prepare_ebhi SOURCE data/ebhi
    python data_filter.py --config configs/ebhi.yaml

SOURCE holds CLASS/image/NAME.png and CLASS/label/NAME.png: 224 x 224 haematoxylin-eosin stained biopsies of the
colorectum with grey, antialiased labels of the glands (L. Shi et al., Frontiers in Medicine 2023,
doi 10.3389/fmed.2023.1114673). The tool writes OUT/frames/frame#KEY.png and OUT/masks/mask#KEY.png with three classes:

    background   not gland (label <= 127)
    tissue       non-malignant gland: Normal, Polyp, Serrated adenoma, Low-grade IN
    tumour       malignant gland: Adenocarcinoma, High-grade IN

KEY is PATIENT-REST_CLASS, with NAME in capitals because the published names mix cases. 74 patients occur in more than
one class, so split by patient (data.group), never by tile.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from common.config import Data
from common.console import Progress, UserError, argument_parser, command, run, table
from common.files import new_folder
from common.pictures import open_picture, read_image

CLASS_OF_GLAND = {"Adenocarcinoma": 2, "High-grade IN": 2, "Low-grade IN": 1, "Normal": 1, "Polyp": 1,
                  "Serrated adenoma": 1}
GLAND_ABOVE = 127  # value of a label, whose edges are antialiased


def find_sources(source: Path) -> list[tuple[str, Path, Path]]:
    """Return (class, image, label) of every pair, sorted; a file without its partner is an error."""
    pairs = []
    for name in CLASS_OF_GLAND:
        images, labels = ({path.stem: path for path in sorted((source / name / folder).glob("*.png"))}
                          for folder in ("image", "label"))
        alone = sorted(images.keys() ^ labels.keys())
        if alone:
            raise UserError(f"{source / name}: '{alone[0]}' has no {'label' if alone[0] in images else 'image'} "
                            f"({len(alone)} files without a partner); restore or remove them")
        pairs += [(name, images[stem], labels[stem]) for stem in images]
    if not pairs:
        raise UserError(f"{source}: no EBHI-Seg images found; expected {source}/CLASS/image/NAME.png with CLASS one of "
                        f"{', '.join(CLASS_OF_GLAND)}")
    return pairs


def key_of(name: str, path: Path) -> str:
    """Return PATIENT-REST_CLASS, e.g. GT2001838-1-400-002_high-grade-in."""
    return f"{path.stem.upper()}_{name.lower().replace(' ', '-')}"


def read_label(path: Path, gland: int) -> np.ndarray:
    """Return (H, W) uint8 class indices from a grey label of one or three channels."""
    picture = open_picture(path)
    if picture.mode not in ("L", "RGB"):
        raise UserError(f"{path}: a label must be 8-bit grey or RGB, this one has mode {picture.mode}")
    return np.where(np.asarray(picture.convert("L")) > GLAND_ABOVE, gland, 0).astype(np.uint8)


def convert_pairs(pairs: list[tuple[str, Path, Path]], out: Path) -> np.ndarray:
    """Write all pairs into the empty folder `out`, and return the pixels of each class (3,)."""
    layout, pixels = Data(), np.zeros(3, np.int64)
    for pattern in (layout.images, layout.masks):
        (out / pattern).parent.mkdir(parents=True)
    with Progress("prepare", len(pairs), "tile") as progress:
        for name, image_path, label_path in pairs:
            image, mask = read_image(image_path), read_label(label_path, CLASS_OF_GLAND[name])
            if image.shape[:2] != mask.shape:
                raise UserError(f"{label_path}: the label has {mask.shape} pixels, its image {image.shape[:2]}")
            key = key_of(name, image_path)
            Image.fromarray(image).save(out / layout.images.replace("{key}", key))
            values = np.array(layout.mask_values, np.uint8)[mask]
            Image.fromarray(values).save(out / layout.masks.replace("{key}", key))
            pixels += np.bincount(mask.ravel(), minlength=3)
            progress.advance()
    return pixels


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder with Adenocarcinoma/, Normal/ …")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write, e.g. data/ebhi")
    args = parser.parse_args()
    with new_folder(args.out) as folder:
        pairs = find_sources(args.source)
        pixels = convert_pairs(pairs, folder)
    patients = len({key_of(name, path).partition("-")[0] for name, path, _ in pairs})
    print(table(["tiles", "patients", *Data().classes],
                [[str(len(pairs)), str(patients), *(f"{share:.1%}" for share in pixels / pixels.sum())]]))
    elsewhere = [] if args.out == Path("data/ebhi") else [f"data.root={args.out}"]
    print(f"\nwrote {args.out}/frames and {args.out}/masks\n"
          f"next:  {command('python', 'data_filter.py', '--config', 'configs/ebhi.yaml', *elsewhere)}")


if __name__ == "__main__":
    run(main)
