"""training/augmentation.py: each change equals one that NumPy and SciPy make, and depends on its keys alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import as_store, scene
from scipy import ndimage

from common.config import Augment
from common.config_files import apply_overrides
from common.console import UserError
from common.masks import IGNORE
from training.augmentation import STAINS, augmented, blurred, draw_views, margin, moved, sampled_places
from training.batches import batches_on, copy_pixels
from training.crops import training_crops, validation_crops

CPU = torch.device("cpu")
ALL = Augment(right_angles=True, rotate=180, scale=0.25, elastic=2, stain=0.2, brightness=0.2, contrast=0.2, blur=1.5,
              noise=5)
OFF = {"rotate": 0.0, "scale": 0.0, "elastic": 0.0, "stain": 0.0, "brightness": 0.0, "contrast": 0.0, "blur": 0.0,
       "noise": 0.0}


def windows_of_tissue(count: int, side: int) -> torch.Tensor:
    labels, image = scene(0, size=count * side)
    tiles = np.dstack([image, labels])[:side].reshape(side, count, side, 4).swapaxes(0, 1)
    return torch.from_numpy(np.ascontiguousarray(tiles))


def seen(windows: torch.Tensor, augment: Augment, seed: int = 0, size: int | None = None) -> np.ndarray:
    """The windows as `draw_views` has them seen, (B, size, size, 4)."""
    views = draw_views(augment, len(windows), seed, 1, 0)
    return augmented(windows, views, size or windows.shape[1]).numpy()


# ---------------------------------------------------------------------------------------------- geometry

def test_moved_crops_are_those_that_scipy_interpolates():
    augment, size = Augment(rotate=180, scale=0.5, elastic=6), 40
    windows = windows_of_tissue(6, size + 2 * margin(augment, size))
    views = draw_views(augment, 6, 0, 1, 0)
    images, labels = moved(windows, views, size)
    places = sampled_places(views, size, CPU).numpy() + (windows.shape[1] - 1) / 2
    for window, place, image, label in zip(windows.numpy(), places, images.numpy(), labels.numpy(), strict=True):
        coordinates = place[..., ::-1].transpose(2, 0, 1)
        for channel in range(3):
            expected = ndimage.map_coordinates(window[..., channel].astype(float), coordinates, order=1, mode="reflect")
            assert abs(image[channel] - expected).max() < 0.05
        nearest = ndimage.map_coordinates(window[..., 3], coordinates, order=0, mode="constant", cval=IGNORE)
        is_tie = (abs(coordinates % 1 - 0.5) < 1e-4).any(0)
        assert (label == nearest)[~is_tie].all() and is_tie.mean() < 0.01


def test_places_are_turned_by_the_angle_scaled_and_bent_at_the_control_points():
    size, angle = 41, np.radians(30)
    views = draw_views(Augment(rotate=30, scale=1, elastic=5), 400, 0, 1, 0)
    zoom = 1 / np.sqrt(np.linalg.det(views.linear))
    assert 0.5 <= zoom.min() < 0.52 and 1.95 < zoom.max() <= 2
    assert (zoom < 1).mean() == pytest.approx(0.5, abs=0.1), "as often smaller as larger"
    angles = np.arctan2(views.linear[:, 1, 0], views.linear[:, 0, 0])
    assert -angle <= angles.min() < -0.95 * angle and 0.95 * angle < angles.max() <= angle
    assert views.bends.std() == pytest.approx(5, rel=0.05)
    places = sampled_places(views, size, CPU).numpy()
    for row in range(3):
        for column in range(3):
            x, y = 20 * (column - 1), 20 * (row - 1)
            expected = views.linear @ [x, y] + views.bends[:, :, row, column]
            assert places[:, 20 * row, 20 * column] == pytest.approx(expected, abs=1e-3)
    between = places[:, 0, :] - (views.linear @ np.stack([np.arange(41) - 20, np.full(41, -20)])).swapaxes(1, 2)
    assert abs(np.diff(between, 2, axis=1)).max() < 1, "the deformation has no kinks"


@pytest.mark.parametrize("augment", [Augment(rotate=20), Augment(rotate=180), Augment(scale=0.3),
                                     Augment(rotate=30, scale=0.5)])
def test_the_margin_holds_all_that_enters_and_no_more(augment):
    size, needed = 64, margin(augment, 64)
    views = draw_views(augment, 3000, 0, 1, 0)
    reach = abs(sampled_places(views, size, CPU).numpy()).max()
    assert needed - 3 < reach + 0.5 - size / 2 <= needed
    assert margin(Augment(), 64) == 0 and margin(Augment(elastic=4), 64) == 12


def test_what_enters_from_outside_the_tile_has_no_class_and_shows_its_mirror_image():
    """Against a tile that is surrounded by its mirror images without a class before it is turned."""
    augment, size = Augment(rotate=180, scale=0.25), 24
    labels, image = scene(3, size=30)
    tile = np.dstack([image, labels])
    crops = training_crops([np.zeros(50, int), np.array([], int)], 1, np.array([[30, 30]]), size, 0, 1,
                           replace(augment, flips=False))
    batch = torch.cat(list(batches_on(CPU, crops, as_store([tile]), 7))).numpy()
    surrounded = np.pad(tile, ((30, 30), (30, 30), (0, 0)), mode="symmetric")
    surrounded[..., 3] = IGNORE
    surrounded[30:60, 30:60, 3] = labels
    places = sampled_places(crops.views, size, CPU).numpy() + (size - 1) / 2 + 30
    for i, seen in enumerate(batch):
        coordinates = (places[i] + [crops.left[i], crops.top[i]])[..., ::-1].transpose(2, 0, 1)
        nearest = ndimage.map_coordinates(surrounded[..., 3], coordinates, order=0)
        is_tie = (abs(coordinates % 1 - 0.5) < 1e-3).any(0)
        assert (seen[..., 3] == nearest)[~is_tie].all()
        red = ndimage.map_coordinates(surrounded[..., 0].astype(float), coordinates, order=1)
        assert abs(seen[..., 0] - red).max() <= 1
    assert 0.02 < (batch[..., 3] == IGNORE).mean() < 0.4


def test_what_a_bend_brings_in_from_beyond_the_window_is_mirrored_and_has_no_class():
    windows = windows_of_tissue(2, 20)
    views = draw_views(Augment(elastic=1), 2, 0, 1, 0)
    views = replace(views, bends=np.zeros_like(views.bends))
    views.bends[:, 0], views.bends[:, 1] = 6, -4  # all points lie 6 px to the right and 4 px above
    seen = augmented(windows, views, 20).numpy()
    padded = np.pad(windows.numpy(), ((0, 0), (4, 0), (0, 6), (0, 0)), mode="symmetric")[:, :20, 6:]
    assert (abs(seen[..., :3].astype(int) - padded[..., :3]) <= 1).all()
    assert (seen[:, 4:, :14, 3] == padded[:, 4:, :14, 3]).all()
    outside = np.ones((20, 20), bool)
    outside[4:, :14] = False
    assert (seen[:, outside, 3] == IGNORE).all()


def test_right_angles_and_flips_show_the_eight_forms_of_a_square_equally_often():
    tile = np.arange(4 * 4 * 4, dtype=np.uint8).reshape(4, 4, 4)
    folds = [np.zeros(4000, int), np.array([], int)]
    crops = training_crops(folds, 1, np.array([[4, 4]]), 4, 0, 1, Augment(right_angles=True))
    batch = torch.cat(list(batches_on(CPU, crops, as_store([tile]), 64))).numpy()
    forms = [np.rot90(turned, turns) for turned in (tile, tile[:, ::-1]) for turns in range(4)]
    counts = [(batch == form).all((1, 2, 3)).sum() for form in forms]
    assert sum(counts) == 4000 and all(430 < count < 570 for count in counts)
    crops = training_crops(folds, 1, np.array([[4, 4]]), 4, 0, 1, Augment(flips=False))
    assert (torch.cat(list(batches_on(CPU, crops, as_store([tile]), 64))).numpy() == tile).all()


# ---------------------------------------------------------------------------------------------- colour

def test_stains_are_those_of_colour_deconvolution_pixel_by_pixel():
    windows = windows_of_tissue(3, 24)
    factors, shifts = (views.astype(float) for views in _stains_drawn(3, 0.3))
    crops = seen(windows, Augment(stain=0.3))
    for i, window in enumerate(windows.numpy()[..., :3].astype(float)):
        density = -np.log((window.reshape(-1, 3) + 1) / 256)
        amounts = np.linalg.solve(STAINS.T, density.T).T * factors[i] + shifts[i]
        expected = (256 * np.exp(-amounts @ STAINS) - 1).clip(0, 255)
        assert abs(crops[i, ..., :3].reshape(-1, 3) - expected).max() <= 0.51
    assert (crops[..., 3] == windows[..., 3].numpy()).all()


def _stains_drawn(count: int, amount: float) -> tuple[np.ndarray, np.ndarray]:
    """Factors and shifts of the stains (count, 3), read back from the maps of densities."""
    stains = draw_views(Augment(stain=amount), count, 0, 1, 0).stains.astype(float)
    inverse = np.linalg.inv(STAINS)
    changed = np.einsum("sc,ncd,dt->nst", inverse.T, stains[..., :3], STAINS.T)
    off_diagonal = changed - np.einsum("nss->ns", changed)[:, None] * np.eye(3)
    assert abs(off_diagonal).max() < 1e-5, "no stain turns into another"
    return np.einsum("nss->ns", changed), stains[..., 3] @ inverse


def test_factors_and_shifts_of_stains_fill_their_range():
    factors, shifts = _stains_drawn(2000, 0.2)
    for values in (factors - 1, shifts):
        assert abs(values).max() <= 0.2 + 1e-5
        assert values.min(0) == pytest.approx([-0.2] * 3, abs=0.01)
        assert values.mean(0) == pytest.approx([0] * 3, abs=0.01)
        assert abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.1
    assert abs(np.corrcoef(factors.T, shifts.T)[:3, 3:]).max() < 0.1


def test_stains_lie_where_haematoxylin_and_eosin_lie():
    """More haematoxylin makes an image bluer, more eosin pinker: it takes green away and leaves red."""
    amounts = np.array([[1.0, 0, 0], [0, 1, 0]]) @ STAINS
    haematoxylin, eosin = np.exp(-amounts)
    assert haematoxylin.argmax() == 2 and eosin.argmax() == 0 and eosin.argmin() == 1


def test_contrast_is_around_the_mean_and_brightness_a_factor():
    windows = windows_of_tissue(4, 24)
    augment = Augment(contrast=0.3, brightness=0.2)
    views = draw_views(augment, 4, 0, 1, 0)
    assert len(set(views.contrast)) == len(set(views.brightness)) == 4
    for i, crop in enumerate(seen(windows, augment)[..., :3]):
        image = windows[i, ..., :3].numpy().astype(float)
        expected = views.brightness[i] * (image.mean() + views.contrast[i] * (image - image.mean()))
        assert abs(crop - expected.clip(0, 255)).max() <= 0.51


def test_blur_is_scipys_gaussian():
    windows = windows_of_tissue(5, 40)
    views = draw_views(Augment(blur=2), 5, 0, 1, 0)
    for i, crop in enumerate(seen(windows, Augment(blur=2))[..., :3]):
        image = windows[i, ..., :3].numpy().astype(float)
        expected = ndimage.gaussian_filter(image, (views.blur[i], views.blur[i], 0), mode="mirror",
                                           radius=int(np.ceil(3 * views.blur[i])))
        assert abs(crop - expected).max() <= 0.52
    assert 0 < views.blur.min() < views.blur.max() <= 2
    sharp = 255.0 * torch.randint(0, 2, (2, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    views = replace(views[:2], blur=np.float32([1, 3]))
    alone = blurred(sharp[:1].clone(), views[:1])
    assert torch.allclose(alone, blurred(sharp.clone(), views)[:1], atol=1e-3), "other crops of a batch change nothing"


def test_noise_has_the_deviation_that_was_drawn_and_is_another_in_each_crop():
    windows = torch.full((6, 64, 64, 4), 128, dtype=torch.uint8)
    views = draw_views(Augment(noise=20), 6, 0, 1, 0)
    noise = seen(windows, Augment(noise=20))[..., :3] - 128.0
    for i, deviation in enumerate(views.noise):
        assert noise[i].std() == pytest.approx((deviation ** 2 + 1 / 12) ** 0.5, rel=0.05)
        assert noise[i].mean() == pytest.approx(0, abs=0.6)
    similar = np.corrcoef(noise.reshape(6, -1)) - np.eye(6)
    assert abs(similar).max() < 0.1 and abs(np.corrcoef(noise[5].reshape(-1, 3).T) - np.eye(3)).max() < 0.1


# ---------------------------------------------------------------------------------------------- randomness

def test_views_depend_on_their_keys_alone_and_no_setting_changes_the_draws_of_another():
    base = draw_views(ALL, 20, seed=1, epoch=7, fold=2)
    for keys in ((1, 7, 2), (2, 7, 2), (1, 8, 2), (1, 7, 3)):
        other = draw_views(ALL, 20, *keys)
        same = [np.array_equal(getattr(base, name), getattr(other, name)) for name in vars(base)]
        assert all(same) if keys == (1, 7, 2) else not any(same)
    parts = {"linear": ("rotate", "scale"), "bends": ("elastic",), "stains": ("stain",), "blur": ("blur",),
             "brightness": ("brightness",), "contrast": ("contrast",), "noise": ("noise",)}
    for name, settings in parts.items():
        alone = draw_views(replace(ALL, **{k: v for k, v in OFF.items() if k not in settings}), 20, 1, 7, 2)
        for other in parts:
            assert np.array_equal(getattr(alone, other), getattr(base, other)) == (other == name)


def test_without_settings_nothing_is_drawn_and_validation_is_never_augmented():
    assert draw_views(Augment(right_angles=True, flips=False), 5, 0, 1, 0) is None
    folds, sizes = [np.arange(4), np.arange(4)], np.full((4, 2), 32)
    crops = validation_crops(folds, 0, sizes, 16, 0, 1)
    assert crops.views is None and crops.margin == 0 and not crops.transpose.any()
    plain, all_on = (training_crops(folds, 0, sizes, 16, 0, 1, augment) for augment in (Augment(), ALL))
    for name in ("rows", "top", "left", "flip_vertical", "flip_horizontal"):
        assert np.array_equal(getattr(plain, name), getattr(all_on, name))


def test_batches_are_the_same_from_disk_from_the_device_and_of_any_size():
    random = np.random.default_rng(0)
    store = as_store([random.integers(0, 3, (h, w, 4), np.uint8) for h, w in ((50, 44), (40, 60), (20, 70), (33, 33))])
    on_device = replace(store, pixels=copy_pixels(CPU, store.pixels))
    crops = training_crops([np.arange(40) % 4, np.array([], int)], 1, store.sizes, 32, 0, 1, ALL)
    batches = [torch.cat(list(batches_on(CPU, crops, source, count)))
               for source in (store, on_device) for count in (1, 7, 40)]
    assert batches[0].shape == (40, 32, 32, 4) and batches[0].dtype == torch.uint8
    for other in batches[1:]:
        assert (other.int() - batches[0].int()).abs()[..., :3].max() <= 1
        assert torch.equal(other[..., 3], batches[0][..., 3])
    again = torch.cat(list(batches_on(CPU, crops, store, 7)))
    assert torch.equal(again, batches[1])


@pytest.mark.parametrize("setting", ["rotate=181", "scale=-0.1", "stain=1", "noise=101", "blur=11", "elastic=101"])
def test_impossible_settings_are_rejected(tiny, setting):
    with pytest.raises(UserError, match=f"augment.{setting.split('=')[0]} must lie between 0 and"):
        apply_overrides(tiny, [f"augment.{setting}"])
