import pytest
import yaml
from helpers import REPOSITORY

from common.config import Config
from common.config_files import apply_overrides, from_dict, leaves, load_config, to_dict, to_yaml
from common.console import UserError
from losses import LOSSES

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return path


def test_defaults_are_the_reports_section_5_2():
    config = Config()
    assert (config.optim.lr, config.optim.weight_decay, config.optim.factor) == (5e-4, 3e-5, 0.2)
    assert (config.optim.patience, config.optim.min_lr, config.optim.ema) == (5, 1e-6, 0.9)
    assert (config.train.epochs, config.train.folds, config.train.images_per_epoch) == (250, 5, 4000)
    assert (config.train.batch_size, config.data.crop, config.data.test_fraction) == (16, 256, 0.2)
    assert (config.filter.min_foreground, config.filter.sigma) == (0.01, 10)
    assert (config.filter.blank_intensity, config.filter.max_blank) == (40, 0.075)


def test_yaml_and_back_is_the_identity(tmp_path):
    config = apply_overrides(Config(name="x"), ["optim.lr=1e-5", "data.group=^(s\\d+)", "model.widths=[8, 16]",
                                                "data.images={key}.png", "loss.name=ce"])
    assert load_config(write(tmp_path, to_yaml(config))) == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), "test") == config
    assert config.data.images == "{key}.png" and config.optim.lr == 1e-5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_is_named_as_its_file(path):
    assert load_config(path).name == path.stem
    assert path.read_text().startswith("#"), "a comment states command, table row and time"


def test_there_is_a_config_for_each_loss_and_network_of_the_report():
    experiments = {path.stem: load_config(path) for path in CONFIGS}
    assert {experiments[name].loss.name for name in LOSSES} == set(LOSSES)
    assert experiments["small_dice_ce"].model.widths == (32, 64, 128, 256)
    assert experiments["small_dice_ce"].model.dropout == 0


def test_a_number_in_exponent_form_is_a_number(tmp_path):
    assert load_config(write(tmp_path, "optim: {lr: 5e-4}")).optim.lr == 5e-4


@pytest.mark.parametrize("word", ["off", "null", "none", "~", "false"])
def test_a_limit_can_be_switched_off_in_a_file_and_on_the_command_line(tmp_path, word):
    config = load_config(write(tmp_path, f"filter: {{max_blank: {word}}}"))
    assert config.filter.max_blank is None and config.filter.max_unmarked is None
    assert apply_overrides(Config(), [f"filter.max_blank={word}"]).filter.max_blank is None
    assert load_config(write(tmp_path, to_yaml(config))).filter == config.filter


@pytest.mark.parametrize(("text", "expected"), [
    ("filter: {max_blank: true}", "filter.max_blank must be a number; it is True"),
    ("filter: {max_shift: -1}", "filter.max_shift is a number of pixels, or off; it is -1"),
    ("filter: {max_unmarked: 5}", "filter.max_unmarked is a share from 0 to 1, or off; it is 5"),
    ("filter: {blank_intensity: 400}", "filter.blank_intensity is a grey from 0 to 255"),
    ("filter: {min_foreground: off}", "filter.min_foreground must be a number"),
    ("filter: {blank_reference: maxmum}", "did you mean 'maximum'"),
    ("filter: {drop_duplicates: 1}", "filter.drop_duplicates must be true or false; it is 1"),
    ("optim: {Ir: 0.1}", "unknown key 'optim.Ir'; did you mean 'optim.lr'"),
    ("epochs: 3", "did you mean 'train.epochs'"),
    ("seed: 1\nseed: 2", "line 2: key 'seed' stands twice"),
    ("optim:\n  lr: 1\n  lr: 2", "line 3: key 'lr' stands twice"),
    ("seed: 1.5", "seed must be a whole number; it is '1.5'"),
    ("seed: yes", "seed must be a whole number; it is True"),
    ("optim: {lr: fast}", "optim.lr must be a number; it is 'fast'"),
    ("optim: {lr: .nan}", "optim.lr must be a number"),
    ("data: {root: no}", "data.root must be text"),
    ("model: {widths: 32}", "model.widths must be a list"),
    ("model: 3", "'model' is a section"),
    ("loss: {name: dice-ce}", "did you mean 'dice_ce'"),
    ("train: {images_per_epoch: 11}", "multiple of train.folds"),
    ("data: {crop: 250}", "must be a multiple of 16"),
    ("data: {greys: [26, 51]}", "one value for each of the 3 classes"),
    ("data: {images: frames/x.png}", "exactly once"),
    ("data: {group: '('}", "not a regular expression"),
    ("data: {images: '/abs/{key}.png'}", "must be a plain path below data.root"),
    ("data: {images: './x/{key}.png'}", "must be a plain path"),
    ("name: 2024-02-30", "not valid YAML"),
    ("data: {masks: '../{key}.png'}", "must be a plain path"),
    ("? [a]\n: 1", "a key must be a plain word"),
    ("name: ../up", "name must be"),
    ("- a", "expected 'key: value' lines"),
    ("a: [", "not valid YAML"),
])
def test_what_it_does_not_know_is_refused_with_file_and_key(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert expected in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("override", "expected"), [
    ("optim.Ir=1", "did you mean 'optim.lr'"),
    ("nonsense", "neither an option nor an override"),
    ("model.widths=[1", "cannot read the value"),
    ("train.epochs=many", "train.epochs must be a whole number"),
])
def test_bad_overrides_are_refused(override, expected):
    with pytest.raises(UserError, match=expected.replace("[", "\\[")):
        apply_overrides(Config(), [override])


def test_only_allowed_keys_change_where_some_are_named():
    assert apply_overrides(Config(), ["device=cpu"], allowed=("device",)).device == "cpu"
    with pytest.raises(UserError, match="optim.lr belongs to what was trained"):
        apply_overrides(Config(), ["optim.lr=1"], allowed=("device",))


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path, "seed: 1")
    with pytest.raises(UserError, match="experiment.yaml"):
        load_config(tmp_path / "other.yaml")


@pytest.mark.parametrize("override", ["seed=010", "train.batch_size=1:30", "train.epochs=1_0", "seed=0x10",
                                      "train.folds=0b11", "model.widths=[4,010]", "optim.lr=1_0.5", "optim.lr=1:30.5",
                                      "optim.lr=010", "optim.lr=\u0661", "optim.lr=.inf", "optim.lr=true"])
def test_numbers_that_yaml_1_1_reads_otherwise_are_refused(override, tmp_path):
    with pytest.raises(UserError, match="must be a"):
        apply_overrides(Config(), [override])
    section, _, rest = override.partition(".")
    name, _, value = (rest or section).partition("=")
    path = tmp_path / "x.yaml"
    path.write_text(f"{section}: {{{name}: {value}}}\n" if rest else f"{name}: {value}\n")
    with pytest.raises(UserError, match="must be a"):
        load_config(path)


@pytest.mark.parametrize(("override", "value"), [("optim.lr=5e-4", 5e-4), ("optim.lr=.5", 0.5), ("optim.lr=1", 1.0),
                                                 ("optim.lr=1.5e-3", 1.5e-3), ("seed=12", 12), ("seed=+3", 3)])
def test_numbers_as_people_write_them(override, value):
    assert dict(leaves(apply_overrides(Config(), [override])))[override.partition("=")[0]] == value


@pytest.mark.parametrize("name", ["mean", "all"])
def test_a_class_may_not_be_called_like_a_selection_of_classes(name):
    with pytest.raises(UserError, match=f"'{name}' names"):
        apply_overrides(Config(), [f"data.classes=[background, tissue, {name}]"])


@pytest.mark.parametrize("text", ["010", "1e5", "5e-4", "1:30", "1_0", "0x1f", "1.5", "-0", "1.0e+3", "on",
                                  "null", "~"])
def test_text_that_looks_like_a_number_survives_the_file(text, tmp_path):
    config = apply_overrides(Config(), [f"data.group={text}"])
    (tmp_path / "x.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "x.yaml") == config
