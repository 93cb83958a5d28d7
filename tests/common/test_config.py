"""common/config.py: the defaults are the report's, values that make no sense are rejected, configs/ is complete."""

import pytest
from helpers import REPOSITORY

from common.config import Config
from common.config_files import apply_overrides, load_config
from common.console import UserError
from losses import LOSSES

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_defaults_are_the_reports_section_5_2():
    config = Config()
    assert (config.optim.lr, config.optim.weight_decay, config.optim.factor) == (5e-4, 3e-5, 0.2)
    assert (config.optim.patience, config.optim.min_lr, config.optim.ema) == (5, 1e-6, 0.9)
    assert (config.train.epochs, config.train.folds, config.train.images_per_epoch) == (250, 5, 4000)
    assert (config.train.batch_size, config.data.crop, config.data.test_fraction) == (16, 256, 0.2)
    assert (config.filter.min_foreground, config.filter.sigma) == (0.01, 10)
    assert (config.filter.blank_intensity, config.filter.max_blank) == (40, 0.075)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_is_named_as_its_file(path):
    assert load_config(path).name == path.stem
    assert path.read_text().startswith("#"), "a comment states command, table row and time"


def test_there_is_a_config_for_each_loss_and_network_of_the_report():
    experiments = {path.stem: load_config(path) for path in CONFIGS}
    losses = {*LOSSES, "wce"} - {"gce"}
    assert {experiments[name].loss.name for name in losses} == losses
    assert experiments["small_dice_ce"].model.widths == (32, 64, 128, 256)
    assert experiments["small_dice_ce"].model.dropout == 0


@pytest.mark.parametrize(("override", "expected"), [
    ("filter.max_shift=-1", "number of pixels.*off.*-1"),
    ("filter.max_unmarked=5", "0 to 1.*off.*5"),
    ("filter.min_foreground=-1", "0 to 1.*-1"),
    ("filter.blank_intensity=400", "0 to 255.*400"),
    ("filter.sigma=0", "positive.*0"),
    ("model.widths=[]", r"positive.*\[\]"),
    ("model.dropout=1", "below 1.*1"),
    ("optim.lr=0", "positive.*0"),
    ("optim.patience=-1", "negative.*-1"),
    ("optim.factor=1", "0 and 1.*1"),
    ("optim.ema=1", r"\[0, 1\).*1"),
    ("loss.q=0.5", "no effect on loss.name=dice_ce"),
    ("loss.border_as=soften", "no effect without a border"),
    ("loss.q=0", "above 0 and at most 1"),
    ("train.epochs=0", "at least 1.*0"),
    ("train.folds=1", "at least 2.*1"),
    ("train.images_per_epoch=11", "11.*multiple.*train.folds.*5"),
    ("data.crop=250", "250.*multiple of 16.*240"),
    ("data.crop=16", "16.*32"),
    ("data.classes=[a, a, b]", "different.*'a', 'a', 'b'"),
    ("data.classes=[background, tissue, mean]", "'mean'"),
    ("data.classes=[background, tissue, all]", "'all'"),
    ("data.mask_values=[26, 51]", r"3 different.*\[26, 51\]"),
    ("data.mask_values=[26, 51, 300]", r"255.*\[26, 51, 300\]"),
    ("data.test_fraction=1", "0 and 1.*1"),
    ("data.images=frames/x.png", "{key}.*once.*'frames/x.png'"),
    ("data.images=/abs/{key}.png", "below data.root.*'/abs/{key}.png'"),
    ("data.images=./x/{key}.png", "plain.*'./x/{key}.png'"),
    ("data.masks=../{key}.png", "plain.*'../{key}.png'"),
    ("data.group=(", "regular expression"),
    ("name=../up", "'../up'"),
    ("seed=-1", "2\\^32.*-1"),
])
def test_a_value_that_makes_no_sense_is_rejected(override, expected):
    with pytest.raises(UserError, match=f"{override.partition('=')[0]}.*{expected}"):
        apply_overrides(Config(), [override])
