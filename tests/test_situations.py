"""Folders as people have them go through the filter. What cannot be used is said: one line, exit 2, nothing written.

docs/data.md lists the same situations.
"""

import shutil

import numpy as np
import pytest
from helpers import GREYS, TINY, read_rows, read_scores, write_pairs
from PIL import Image

from dataset import read_list

COLOURS = np.array([[0, 0, 0], [0, 160, 90], [255, 0, 0]], np.uint8)
CLASSES_OF_TWO = "data.classes=[normal,gland]"


@pytest.fixture
def filtered(tmp_path, here):
    """Filter tmp_path/tiles with the given settings; return exit code, stdout, stderr."""
    (tmp_path / "x.yaml").write_text("data: {root: tiles}\n")

    def run(*settings):
        out = here("data_filter.py", "--config", "x.yaml", *settings, cwd=tmp_path)
        return out.returncode, out.stdout, out.stderr
    return run


@pytest.fixture
def tiles(tmp_path):
    """20 tiles of 48 x 40 pixels on 5 slides."""
    write_pairs(tmp_path / "tiles", 20, slides=5)
    return tmp_path / "tiles"


def tiles_of(root):
    return read_list(root / "tiles.csv")


def convert(path, suffix, **options):
    """Save a picture in another format."""
    Image.open(path).save(path.with_suffix(suffix), **options)
    path.unlink()


def recode(root, change, suffix=".png"):
    """Replace each mask by change(labels), a picture or an array."""
    for path in sorted((root / "masks").iterdir()):
        labels = np.searchsorted(GREYS, np.asarray(Image.open(path))).astype(np.uint8)
        path.unlink()
        picture = change(labels)
        picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        picture.save(path.with_suffix(suffix))


def with_palette(labels, colours=COLOURS):
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette(colours.tobytes())
    return picture


def fails(result, root, *words):
    """Check that a run ended with exit 2 and one line with these words, and wrote nothing."""
    code, _, error = result
    assert code == 2 and not (root / "tiles.csv").exists() and not (root / "filter").exists()
    *warnings, line = error.splitlines()
    assert line.startswith("error: ") and all(warning.startswith("warning: ") for warning in warnings)
    for word in words:
        assert word in line, (word, line)
    return line


# ---------------------------------------------------------------------------------------------- files

def test_suffixes_may_be_mixed_and_in_capitals(tiles, filtered):
    expected = [(tile.key, tile.blank) for tile in read_after(filtered, tiles)]
    for i, path in enumerate(sorted((tiles / "frames").iterdir())):
        if i % 3:
            convert(path, (".PNG", ".tif")[i % 3 - 1])
    for i, path in enumerate(sorted((tiles / "masks").iterdir())):
        if i % 2:
            convert(path, ".TIFF")
    assert [(tile.key, tile.blank) for tile in read_after(filtered, tiles)] == expected
    assert {tile.image[-4:] for tile in tiles_of(tiles)} == {".png", ".PNG", ".tif"}


def read_after(filtered, root, *settings):
    code, _, error = filtered(*settings)
    assert code == 0, error
    return tiles_of(root)


def test_jpeg_images_pair_with_png_masks(tiles, filtered):
    for path in list((tiles / "frames").iterdir())[::2]:
        convert(path, ".jpg", quality=95)
    assert len(read_after(filtered, tiles)) == 20


def test_images_and_masks_may_differ_in_the_suffix_alone(tiles, filtered):
    for key in (path.stem.partition("#")[2] for path in sorted((tiles / "frames").iterdir())):
        convert(tiles / f"frames/frame#{key}.png", ".jpg", quality=95)
        shutil.move(tiles / f"frames/frame#{key}.jpg", tiles / f"{key}.JPEG")
        shutil.move(tiles / f"masks/mask#{key}.png", tiles / f"{key}.png")
    settings = "data.images={key}.jpg", "data.masks={key}.png"
    found = read_after(filtered, tiles, *settings)
    assert len(found) == 20 and {(tile.image[-5:], tile.mask[-4:]) for tile in found} == {(".JPEG", ".png")}
    (tiles / "tiles.csv").unlink()
    shutil.rmtree(tiles / "filter")
    Image.open(tiles / "s0-0.png").save(tiles / "other.tif")
    fails(filtered(*settings), tiles, "other.tif", "both data.images and data.masks")


@pytest.mark.parametrize("folder", ["frames/frame", "masks/mask"])
def test_two_candidates_for_a_key_are_named(tiles, filtered, folder):
    Image.open(tiles / f"{folder}#s1-1.png").save(tiles / f"{folder}#s1-1.tif")
    fails(filtered(), tiles, f"{folder}#s1-1.png", f"{folder}#s1-1.tif", "'s1-1'", "remove one")


def test_pictures_that_fit_no_pattern_are_counted_and_named(tiles, filtered):
    for name in ("frames/Frame#1.png", "frames/sub/frame#2.tif", "masks/copy of mask#1.PNG", "masks/notes.txt"):
        (tiles / name).parent.mkdir(exist_ok=True)
        shutil.copy(tiles / "masks/mask#s1-1.png", tiles / name)
    code, _, error = filtered()
    assert code == 0
    assert "left out: 3, for example frames/Frame#1.png, frames/sub/frame#2.tif, masks/copy of mask#1.PNG" in error


def test_a_folder_of_other_names_is_said_and_one_named_filter_may_be_a_slide(tiles, filtered):
    for path in sorted((tiles / "frames").iterdir()):
        slide = {"s3": "filter"}.get(path.stem[6:8], path.stem[6:8])
        names = ("Img", "Seg") if slide == "s2" else ("img", "seg")
        for name, old in zip(names, (path, tiles / f"masks/mask#{path.stem[6:]}.png"), strict=True):
            (tiles / slide / name).mkdir(parents=True, exist_ok=True)
            old.rename(tiles / slide / name / path.name[6:])
    settings = "data.images={group}/img/{key}.png", "data.masks={group}/seg/{key}.png"
    for cache in ("lists", "tiles/s0/lists"):
        for _ in range(2):  # the second time beside the filter's own pictures
            code, out, error = filtered(*settings, f"data.cache={cache}")
            assert code == 0 and "pairs: 16," in out and "left out: 8, for example s2/Img/s2-12.png" in error


@pytest.mark.parametrize(("images", "masks", "settings", "groups"), [
    ("{}/{}.png", "{}/{}_mask.png", ["data.images={group}/{key}.png", "data.masks={group}/{key}_mask.png"], 5),
    ("{}/{}.png", "{}/{}_mask.png",
     ["data.images=*/{key}.png", "data.masks=*/{key}_mask.png", r"data.group=^(s\d)"], 5),
    ("a/b/{}/img/{}.png", "a/b/{}/seg/{}.png",
     ["data.images=**/img/{key}.png", "data.masks=**/seg/{key}.png", r"data.group=^a-b-(s\d)"], 5),
    ("{}/{}.png", "{}/{}_mask.png", ["data.images=*/{key}.png", "data.masks=*/{key}_mask.png"], 0),
])
def test_each_slide_may_have_a_folder(tiles, filtered, images, masks, settings, groups):
    numbers = dict.fromkeys(range(5), 0)
    for path in sorted((tiles / "frames").iterdir()):
        slide, key = int(path.stem[7]), path.stem.partition("#")[2]
        for pattern, old in ((images, path), (masks, tiles / f"masks/mask#{key}.png")):
            new = tiles / pattern.format(f"s{slide}", f"t{numbers[slide]}")
            new.parent.mkdir(parents=True, exist_ok=True)
            old.rename(new)
        numbers[slide] += 1
    for _ in range(2):  # the second time beside the filter's own pictures
        found = read_after(filtered, tiles, *settings)
        assert len({tile.key for tile in found}) == 20 and found[0].key.endswith("s0-t0")
        assert len({tile.group for tile in found} - {""}) == groups
    (tiles / "tiles.csv").unlink()
    shutil.rmtree(tiles / "filter")
    (tiles / masks.format("s3", "t2")).unlink()
    fails(filtered(*settings), tiles, images.format("s3", "t2"), masks.format("s3", "t2"), "missing")


# ---------------------------------------------------------------------------------------------- masks

def test_palettes_are_read_by_index_and_shown_once(tiles, filtered):
    recode(tiles, with_palette)
    fails(filtered(), tiles, "Try data.mask_values=[0,1,2]", "palette: 0 = 000000, 1 = 00a05a, 2 = ff0000")
    code, out, error = filtered("data.mask_values=[0,1,2]")
    assert code == 0 and "palettes" not in error
    assert out.count("palette: 0 = 000000, 1 = 00a05a, 2 = ff0000 (masks are read by index)") == 1


def test_palettes_that_contradict_each_other_are_said(tiles, filtered):
    numbers = iter(range(20))
    recode(tiles, lambda labels: with_palette(2 - labels, COLOURS[::-1]) if next(numbers) == 7 else
           with_palette(labels))
    code, _, error = filtered("data.mask_values=[0,1,2]")
    assert code == 0 and "0 is 000000 in masks/mask#s0-0.png, but ff0000 in masks/mask#s1-6.png" in error
    code, out, error = filtered("data.colours=[000000,00a05a,ff0000]")
    assert code == 0 and "palette" not in out + error


@pytest.mark.parametrize("make", [with_palette, lambda labels: COLOURS[labels]])
def test_colours_stand_for_classes(tiles, filtered, make):
    before = [(tile.foreground, tile.blank, tile.shift_x) for tile in read_after(filtered, tiles)]
    recode(tiles, make)
    code, out, _ = filtered("data.colours=[000000,00a05a,ff0000]")
    assert code == 0 and "mask colours: 000000 background " in out and "ff0000 tumour " in out
    assert [(tile.foreground, tile.blank, tile.shift_x) for tile in tiles_of(tiles)] == before


def test_colours_of_the_files_are_offered_and_the_offer_works(tiles, filtered):
    recode(tiles, lambda labels: COLOURS[labels])
    line = fails(filtered(), tiles, "20 of 20 masks", "Try data.colours=[000000,00a05a,ff0000]")
    offer = line.partition("Try ")[2].split()[0]
    code, _, error = filtered(offer)
    assert code == 0, error


def test_a_photograph_as_a_mask_is_rejected_in_one_line(tiles, filtered):
    recode(tiles, lambda labels: np.random.default_rng(0).integers(0, 256, (*labels.shape, 3)).astype(np.uint8))
    fails(filtered(), tiles, "The 8 most frequent", "convert")


@pytest.mark.parametrize("make", [
    lambda labels: labels > 0, lambda labels: (255 * (labels > 0)).astype(np.uint16),
    lambda labels: Image.merge("LA", [Image.fromarray((255 * (labels > 0)).astype(np.uint8)),
                                      Image.new("L", labels.shape[::-1], 77)])])
def test_bits_alpha_and_depth_lose_nothing(tiles, filtered, make):
    recode(tiles, make)
    assert len(read_after(filtered, tiles, CLASSES_OF_TWO, "data.mask_values=[0,255]")) == 20


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_smooth_or_smeared_masks_of_two_classes_need_a_threshold(tiles, filtered, suffix):
    def smooth(labels):
        return np.where(labels == 0, 3, np.where(labels == 1, 240, 255)).astype(np.uint8)

    recode(tiles, smooth, suffix)
    pattern = f"data.masks=masks/mask#{{key}}{suffix}"
    fails(filtered(CLASSES_OF_TWO, "data.mask_values=[0,255]", pattern), tiles,
          "data.threshold" if suffix == ".jpg" else "Try data.mask_values=[3,240,255]")
    code, out, _ = filtered(CLASSES_OF_TWO, "data.threshold=128", pattern)
    assert code == 0 and "mask values: below 128 normal 3" in out and "from 128 gland 6" in out
    if suffix == ".png":
        between = [np.asarray(Image.open(path)) for path in (tiles / "masks").iterdir()]
        share = np.mean([(mask > 0) & (mask < 255) for mask in between])
        assert f"{share:.2%} of the pixels are neither 0 nor 255" in out


def test_many_greys_of_two_classes_are_advised_a_threshold(tiles, filtered):
    recode(tiles, lambda labels: (np.arange(labels.size) % 256).reshape(labels.shape).astype(np.uint8))
    fails(filtered(CLASSES_OF_TWO, "data.mask_values=[0,255]"), tiles, "8 most frequent of 256", "data.threshold=128")
    recode(tiles, lambda labels: (np.arange(labels.size) % 12).reshape(labels.shape).astype(np.uint8))
    fails(filtered(CLASSES_OF_TWO, "data.mask_values=[0,255]"), tiles, "Try data.mask_values=[0,1,2,3,4,5,6,7,8,9,10")


# ---------------------------------------------------------------------------------------------- tiles

def test_tiles_that_are_empty_on_purpose_are_kept_at_0_and_counted(tiles, filtered):
    numbers = iter(range(20))
    recode(tiles, lambda labels: GREYS[labels * (next(numbers) >= 6)])
    found = read_after(filtered, tiles)
    assert sum(tile.split == "sparse" for tile in found) == 6
    code, out, _ = filtered("filter.min_foreground=0")
    assert code == 0 and "kept tiles with nothing but background: 6" in out
    assert "kept tiles with nothing but background: 6" in (tiles / "filter/summary.md").read_text()
    empty = [tile for tile in tiles_of(tiles) if tile.foreground == 0]
    assert len(empty) == 6 and all(tile.split in ("train", "test") and tile.blank is None for tile in empty)


def test_grey_images_become_rgb_and_an_undefined_flag_is_none(tiles, filtered):
    exif = Image.Exif()
    exif[0x0112] = 0
    for path in (tiles / "frames").iterdir():
        Image.open(path).convert("L").save(path, exif=exif)
    assert len(read_after(filtered, tiles)) == 20


def test_ignored_pixels_are_counted_and_tiles_of_nothing_else_are_dropped(tiles, filtered):
    numbers, masks = iter(range(20)), []

    def change(labels):
        number, mask = next(numbers), GREYS[labels]
        mask[: 48 if number == 3 else 12] = 255
        masks.append(mask)
        return mask

    recode(tiles, change)
    fails(filtered(), tiles, "255", "data.ignore")
    code, out, _ = filtered("data.ignore=255")
    assert code == 0 and f"255 ignored {np.mean(np.array(masks) == 255):.2%}" in out
    found = tiles_of(tiles)
    assert [tile.key for tile in found if tile.split == "unlabelled"] == ["s0-5"]  # the fourth name
    assert found[0].foreground == pytest.approx(np.mean(masks[0][12:] != 26), rel=1e-5)
    assert (tiles / "filter/dropped_unlabelled.png").exists()


def test_a_folder_that_cannot_be_written_to_needs_a_cache(tmp_path, tiles, filtered, here):
    before = {path: path.stat().st_mtime_ns for path in [tiles, *tiles.rglob("*")]}
    code, _, error = filtered("data.cache=lists", *TINY)
    assert code == 0, error
    assert {path.name for path in (tmp_path / "lists").iterdir()} >= {"tiles.csv", "filter", "data_root.txt"}
    for command in (["train.py", "--config", "x.yaml", "data.cache=lists", *TINY], ["evaluate.py", "runs/x"]):
        out = here(*command, cwd=tmp_path)
        assert out.returncode == 0, out.stderr
    assert {path: path.stat().st_mtime_ns for path in [tiles, *tiles.rglob("*")]} == before, "nothing was written there"
    shutil.copytree(tiles, tmp_path / "others")
    for command in (["data_filter.py", "--config", "x.yaml", "data.cache=lists", "data.root=others"],
                    ["evaluate.py", "runs/x", "data.root=others", "--out", "o"]):
        out = here(*command, cwd=tmp_path)
        assert out.returncode == 2 and "data.cache=lists belongs to the tiles of" in out.stderr, out.stderr
    tiles.rename(tmp_path / "moved")
    out = here("evaluate.py", "runs/x", "data.root=moved", "--out", "o", cwd=tmp_path)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize(("count", "slides"), [(3, 0), (2, 0), (9, 1), (4, 2), (9, 2)])
def test_the_advice_for_few_tiles_leads_to_a_model(tmp_path, here, filtered, count, slides):
    """Follow what each error says until a model is trained, or until it asks for more tiles."""
    write_pairs(tmp_path / "tiles", count, slides=slides)
    settings = dict(setting.split("=", 1) for setting in TINY if not setting.startswith(("data.group", "train.epochs")))
    settings |= {"train.epochs": "1", "train.folds": "5", "train.images_per_epoch": "20"}
    settings |= {"data.group": r"^(s\d+)"} if slides else {}
    asked_for_more = False
    for _ in range(4):
        words = [f"{name}={value}" for name, value in settings.items()]
        code, _, error = filtered(*words)
        if code == 0:
            out = here("train.py", "--config", "x.yaml", *words, cwd=tmp_path)
            code, error = out.returncode, out.stderr
        if code == 0:
            break
        assert code == 2 and "train.folds=1" not in error and "at most 1" not in error
        line = error.splitlines()[-1]
        advice = dict(word.rstrip(",").split("=") for word in line.split() if word.startswith("train.") and "=" in word)
        settings |= advice
        if not advice and "without data.group" in line.replace("leave out", "without"):
            settings.pop("data.group")
        elif not advice:
            asked_for_more = "add tiles" in line
            break
    assert asked_for_more == (count == 2) and (code == 0 or asked_for_more)


# ---------------------------------------------------------------------------------------------- several sizes, ignored

SIZES = ((52, 78), (43, 58), (20, 30))  # like those of GlaS at a tenth: 522 x 775, 433 x 574, and a small one


def write_sizes(root, ignored=0.0):
    """18 tiles of three sizes on 6 slides."""
    random = np.random.default_rng(0)
    for folder in ("frames", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(18):
        size = SIZES[i % 3]
        labels = np.kron(random.integers(0, 3, (7, 10)), np.ones((8, 8), int))[:size[0], :size[1]]
        image = (60 + 40 * labels[..., None] + random.integers(0, 30, (*size, 3))).astype(np.uint8)
        mask = GREYS[labels]
        mask[random.random(size) < ignored] = 255
        Image.fromarray(image).save(root / f"frames/frame#s{i % 6}-{i}.png")
        Image.fromarray(mask).save(root / f"masks/mask#s{i % 6}-{i}.png")


@pytest.mark.parametrize("ignored", [0, 0.3])
def test_three_sizes_are_trained_and_evaluated_in_one_run(tmp_path, filtered, here, ignored):
    write_sizes(tmp_path / "tiles", ignored)
    words = [*TINY, "data.crop=32", *(["data.ignore=255"] if ignored else [])]
    code, out, error = filtered(*words)
    assert code == 0 and "3 sizes from 20 x 30 to 52 x 78 pixels (height x width); 6 have" in out
    assert error.count("tiles smaller than data.crop=32 on a side: 6 of 18.") == 1
    for command in (["train.py", "--config", "x.yaml", *words], ["evaluate.py", "runs/x", "--split", "all"],
                    ["evaluate.py", "runs/x", "--split", "all", "--predictions",
                     "runs/x/evaluation-all/predictions/x", "--out", "again"],
                    ["receptive_field.py", "runs/x", "--split", "all", "--pixels", "4"]):
        out = here(*command, cwd=tmp_path)
        assert out.returncode == 0, out.stderr
        assert out.stderr.count("smaller than data.crop") == (command[0] == "train.py")
    folder = tmp_path / "runs/x/evaluation-all"
    rows, confusion = {row["key"]: row for row in read_rows(folder / "tiles.csv")}, np.zeros((3, 3), int)
    for i in range(18):
        key = f"s{i % 6}-{i}"
        truth, predicted = (np.asarray(Image.open(path)) for path in (
            tmp_path / f"tiles/masks/mask#{key}.png", folder / f"predictions/x/{key}.png"))
        assert predicted.shape == SIZES[i % 3] and set(np.unique(predicted)) <= {*GREYS}
        labelled = truth != 255
        assert float(rows[key]["pixel_accuracy"]) == pytest.approx(np.mean((truth == predicted)[labelled]), abs=1e-6)
        np.add.at(confusion, (np.searchsorted(GREYS, truth[labelled]), np.searchsorted(GREYS, predicted[labelled])), 1)
    assert read_scores(folder)["entries"][0]["confusion"] == confusion.tolist()
    ours, theirs = read_scores(tmp_path / "again")["entries"]
    assert ours["confusion"] == theirs["confusion"] and ours["scores"]["tile_hd95"] == theirs["scores"]["tile_hd95"]


def test_a_label_image_must_give_every_pixel_a_class(tmp_path, filtered, here):
    write_sizes(tmp_path / "tiles", 0.3)
    assert filtered(*TINY, "data.ignore=255")[0] == 0
    out = here("evaluate.py", "--predictions", "tiles/masks", "--config", "x.yaml", "data.ignore=255", "--out", "o",
               cwd=tmp_path)
    assert out.returncode == 2 and "a prediction must give every pixel a class" in out.stderr
    assert not (tmp_path / "o").exists()


def test_a_label_image_is_not_taken_for_that_of_a_tile_of_the_same_name_in_another_folder(tmp_path, here):
    write_pairs(tmp_path / "tiles", 6, slides=3)
    for folder in ("frames/frame", "masks/mask"):
        for i in range(6):
            new = tmp_path / f"tiles/{folder[0]}/s{i % 3}/t{i // 3}.png"
            new.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"tiles/{folder}#s{i % 3}-{i}.png").rename(new)
    (tmp_path / "x.yaml").write_text(
        "data: {root: tiles, images: 'f/{group}/{key}.png', masks: 'm/{group}/{key}.png'}\n")
    assert here("data_filter.py", "--config", "x.yaml", cwd=tmp_path).returncode == 0
    (tmp_path / "labels").mkdir()
    for name in ("t0", "t1"):
        shutil.copy(tmp_path / f"tiles/m/s0/{name}.png", tmp_path / f"labels/{name}.png")
    run = ["evaluate.py", "--predictions", "labels", "--config", "x.yaml", "--split", "all"]
    out = here(*run, cwd=tmp_path)
    assert out.returncode == 2 and "no label image for tile 's0-t0'" in out.stderr
    for i in range(6):
        shutil.copy(tmp_path / f"tiles/m/s{i % 3}/t{i // 3}.png", tmp_path / f"labels/s{i % 3}-t{i // 3}.png")
    out = here(*run, cwd=tmp_path)
    rows = read_rows(tmp_path / "labels-evaluation-all/tiles.csv")
    assert out.returncode == 0 and {row["pixel_accuracy"] for row in rows} == {"1.000000"}
    out = here(*run[:2], "tiles/m/{group}/{key}.png", *run[3:], "--out", "o", cwd=tmp_path)
    assert out.returncode == 0 and read_scores(tmp_path / "o")["entries"][0]["scores"]["pixel_accuracy"]["value"] == 1
