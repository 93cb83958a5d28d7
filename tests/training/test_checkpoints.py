"""training/checkpoints.py: a checkpoint comes back as saved, and damaged or foreign files are rejected by name."""

import random

import pytest
import torch

from common.config import Config
from common.config_files import apply_overrides
from common.console import UserError
from common.statistics import Statistics
from training import checkpoints

CONFIG = apply_overrides(Config(name="x"), ["model.widths=[2, 4]", "data.crop=16"])
STATISTICS = Statistics([0.5, 0.4, 0.6], [0.2, 0.2, 0.2], [0.5, 0.3, 0.2])


@pytest.fixture
def model():
    return checkpoints.build_model(CONFIG)


@pytest.fixture
def path(tmp_path, model):
    """A checkpoint on disk."""
    optimizer = torch.optim.Adam(model.parameters())
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint(path, config=CONFIG, statistics=STATISTICS, history=[{"epoch": 1, "val_loss": 0.5}],
                                tiles_identity="0" * 64, model=model.state_dict(), optimizer=optimizer.state_dict(),
                                scheduler={"best": float("inf")})
    return path


def test_a_checkpoint_comes_back_as_saved(path, model):
    loaded = checkpoints.load_checkpoint(path)
    assert (loaded.config, loaded.statistics, loaded.epoch) == (CONFIG, STATISTICS, 1)
    again = checkpoints.build_model(loaded.config)
    checkpoints.load_weights(again, loaded)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_one_altered_bit_is_rejected_or_harmless(path):
    """torch.load itself does not notice altered weights."""
    whole, draw = path.read_bytes(), random.Random(0)
    reference = torch.load(path, weights_only=True)["model"]
    rejected = 0
    for _ in range(150):
        at = draw.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1:])
        try:
            loaded = checkpoints.load_checkpoint(path)
        except UserError as error:
            rejected += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(loaded.model[name], value) for name, value in reference.items())
    assert rejected > 75


@pytest.mark.parametrize("spoil", [lambda b: b[:-100], lambda b: b[:100], lambda b: b"", lambda b: b"no zip"])
def test_truncated_and_foreign_files_are_rejected(path, spoil):
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="last.pt: not a readable checkpoint"):
        checkpoints.load_checkpoint(path)


def test_the_checkpoint_of_another_program_is_rejected(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match="theirs.pt: not a checkpoint.*None"):
        checkpoints.load_checkpoint(tmp_path / "theirs.pt")


def test_a_checkpoint_of_another_version_names_both_versions(path):
    contents = torch.load(path, weights_only=True)
    torch.save(contents | {"format": "crc-unet checkpoint 1"}, path)
    with pytest.raises(UserError, match="last.pt.*expected.*checkpoint 2'.*found.*checkpoint 1'"):
        checkpoints.load_checkpoint(path)


def test_weights_that_do_not_fit_name_both_shapes(path):
    loaded = checkpoints.load_checkpoint(path)
    other = checkpoints.build_model(apply_overrides(CONFIG, ["model.widths=[2, 8]"]))
    with pytest.raises(UserError, match=r"' is \(.*\) in the file and \(.*\) in .*model.widths=\[2, 4\]"):
        checkpoints.load_weights(other, loaded)


def test_a_missing_checkpoint_names_those_that_exist(path):
    with pytest.raises(UserError, match=r"best.pt: no such checkpoint \(there: .*last.pt"):
        checkpoints.load_checkpoint(path.with_name("best.pt"))
