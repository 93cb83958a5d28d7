import json
import multiprocessing
import random

import pytest
import torch

from common.config import Config
from common.config_files import apply_overrides, load_config
from common.console import UserError
from dataset import Statistics
from training import checkpoints, run_folder

CONFIG = apply_overrides(Config(name="x"), ["model.widths=[2, 4]", "data.crop=16"])
STATISTICS = Statistics([0.5, 0.4, 0.6], [0.2, 0.2, 0.2], [0.5, 0.3, 0.2])


@pytest.fixture
def checkpoint(tmp_path):
    model = checkpoints.build_model(CONFIG)
    optimizer = torch.optim.Adam(model.parameters())
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint(path, config=CONFIG, statistics=STATISTICS, history=[{"epoch": 1, "val_loss": 0.5}],
                         tiles="0" * 64, model=model.state_dict(), optimizer=optimizer.state_dict(),
                         scheduler={"best": float("inf")})
    return path, model


def test_a_checkpoint_comes_back_as_saved(checkpoint):
    path, model = checkpoint
    loaded = checkpoints.load_checkpoint(path)
    assert (loaded.config, loaded.statistics, loaded.epoch) == (CONFIG, STATISTICS, 1)
    again = checkpoints.build_model(loaded.config)
    checkpoints.load_weights(again, loaded)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_one_altered_bit_anywhere_is_refused_or_harmless(checkpoint):
    """torch.load itself reads altered weights without a word."""
    path, _ = checkpoint
    whole, chance = path.read_bytes(), random.Random(0)
    reference = torch.load(path, weights_only=True)["model"]
    refused = 0
    for _ in range(150):
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1:])
        try:
            loaded = checkpoints.load_checkpoint(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(loaded.model[name], value) for name, value in reference.items())
    assert refused > 75


@pytest.mark.parametrize("spoil", [lambda b: b[:-100], lambda b: b[:100], lambda b: b"", lambda b: b"no zip"])
def test_truncated_and_foreign_files_are_refused(checkpoint, spoil):
    path, _ = checkpoint
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoints.load_checkpoint(path)


def test_another_programs_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match="not a checkpoint of this repository"):
        checkpoints.load_checkpoint(tmp_path / "theirs.pt")


def test_a_checkpoint_of_an_older_version_is_said_to_be_one(checkpoint):
    contents = torch.load(checkpoint[0], weights_only=True)
    torch.save(contents | {"format": "crc-unet checkpoint 1"}, checkpoint[0])
    with pytest.raises(UserError, match="written by another version of this repository"):
        checkpoints.load_checkpoint(checkpoint[0])


def test_weights_that_do_not_fit_name_both_sides(checkpoint):
    loaded = checkpoints.load_checkpoint(checkpoint[0])
    other = checkpoints.build_model(apply_overrides(CONFIG, ["model.widths=[2, 8]"]))
    with pytest.raises(UserError, match=r"model.widths \[2, 4\].*is \(.*\) in the file and \(.*\) in the network"):
        checkpoints.load_weights(other, loaded)


def test_a_missing_checkpoint_names_what_is_there(checkpoint):
    with pytest.raises(UserError, match=r"no such checkpoint \(there: .*last.pt"):
        checkpoints.load_checkpoint(checkpoint[0].with_name("best.pt"))


def a_run(folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").touch()
    return folder


def hold(folder, held, done):
    with run_folder.locked_run(folder):
        held.set()
        done.wait()


def test_two_processes_cannot_train_one_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    a_run(tmp_path)
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, done), daemon=True)
    process.start()
    while not held.wait(0.1):
        assert process.is_alive()
    with pytest.raises(UserError, match="another process"), run_folder.locked_run(tmp_path):
        pass
    process.kill()
    process.join()
    with run_folder.locked_run(tmp_path):
        pass  # the system freed it


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (a_run(tmp_path) / "checkpoints").mkdir()
    leftover, other = tmp_path / "checkpoints" / ".last.pt.123.tmp", tmp_path / "checkpoints" / ".precious.tmp"
    leftover.touch()
    other.touch()
    with run_folder.locked_run(tmp_path):
        assert not leftover.exists() and other.exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="no such run"), run_folder.locked_run(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten_and_says_what_it_was_made_with(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "tiles.csv").write_text("key\n")
    config = apply_overrides(CONFIG, [f"data.root={root}"])
    folder = tmp_path / "runs" / "x"
    run_folder.reject_existing(folder)
    run_folder.create_run(folder, config)
    with pytest.raises(UserError, match="not overwritten"):
        run_folder.create_run(folder, config)
    assert [path.name for path in folder.parent.iterdir()] == ["x"]
    for precision in (torch.bfloat16, torch.float32):
        run_folder.record_start(folder, config, torch.device("cpu"), precision)
    first, environment = json.loads((folder / "environment.json").read_text())
    assert first["precision"] == "bfloat16" and load_config(folder / "config.yaml") == config
    assert torch.__version__.startswith(environment["packages"]["torch"].partition("+")[0])
    assert environment["precision"] == "float32" and len(environment["tiles_sha256"]) == 64
    with pytest.raises(UserError, match="--resume"):
        run_folder.reject_existing(folder)
