"""evaluation/page.py: the tables and thumbnails of report.html, and the page in a browser (skipped without one)."""

import base64
import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, as_store, read_rows, write_pairs
from PIL import Image

import evaluate
import train
from common import palette
from common.config import Config, Data
from common.config_files import apply_overrides
from dataset import TILE_LIST, Tile, read_list, write_tiles
from evaluation import page as report_page
from evaluation.candidates import candidate_of_run
from evaluation.metrics import Tally
from evaluation.results import Evaluation
from evaluation.test_set import open_test_set
from filtering import pipeline

HOSTILE = "<img src=x onerror=alert(1)>&\"'{{ 7*7 }}"
CLASSES = ["value", "</script><i>tissue", "tumour"]


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The folder of a comparison of two runs, with names that are markup in HTML."""
    root = tmp_path_factory.mktemp("page")
    write_pairs(root / "tiles", 12, slides=6)
    for folder, start in (("frames", "frame#"), ("masks", "mask#")):
        (root / f"tiles/{folder}/{start}s5-11.png").rename(root / f"tiles/{folder}/{start}s5-11{HOSTILE}.png")
    for path in sorted((root / "tiles/masks").glob("*s[12]-*")):  # tiles without tumour
        Image.fromarray(np.minimum(np.asarray(Image.open(path)), 51)).save(path)
    config = apply_overrides(Config(name="one"), [*TINY, f"data.root={root / 'tiles'}", "train.epochs=1"])
    config = replace(config, data=replace(config.data, classes=tuple(CLASSES)))
    write_tiles(root / "tiles" / TILE_LIST, pipeline.filter_tiles(config).tiles)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train.start(config)
        train.start(replace(config, name="two", seed=1))
        for name in ("one", "two"):  # so that the runs differ and falsely predict tumour
            path = root / f"runs/{name}/checkpoints/best.pt"
            contents = torch.load(path, weights_only=True)
            contents["model"]["head.bias"] += torch.tensor([0.3, 0, 0.3]) if name == "two" else 0
            torch.save(contents, path)
        candidates = [candidate_of_run(root / "runs" / name, "best", [], False) for name in ("one", "two")]
        evaluate.evaluate(candidates, open_test_set(candidates, "all"), root / "out")
    return root / "out"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not chromium or not driver:
        pytest.skip("no browser: install chromium and chromium-driver (Debian's names)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    """The page, opened from disk in the size of a laptop; it must log no error and request nothing."""
    browser.set_window_size(1400, 900)
    browser.get_log("performance")
    browser.get((page / "report.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []
    messages = [json.loads(candidate["message"])["message"] for candidate in browser.get_log("performance")]
    requested = {message["params"]["request"]["url"] for message in messages
                 if message["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith("file:") for url in requested)
    assert all(url == (page / "report.html").as_uri() or url.startswith("data:") for url in requested)


def keys_shown(browser):
    return browser.execute_script("return [...document.querySelectorAll('#cards .card')].map(card => card.dataset.key)")


def press(browser, keys):
    from selenium.webdriver.common.action_chains import ActionChains
    ActionChains(browser).send_keys(keys).perform()


def find(browser, selector):
    return browser.find_element("css selector", selector)


def choose(browser, selector, value):
    from selenium.webdriver.support.select import Select
    Select(find(browser, selector)).select_by_value(value)


def layer(browser, key, stack="#cards"):
    """The picture drawn over a tile's image, (H, W, 4) uint8."""
    address = browser.execute_script(
        "const card = [...document.querySelectorAll('#cards .card')].find(card => card.dataset.key === arguments[0]);"
        "return card.querySelector('.layer').src", key)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGBA"))


@pytest.mark.parametrize("column", ["pixel_accuracy", "soft_dice", "ece", "dice_mean", "dice_tumour", "hd95_tumour",
                                    "recall_value", "surface_dice_mean"])
def test_sorting_by_any_score_of_either_model(opened, page, column):
    rows = read_rows(page / "tiles.csv")
    for candidate in ("one", "two"):
        choose(opened, "#entry", str(["one", "two"].index(candidate)))
        choose(opened, "#sort", column)
        values = {row["key"]: float(row[column] or "nan") for row in rows if row["entry"] == candidate}
        for worst_first in (True, False):
            if (find(opened, "#order").text == "worst first") != worst_first:
                find(opened, "#order").click()
            shown = [values[key] for key in keys_shown(opened)]
            there = [value for value in shown if not np.isnan(value)]
            lower_is_better = column.startswith(("ece", "hd95"))
            assert there == sorted(there, reverse=worst_first == lower_is_better)
            assert len(shown) == 12 and np.isnan(shown[len(there):]).all(), "tiles without the score come last"
        find(opened, "#order").click()


def test_some_tiles_have_no_tumour_score(page):
    """So the test above sorts tiles without a score."""
    assert any(row["dice_tumour"] == "" for row in read_rows(page / "tiles.csv"))


@pytest.mark.parametrize("how", ["key", "click"])
def test_each_view_shows_its_picture(opened, page, how):
    root = page.parent / "tiles"
    tile = next(tile for tile in read_list(root / TILE_LIST) if tile.key == keys_shown(opened)[3])
    mask_values, colours = np.array([26, 51, 77]), palette.class_colours(3)
    truth = np.searchsorted(mask_values, np.asarray(Image.open(root / tile.mask)))

    def view(number, name):
        if how == "key":
            press(opened, str(number))
        else:
            find(opened, f".bar button[data-view={name}]").click()
        pressed = opened.find_elements("css selector", ".bar button[data-view][aria-pressed=true]")
        assert [button.get_attribute("data-view") for button in pressed] == [name]

    for candidate, name in enumerate(("one", "two")):
        predicted = np.searchsorted(mask_values, np.asarray(Image.open(page / f"predictions/{name}/{tile.key}.png")))
        view(2, "truth")
        assert (layer(opened, tile.key)[..., :3] == colours[truth]).all()
        view(3, "prediction")
        assert (layer(opened, tile.key)[..., :3] == colours[predicted]).all()
        view(4, "errors")
        errors = layer(opened, tile.key)
        assert ((errors[..., 3] > 0) == (predicted != truth)).all()
        view(1, "image")
        assert not find(opened, ".card .layer").is_displayed()
        assert find(opened, "#entry").get_attribute("value") == str(candidate)
        press(opened, "m")


def test_the_slider_makes_the_layer_transparent(opened):
    from selenium.webdriver.common.keys import Keys
    slider = find(opened, "#opacity")
    for key, expected in ((Keys.END, 1.0), (Keys.HOME, 0.0), (Keys.ARROW_RIGHT, 0.01)):
        slider.send_keys(key)
        assert float(find(opened, ".card .layer").value_of_css_property("opacity")) == pytest.approx(expected, abs=1e-3)


def test_a_tile_by_keyboard_alone(opened):
    from selenium.webdriver.common.keys import Keys
    shown = keys_shown(opened)
    opened.execute_script("document.querySelectorAll('.card')[1].focus()")
    press(opened, Keys.ENTER)
    assert shown[1] in find(opened, "#large-key").text and find(opened, "#large").is_displayed()
    press(opened, Keys.ARROW_RIGHT)
    assert shown[2] in find(opened, "#large-key").text
    press(opened, "2")
    assert find(opened, "#large").get_attribute("data-view") == "truth"
    press(opened, Keys.ARROW_LEFT + Keys.ARROW_LEFT + Keys.ARROW_LEFT)  # stops at the first
    assert shown[0] in find(opened, "#large-key").text
    press(opened, Keys.ESCAPE)
    assert not find(opened, "#large").is_displayed()
    assert opened.execute_script("return document.activeElement.dataset.key") == shown[0]


def test_a_large_tile_shows_either_model(opened):
    find(opened, ".card").click()
    picture = {}
    for button in range(2):
        opened.find_elements("css selector", "#large-scores button")[button].click()
        buttons = opened.find_elements("css selector", "#large-scores button")
        pressed = [found.get_attribute("aria-pressed") for found in buttons]
        assert pressed == ["true" if i == button else "false" for i in range(2)]
        picture[button] = find(opened, "#large .layer").get_attribute("src")
        assert find(opened, "#entry").get_attribute("value") == str(button)
    assert picture[0] != picture[1]


def test_finding_by_key_or_group(opened):
    box = find(opened, "#find")
    box.send_keys("s5-")
    assert len(keys_shown(opened)) == 2 and find(opened, "#count").text == "2 tiles"
    box.send_keys("1nothing")
    assert keys_shown(opened) == [] and "No tile" in find(opened, "#cards").text
    box.clear()
    box.send_keys("1")  # a digit in the box is text, not the key of a view
    assert find(opened, "#cards").get_attribute("data-view") == "prediction"


def test_names_are_shown_as_text(opened):
    key = f"s5-11{HOSTILE}"
    assert key in keys_shown(opened)
    assert key in [element.text for element in opened.find_elements("css selector", ".card .key")]
    headings = [element.text for element in opened.find_elements("css selector", "#classes ~ details th[scope=col]")]
    assert CLASSES[1] in headings
    assert not opened.find_elements("css selector", "img[src=x], main i")
    assert "49" not in find(opened, "h1").text


@pytest.mark.parametrize("width", [1400, 768, 390, 320])
def test_the_page_fits_a_laptop_and_a_phone(opened, width):
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600})
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        cards = opened.find_elements("css selector", ".card")
        columns = len({card.rect["x"] for card in cards})
        assert columns == 2 if width < 400 else columns >= 3
        opened.execute_script("document.querySelector('.card').click()")
        assert find(opened, "#large").rect["width"] <= width
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_keys_work_while_a_list_has_the_focus(opened):
    choose(opened, "#sort", "dice_mean")
    find(opened, "#sort").send_keys("4m")
    assert find(opened, "#cards").get_attribute("data-view") == "errors"
    assert [find(opened, name).get_attribute("value") for name in ("#entry", "#sort")] == ["1", "dice_mean"]


def test_every_score_of_a_large_tile_can_be_reached_on_a_phone(opened):
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True})
    try:
        opened.execute_script("document.querySelector('.card').click()")
        last = "[...document.querySelectorAll('#large-scores tr')].at(-1).lastChild"
        opened.execute_script(f"{last}.scrollIntoView()")
        left, right, top, bottom = opened.execute_script(
            f"const box = {last}.getBoundingClientRect(); return [box.left, box.right, box.top, box.bottom]")
        assert 0 <= left < right <= 390 and 0 <= top < bottom <= 800
        assert find(opened, "#large .legend").text.split("\n")[-1].endswith("wrong class")
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_class_tables_have_differences_to_the_first_model(opened, page):
    mean, first, second = opened.find_elements("css selector", "#classes ~ details")
    opened.execute_script("arguments[0].open = true", second)
    differences = json.loads((page / "scores.json").read_text())["entries"][1]["difference_to_first"]
    for label, name, form in (("recall", "recall", "+.3f"), ("HD95, px, mean over tiles", "tile_hd95", "+.1f")):
        row = next(row for row in second.find_elements("css selector", "tr")
                   if [cell.text for cell in row.find_elements("css selector", "th")] == [label])
        value, low, high = (format(differences[name]["tumour"][of], form) for of in ("value", "low", "high"))
        assert row.find_elements("css selector", "td")[2].text.split("\n")[1] == f"{value} ({low} to {high})"
    assert "difference" in second.text and "difference" not in first.text
    assert mean.find_element("css selector", "summary").text == "one and 1 more (mean over 2 seeds)"


def test_pictures_and_tables_are_there(opened, page):
    widths = opened.execute_script("return [...document.querySelectorAll('img.figure')].map(i => i.naturalWidth)")
    assert len(widths) == 2 and min(widths) > 300
    text = find(opened, "main").text
    contents = json.loads((page / "scores.json").read_text())
    for candidate in contents["entries"]:
        assert f"{candidate['scores']['dice']['mean']['value']:.4f}" in text
        for row in candidate["confusion"]:
            for count in row:
                assert f"{count:,} px" in text


def test_the_class_table():
    def number(value, low=None, high=None):
        return {"value": value, "low": low, "high": high}

    by_class = {"value": number(0.5, 0.25, 0.75), "b": number(None), "mean": number(1)}
    counts = {name: {"value": 3, "b": 0} for name in report_page.TILE_COUNTS}
    candidate = {"scores": {"pixel_accuracy": number(0.5), "tile_hd95": by_class},
                 "difference_to_first": {"tile_hd95": by_class}, **counts}
    rows = report_page.class_table(candidate, ["value", "b"])
    assert rows[0] == ("accuracy", ["", "", "0.500"], [])
    assert rows[1] == ("HD95, px, mean over tiles", ["0.5 (0.2 to 0.8)", "–", "1.0"],
                       ["+0.5 (+0.2 to +0.8)", "–", "+1.0"])
    assert [row[1:] for row in rows[2:]] == [(["3", "0", ""], [])] * 3


def evaluation_of(count, size, candidates=1):
    """Tiles of noise, which cannot be compressed."""
    random = np.random.default_rng(0)
    tiles = [Tile(str(i), f"{i}.png", f"{i}.png", split="test") for i in range(count)]
    pixels = random.integers(0, 256, (count, size, size, 4)).astype(np.uint8)
    pixels[..., 3] %= 3
    test_set = SimpleNamespace(tiles=tiles, store=as_store(pixels), rows=range(count), config=Config(data=Data()))
    confusion = random.integers(1, 100, (count, 3, 3))
    tallies = [Tally(confusion, random.random((count, 3, 3))) for _ in range(candidates)]
    return Evaluation(test_set, [SimpleNamespace(name=f"e{i}") for i in range(candidates)], tallies, [], 3.0)


@pytest.mark.parametrize(("count", "candidates", "part"), [(500, 1, 4), (700, 4, 2)])
def test_500_tiles_take_at_most_20_mb(monkeypatch, count, candidates, part):
    """The tiles are small, so the limit is a part of the 20 MB."""
    evaluation = evaluation_of(count, 128, candidates)
    monkeypatch.setattr(Evaluation, "predicted", lambda self, candidate, i: np.roll(self.tile(i)[1], 1 + candidate, 0))
    monkeypatch.setattr(report_page, "MOST_BYTES", report_page.MOST_BYTES // part)
    places = report_page.gallery_places(evaluation)
    assert len(set(places)) == 500
    assert len(json.dumps(report_page.gallery(evaluation, places))) < 20 * 2**20 // part


def test_thumbnails_keep_the_shape_and_small_tiles_their_size(monkeypatch):
    evaluation = evaluation_of(2, 40)
    monkeypatch.setattr(Evaluation, "predicted", lambda self, candidate, i: self.tile(i)[1])
    address = report_page.thumbnails(evaluation, 0, 320)["truth"]
    assert Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).size == (40, 40)
    evaluation.test_set.store = as_store(np.zeros((2, 50, 200, 4), np.uint8))
    address = report_page.thumbnails(evaluation, 0, 100)["predictions"][0]
    assert Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).size == (100, 25)


@pytest.mark.parametrize(("size", "scale"), [(40, 1), (640, 0.5)])
def test_the_gallery_knows_how_small_its_pictures_are(monkeypatch, size, scale):
    monkeypatch.setattr(Evaluation, "predicted", lambda self, candidate, i: self.tile(i)[1])
    found = report_page.gallery(evaluation_of(1, size), [0])
    _, _, picture = found["tiles"][0]["truth"].partition(",")
    assert found["scale"] == scale and Image.open(io.BytesIO(base64.b64decode(picture))).width == size * scale
