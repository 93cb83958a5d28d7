"""common/config_files.py: files and overrides become a Config and back; unknown keys and wrong types are rejected."""

import pytest
import torch
import yaml

from common import config_files
from common.config import Config, Data, Model
from common.config_files import apply_overrides, from_dict, leaves, load_config, to_dict, to_yaml
from common.console import UserError
from common.statistics import Statistics
from training.checkpoints import build_model, load_checkpoint, save_checkpoint


def write(tmp_path, text):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return path


def test_yaml_and_back_is_the_identity(tmp_path):
    config = apply_overrides(Config(name="x"), ["optim.lr=1e-5", "data.group=^(s\\d+)", "model.widths=[8, 16]",
                                                "data.images={key}.png", "loss.name=ce"])
    assert load_config(write(tmp_path, to_yaml(config))) == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), "test") == config
    assert config.data.images == "{key}.png" and config.optim.lr == 1e-5


def test_dicts_hold_lists_for_tuples():
    assert to_dict(Config())["model"] == {"widths": [32, 64, 128, 256, 512], "dropout": 0.5}


def test_a_file_that_is_missing_names_its_neighbours(tmp_path):
    write(tmp_path, "seed: 1")
    with pytest.raises(UserError, match="other.yaml.*experiment.yaml"):
        load_config(tmp_path / "other.yaml")


@pytest.mark.parametrize(("text", "expected"), [
    ("filter: {max_blank: true}", ["filter.max_blank", "number", "True"]),
    ("filter: {max_shift: -1}", ["filter.max_shift", "-1"]),
    ("filter: {min_foreground: off}", ["filter.min_foreground", "number"]),
    ("filter: {blank_reference: maxmum}", ["'maxmum'", "'maximum'"]),
    ("filter: {drop_duplicates: 1}", ["filter.drop_duplicates", "true or false", "1"]),
    ("optim: {Ir: 0.1}", ["'optim.Ir'", "'optim.lr'"]),
    ("epochs: 3", ["'epochs'", "'train.epochs'"]),
    ("seed: 1\nseed: 2", ["line 2", "'seed'", "twice"]),
    ("optim:\n  lr: 1\n  lr: 2", ["line 3", "'lr'", "twice"]),
    ("seed: 1.5", ["seed", "whole number", "'1.5'"]),
    ("seed: yes", ["seed", "whole number", "True"]),
    ("optim: {lr: fast}", ["optim.lr", "number", "'fast'"]),
    ("optim: {lr: .nan}", ["optim.lr", "number"]),
    ("data: {root: no}", ["data.root", "text", "False"]),
    ("model: {widths: 32}", ["model.widths", "list", "32"]),
    ("model: 3", ["'model'", "section", "3"]),
    ("loss: {name: dice-ce}", ["loss.name", "'dice-ce'", "'dice_ce'"]),
    ("data: {group: '('}", ["data.group", "'('"]),
    ("1: 2", ["unknown", "'1'"]),
    ("name: 2024-02-30", ["YAML"]),
    ("? [a]\n: 1", ["line 1", "key"]),
    ("- a", ["key: value", "['a']"]),
    ("a: [", ["YAML"]),
])
def test_an_error_in_a_file_names_file_key_and_value(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_config(path)
    message = str(error.value)
    assert all(word in message for word in [str(path), *expected]) and "\n" not in message


@pytest.mark.parametrize(("override", "expected"), [
    ("optim.Ir=1", "'optim.lr'"), ("nonsense", "'nonsense'"), ("model.widths=[1", r"model.widths.*'\[1'"),
    ("train.epochs=many", "train.epochs.*whole number.*'many'")])
def test_an_error_in_an_override_names_key_and_value(override, expected):
    with pytest.raises(UserError, match=expected):
        apply_overrides(Config(), [override])


def test_other_keys_than_the_allowed_ones_must_not_change():
    assert apply_overrides(Config(), ["device=cpu"], allowed=("device",)).device == "cpu"
    with pytest.raises(UserError, match="optim.lr.*only device"):
        apply_overrides(Config(), ["optim.lr=1"], allowed=("device",))


# ---------------------------------------------------------------------------------------------- values

@pytest.mark.parametrize("word", ["off", "null", "none", "~", "false"])
def test_a_limit_can_be_switched_off_in_a_file_and_on_the_command_line(tmp_path, word):
    config = load_config(write(tmp_path, f"filter: {{max_blank: {word}}}"))
    assert config.filter.max_blank is None and config.filter.max_unmarked is None
    assert apply_overrides(Config(), [f"filter.max_blank={word}"]).filter.max_blank is None
    assert load_config(write(tmp_path, to_yaml(config))).filter == config.filter


@pytest.mark.parametrize("override", ["seed=010", "train.batch_size=1:30", "train.epochs=1_0", "seed=0x10",
                                      "train.folds=0b11", "model.widths=[4,010]", "optim.lr=1_0.5", "optim.lr=1:30.5",
                                      "optim.lr=010", "optim.lr=\u0661", "optim.lr=.inf", "optim.lr=true"])
def test_numbers_that_yaml_1_1_reads_differently_are_rejected(override, tmp_path):
    name, _, value = override.partition("=")
    with pytest.raises(UserError, match=f"{name} must be"):
        apply_overrides(Config(), [override])
    section, _, key = name.rpartition(".")
    path = write(tmp_path, f"{section}: {{{key}: {value}}}\n" if section else f"{key}: {value}\n")
    with pytest.raises(UserError, match=f"{name} must be"):
        load_config(path)


@pytest.mark.parametrize(("override", "value"), [("optim.lr=5e-4", 5e-4), ("optim.lr=.5", 0.5), ("optim.lr=1", 1.0),
                                                 ("optim.lr=1.5e-3", 1.5e-3), ("seed=12", 12), ("seed=+3", 3)])
def test_numbers_are_read_as_people_write_them(override, value, tmp_path):
    name = override.partition("=")[0]
    assert dict(leaves(apply_overrides(Config(), [override])))[name] == value
    if name == "optim.lr":
        assert load_config(write(tmp_path, f"optim: {{{override[6:].replace('=', ': ')}}}")).optim.lr == value


@pytest.mark.parametrize("text", ["010", "1e5", "5e-4", "1:30", "1_0", "0x1f", "1.5", "-0", "1.0e+3", "on",
                                  "null", "~"])
def test_text_that_looks_like_a_number_survives_the_file(text, tmp_path):
    config = apply_overrides(Config(name="experiment"), [f"data.group={text}"])
    assert config.data.group == text
    assert load_config(write(tmp_path, to_yaml(config))) == config


# ---------------------------------------------------------------------------------------------- old names of settings

@pytest.fixture
def warnings(monkeypatch):
    """The warnings about old names, as in a new process."""
    config_files._current_name.cache_clear()
    messages = []
    monkeypatch.setattr(config_files, "warn", messages.append)
    yield messages
    config_files._current_name.cache_clear()


def assert_one_warning_names_both(messages):
    message, = messages
    assert "data.greys" in message and "data.mask_values" in message


def test_an_old_name_in_a_file_works_and_warns_once(tmp_path, warnings):
    path = write(tmp_path, "data: {greys: [1, 2, 3], crop: 64}")
    for _ in range(2):
        assert load_config(path).data.mask_values == (1, 2, 3)
    assert load_config(path, ["data.mask_values=[4, 5, 6]"]).data.mask_values == (4, 5, 6)
    assert_one_warning_names_both(warnings)


def test_an_old_name_on_the_command_line_works_and_warns_once(warnings):
    for _ in range(2):
        assert apply_overrides(Config(), ["data.greys=[1, 2, 3]"]).data.mask_values == (1, 2, 3)
    with pytest.raises(UserError, match="data.mask_values.*only device"):
        apply_overrides(Config(), ["data.greys=[1, 2, 3]"], allowed=("device",))
    assert_one_warning_names_both(warnings)


@pytest.mark.parametrize("names", [("greys", "mask_values"), ("mask_values", "greys")])
def test_old_and_new_name_together_are_an_error(tmp_path, warnings, names):
    path = write(tmp_path, "data:\n" + "".join(f"  {name}: [1, 2, 3]\n" for name in names))
    with pytest.raises(UserError, match="'data.greys'.*'data.mask_values'") as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_wrong_value_under_an_old_name_is_reported_under_the_new_one(tmp_path, warnings):
    with pytest.raises(UserError, match=r"data.mask_values.*\[1, 2\]"):
        load_config(write(tmp_path, "data: {greys: [1, 2]}"))


def test_config_and_checkpoint_of_an_old_run_load(tmp_path, warnings):
    config, path = Config(model=Model((4, 8)), data=Data(mask_values=(1, 2, 3))), tmp_path / "best.pt"
    save_checkpoint(path, config=config, statistics=Statistics([0.5] * 3, [0.1] * 3, [0.2, 0.3, 0.5]), history=[],
                    tiles_identity="", model=build_model(config).state_dict(), optimizer={}, scheduler={})
    contents = torch.load(path, weights_only=True)
    contents["config"]["data"]["greys"] = contents["config"]["data"].pop("mask_values")
    torch.save(contents, path)
    settings = write(tmp_path, to_yaml(config).replace("mask_values:", "greys:"))
    assert load_checkpoint(path).config == load_config(settings) == config
    assert_one_warning_names_both(warnings)
