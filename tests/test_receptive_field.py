"""receptive_field.py as a command: its files, sentences, folders and errors."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import REPOSITORY, read_rows

import receptive_field
import train
from common import geometry
from common.config_files import apply_overrides
from common.console import UserError
from common.result_folders import replacing_folder
from evaluation.candidates import candidate_of_run


def test_theory_is_printed_without_torch():
    code = ("import sys; sys.argv = ['receptive_field.py', '--theory', '--config', "
            f"{str(REPOSITORY / 'configs/dice_ce.yaml')!r}, 'model.widths=[8, 16, 32, 64, 128, 256]']\n"
            "import receptive_field; receptive_field.main(); assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 levels" in done.stdout and "380 or 412" in done.stdout
    assert {geometry.size(6, p) for p in range(32)} == {380, 412}


@pytest.fixture
def command(monkeypatch):
    """Run the command in this process."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["receptive_field.py", *map(str, arguments)])
        receptive_field.main()
    return call


def change_weights(run, change):
    """Apply `change` to the weights of a run's best.pt."""
    file = run / "checkpoints/best.pt"
    contents = torch.load(file, weights_only=True)
    change(contents["model"])
    torch.save(contents, file)


def test_a_run_leaves_its_files_with_consistent_numbers(trained, command, capsys):
    command(trained, "--pixels", 6, "--format", "png", "svg", "pdf", "--precision", "float32")
    folder = trained / "receptive_field-float32-pixels-6"
    drawn = {f"{name}.{kind}" for name in ("fields", "profiles", "inputs", "paths", "border")
             for kind in ("png", "svg", "pdf")}
    assert {path.name for path in folder.iterdir()} - {".written.json"} == drawn | {"fields.csv", "paths.csv",
                                                                                    "fields.json"}
    rows = read_rows(folder / "fields.csv")
    conditions = {(row["weights"], row["input"]) for row in rows}
    assert conditions == {("trained", "tiles"), ("trained", "zeros"), ("trained", "noise"), ("untrained", "tiles")}
    on_tiles = {(row["inside"], row["logit"]): row["pixels"] for row in rows
                if (row["weights"], row["input"]) == ("trained", "tiles")}
    assert len(on_tiles) == 16 and on_tiles["tumour", "all"] == "6" and on_tiles["all", "tissue"] == "18"
    for row in rows:
        assert float(row["r50"]) <= float(row["r90"]) <= float(row["r95"]) <= 13
        assert float(row["area_share"]) == pytest.approx(math.pi * float(row["r95"]) ** 2 / 18**2, rel=1e-4)
        assert -9 <= int(row["first_row"]) <= 0 <= int(row["last_row"]) <= 9
    contents = json.loads((folder / "fields.json").read_text())["runs"][0]
    assert contents["theory"]["padded_share"]["256"] == pytest.approx(geometry.padded_share(2, 256, 256), rel=1e-5)
    paths = read_rows(folder / "paths.csv")
    shares = [float(row["gradient_x_activation"]) for row in paths if row["inside"] == "all"]
    assert sum(shares) == pytest.approx(1, abs=1e-4) and {row["dead"] for row in paths} == {"False"}
    out = capsys.readouterr().out
    assert "skip of level 1" in out and "wrote" in out and "dead" not in out
    command(trained, "--pixels", 6, "--precision", "float32")  # replaces its own results
    assert not (folder / "fields.svg").exists()


def lines_about(words, capsys):
    return [line for line in capsys.readouterr().out.splitlines() if words in line]


def test_other_options_have_their_own_folder(trained):
    candidate = candidate_of_run(trained, "best", [], flips=False, precision="float32")
    parser = receptive_field.parser_of_arguments()
    folders = [receptive_field.default_folder([candidate], parser.parse_args(arguments)).name for arguments in (
        [], ["--split", "all"], ["--pixels", "64"], ["--pixels", "64", "--precision", "float32"])]
    assert folders == ["receptive_field", "receptive_field-all", "receptive_field-pixels-64",
                       "receptive_field-float32-pixels-64"]


def test_intervals_need_five_groups(trained, command):
    """All tiles come from six slides, those of the test split from one."""
    command(trained, "--pixels", 12, "--split", "all", "--precision", "float32")
    rows = read_rows(trained / "receptive_field-all-float32-pixels-12/fields.csv")
    row = next(row for row in rows if row["input"] == "tiles" and row["inside"] == "all")
    assert row["groups"] == "6" and float(row["r95_low"]) <= float(row["r95"]) <= float(row["r95_high"])
    assert next(row for row in rows if row["input"] == "zeros")["r95_low"] == ""
    command(trained, "--pixels", 12, "--precision", "float32")
    few = read_rows(trained / "receptive_field-float32-pixels-12/fields.csv")
    assert few[0]["groups"] == "1" and few[0]["r95_low"] == ""


def test_a_dead_bottleneck_is_reported_with_the_field_that_is_left(trained, command, capsys):
    change_weights(trained, lambda weights: weights["up.0.weight"].zero_())
    command(trained, "--pixels", 6, "--precision", "float32")
    line, = lines_about("bottleneck is dead", capsys)
    assert line.startswith("tiny:") and "skip of level 1: 9 px instead of 18" in line
    folder = trained / "receptive_field-float32-pixels-6"
    rows = [row for row in read_rows(folder / "fields.csv") if row["weights"] == "trained"]
    assert all((row["first_row"], row["last_column"]) == ("-4", "4") for row in rows)
    dead = {row["path"]: row["dead"] for row in read_rows(folder / "paths.csv")}
    assert dead == {"skip of level 1": "False", "bottleneck": "True"}


def test_a_dead_skip_is_reported_and_the_field_stays(trained, command, capsys):
    change_weights(trained, lambda weights: weights["decoder.0.0.weight"][:, :4].zero_())
    command(trained, "--pixels", 6)
    line, = lines_about("is dead", capsys)
    assert line.startswith("tiny: the skip of level 1 is dead") and "px" not in line


def test_a_faint_bottleneck_is_reported_as_almost_dead(trained, command, capsys):
    change_weights(trained, lambda weights: weights["up.0.weight"].mul_(1e-9))
    command(trained, "--pixels", 6, "--precision", "float32")
    line, = lines_about("almost dead", capsys)
    assert "the bottleneck is almost dead" in line and "px" not in line


def test_a_model_without_any_gradient_is_reported(trained, command, capsys):
    change_weights(trained, lambda weights: weights["head.weight"].zero_())
    command(trained, "--pixels", 3)
    assert "tiny: no gradient reaches the input" in capsys.readouterr().out


def test_results_of_other_commands_are_not_replaced(trained, command, tmp_path):
    with replacing_folder(tmp_path / "evaluation") as partial:
        (partial / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="evaluation would be replaced"):
        command(trained, "--out", tmp_path / "evaluation")
    assert (tmp_path / "evaluation/scores.json").exists()


def test_networks_of_different_depth_are_compared(trained, tiny, command, capsys):
    train.start(apply_overrides(tiny, ["train.epochs=1", "name=deep", "model.widths=[4,4,4]"]))
    with pytest.raises(UserError, match="deep.*48 x 40 pixels.*3 levels.*52 x 52"):
        command(trained, trained.parent / "deep")
    assert not (trained.parent / "receptive_field-tiny-deep").exists()
    train.start(apply_overrides(tiny, ["train.epochs=1", "name=flat", "model.widths=[4]"]))
    command(trained, trained.parent / "flat", "--pixels", 3)
    folder = trained.parent / "receptive_field-tiny-flat-pixels-3"
    found = json.loads((folder / "fields.json").read_text())["runs"]
    assert [run["theory"]["area"] for run in found] == [18**2, 5**2] and (folder / "fields.png").exists()
    assert "flat  " in capsys.readouterr().out
    shutil.copy(trained / "checkpoints/best.pt", trained)
    command("--theory", trained / "best.pt", trained.parent / "flat/checkpoints/best.pt")
    assert "2 levels" in (out := capsys.readouterr().out) and "1 level." in out
    command("--as-published", trained)
    assert "tiny, epoch 1" in capsys.readouterr().out


def test_what_cannot_be_measured_is_rejected(trained, command, tmp_path):
    for arguments, message in (
            ([], "run.*--theory"), (["runs/nothing"], "runs/nothing"), (["--theory", "runs/nothing"], "runs/nothing"),
            ([trained, "--config", "x.yaml"], "--config"), ([trained, "--pixels", 0], "--pixels.*1.*0"),
            ([trained, "--theory", "--as-published"], "--as-published.*--theory"),
            ([trained, "model.dropout=0.1"], "model.dropout"),
            (["--theory", "model.widths=[4,8]"], "model.widths.*--config"),
            (["--theory", "--pixels", 4], "--pixels.*--theory"),
            (["--as-published", trained, "--out", tmp_path / "x"], "--out.*--as-published"),
            ([trained, f"data.root={tmp_path / 'none'}"], "none/tiles.csv"),
            ([trained, trained], "same name.*runs/tiny"), ([trained, "--out", tmp_path / "runs"], "runs")):
        with pytest.raises(UserError, match=message):
            command(*arguments)
    change_weights(trained, lambda weights: weights["head.bias"].fill_(math.nan))
    with pytest.raises(UserError, match="head.bias"):
        command(trained)
