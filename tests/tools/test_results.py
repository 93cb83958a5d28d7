"""tools/results: a plan is trained once, goes on, is scored as evaluate.py does, and its page follows from numbers."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import REPOSITORY, TINY, read_rows, read_scores, script, write_pairs
from PIL import Image

from common.config_files import load_config
from common.console import UserError
from tools.results import numbers, page
from tools.results.plan import load_plan
from tools.results.runs import duration, prepare, seconds_left

PLAN = """\
title: Tiny
config: base.yaml
settings: {settings}
seeds: [0, 1]
rows:
  dice_ce: ''
  ce: loss.name=ce
comparisons:
  loss: {{question: "Which loss?", rows: [dice_ce, ce]}}
  alone: {{question: And by itself, rows: [ce]}}
"""


SETTINGS = (*TINY, "data.crop=32", "filter.blank_intensity=130", "filter.max_blank=off")


def write_plan(folder, text=PLAN, settings=SETTINGS):
    (folder / "base.yaml").write_text("data: {root: tiles}\n")
    quoted = " ".join(f"'{word}'" for word in settings)
    (folder / "tiny.yaml").write_text(text.format(settings=json.dumps(quoted)))
    return folder / "tiny.yaml"


@pytest.fixture
def call(here):
    """Run the tool on the plan in a folder; only what it trains and scores runs in processes of their own."""
    return lambda folder, *arguments: here("tools.results.__main__", "tiny.yaml", *arguments, cwd=folder)


@pytest.fixture(scope="session")
def done_once(built_once):
    """A folder in which the plan was run; output.txt is what the tool printed."""
    def fill(folder):
        write_pairs(folder / "tiles", 18, slides=6)
        write_plan(folder)
        out = script("tools.results", "tiny.yaml", "--out", "out", "--jobs", "2", cwd=folder)
        assert out.returncode == 0, out.stderr
        (folder / "output.txt").write_text(out.stdout)
    return built_once("results", fill)


@pytest.fixture
def done(done_once, tmp_path):
    shutil.copytree(done_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def checkpoints_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoints/last.pt")}


def test_every_row_is_trained_with_every_seed_and_scored_as_evaluate_does(done_once):
    folder, output = done_once, (done_once / "output.txt").read_text()
    assert "runs to train: 4, 2 at once; time: unknown" in output
    assert "tiny-dice_ce-seed0: python data_filter.py --config base.yaml" in output
    runs = {f"tiny-{row}-seed{seed}" for row in ("dice_ce", "ce") for seed in (0, 1)}
    assert {path.parent.name for path in folder.glob("runs/*/config.yaml")} == runs and not [*folder.glob("runs/*.log")]
    for name in runs:
        config = load_config(folder / f"runs/{name}/config.yaml")
        assert config.name == name and config.loss.name == ("ce" if "-ce-" in name else "dice_ce")
        assert config.train.epochs == 3 and config.seed == int(name[-1])
        kept = (folder / f"out/metrics/loss/{name}.csv").read_text()
        assert kept == (folder / f"runs/{name}/metrics.csv").read_text()
    evaluated = script("evaluate.py", *(f"runs/tiny-{row}-seed{seed}" for row in ("dice_ce", "ce") for seed in (0, 1)),
                       "--out", "by_hand", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    by_hand, found = read_scores(folder / "by_hand"), json.loads((folder / "out/loss.json").read_text())
    assert found["seeds"] == [0, 1] and [row["row"] for row in found["rows"]] == ["dice_ce", "ce"]
    for row, experiment in zip(found["rows"], by_hand["experiments"], strict=True):
        assert row["scores"] == experiment["scores"]
        assert row["difference_to_first"] == experiment["difference_to_first"]
    of_runs = [run["scores"]["dice"]["mean"] for row in found["rows"] for run in row["runs"]]
    assert of_runs == [entry["scores"]["dice"]["mean"]["value"] for entry in by_hand["entries"]]
    assert found["rows"][1]["settings"]["loss.name"] == "ce" and "loss.name" not in found["rows"][0]["settings"]
    assert str(folder) not in (folder / "out/loss.json").read_text(), "numbers that are kept name no place"


def test_the_page_shows_what_the_numbers_say(done_once):
    folder = done_once
    text, found = (folder / "out/results.md").read_text(), json.loads((folder / "out/loss.json").read_text())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ce")]
    row = found["rows"][1]
    dice, difference = row["scores"]["dice"]["mean"], row["difference_to_first"]["dice"]["mean"]
    values = [run["scores"]["dice"]["mean"] for run in row["runs"]]
    assert dice["value"] == pytest.approx(sum(values) / 2, abs=1e-6)
    assert lines[0][1] == f"{dice['value']:.3f}" and lines[0][3] == f"{difference['value']:+.3f}"
    assert lines[0][5] == f"{values[0]:.3f}, {values[1]:.3f}"
    assert "`python -m tools.results tiny.yaml`" in text and "Which loss?" in text
    assert "- ce: `loss.name=ce`" in text and "(loss.png)" in text
    assert (folder / "out/loss.png").stat().st_size > 2000


def test_fields_blank_spots_and_pictures_are_those_of_the_runs(done, call):
    (done / "tiny.yaml").write_text((done / "tiny.yaml").read_text().replace(
        "[dice_ce, ce]", "[dice_ce, ce], show: [curves, predictions, fields, blank]"))
    assert call(done, "--out", "out", "--score", "--only", "loss").returncode == 0
    text = (done / "out/results.md").read_text()
    for name in ("loss-curves", "loss-predictions", "loss-fields"):
        assert f"({name}.png)" in text and (done / f"out/{name}.png").stat().st_size > 2000
    folder, found = done, json.loads((done / "out/loss.json").read_text())
    fields = json.loads((folder / "runs/tiny-loss-fields/fields.json").read_text())
    tiles = [row for row in read_rows(folder / "tiles/tiles.csv") if row["split"] == "test"]
    for row in found["rows"]:
        for run in row["runs"]:
            of_run = [each for each in fields["runs"] if each["name"] == run["name"]]
            assert len(of_run) == ("fields" in run) == (run["seed"] == 0), "those of the first seed are measured"
            for inside, radius in run["fields"]["r95"].items() if of_run else ():
                assert radius == next(each["r95_even"] for each in of_run[0]["fields"] if each["weights"] == "trained"
                                      and each["input"] == "tiles" and each["inside"] == inside
                                      and each["logit"] == "all")
            if of_run:
                shares = {each["path"]: each["gradient_x_activation"] for each in of_run[0]["paths"]
                          if each["inside"] == "all"}
                assert run["fields"]["paths"] == shares and sum(shares.values()) == pytest.approx(1, abs=1e-4)
            pixels = missed = 0
            for tile in tiles:
                image, mask = (np.array(Image.open(folder / "tiles" / tile[name])) for name in ("image", "mask"))
                label = np.array(Image.open(folder / f"runs/tiny-loss/predictions/{run['name']}/{tile['key']}.png"))
                for y, x in np.ndindex(mask.shape):
                    if mask[y, x] > 26 and 255 - image[y, x].sum() / 3 < 130:
                        pixels, missed = pixels + 1, missed + (label[y, x] == 26)
            assert pixels > 0 and run["blank"] == pytest.approx(missed / pixels, abs=1e-4)


def test_unrest_is_the_share_of_rises_in_the_fall_of_a_loss():
    histories = [[{"val_loss": loss} for loss in losses] for losses in ([5, 3, 4, 1, 3], [1, 2, 3], [3, 2, 1])]
    assert page.unrest({"a": histories})[1] == [["a", "4, 1, 3", "0.75, inf, 0.00", "inf"]]


def test_what_is_complete_is_not_trained_again_and_an_interrupted_run_goes_on(done, call):
    before = checkpoints_of(done)
    assert len(before) == 4
    shutil.rmtree(done / "out")
    shutil.rmtree(done / "runs/tiny-dice_ce-seed1")
    (done / "tiny.yaml").write_text((done / "tiny.yaml").read_text().replace("name=ce", "name=ce train.epochs=4"))
    shown = call(done, "--plan", "--out", "out")
    assert re.search(r"\nce +epoch 3 of 4 +epoch 3 of 4\n", shown.stdout), shown.stdout
    assert re.search(r"dice_ce +complete +-\n", shown.stdout) and "runs to train: 3" in shown.stdout
    assert re.search("time: about [0-9]+ s", shown.stdout), "since epochs were measured"
    again = call(done, "--out", "out", "--jobs", "2")
    assert again.returncode == 0, again.stderr
    after = checkpoints_of(done)
    changed = {path.parent.parent.name for path in after if after[path] != before.get(path)}
    assert changed == {"tiny-ce-seed0", "tiny-ce-seed1", "tiny-dice_ce-seed1"}
    assert len((done / "runs/tiny-ce-seed0/metrics.csv").read_text().splitlines()) == 5
    assert "epochs: 4" in (done / "runs/tiny-ce-seed0/config.yaml").read_text()


def test_numbers_that_are_kept_stand_for_runs_of_another_machine(done, call):
    page_before = (done / "out/results.md").read_text()
    shutil.rmtree(done / "runs")
    shutil.rmtree(done / "tiles")
    shown = call(done, "--plan", "--out", "out")
    assert re.search("ce +numbers kept +numbers kept\n", shown.stdout) and "all trained" in shown.stdout
    (done / "out/results.md").unlink()
    assert call(done, "--out", "out").returncode == 0
    assert (done / "out/results.md").read_text() == page_before and not (done / "runs").exists()
    (done / "tiny.yaml").write_text((done / "tiny.yaml").read_text().replace("loss.name=ce", "loss.name=dice"))
    shown = call(done, "--plan", "--out", "out")
    assert re.search("\nce +- +-\n", shown.stdout) and "runs to train: 4" in shown.stdout
    failed = call(done, "--out", "out")
    assert failed.returncode == 2 and "tiles: no such folder of tiles" in failed.stderr


def test_one_seed_is_enough_for_numbers_that_say_so(done, call):
    shutil.rmtree(done / "out")
    shutil.rmtree(done / "runs/tiny-dice_ce-seed1")
    assert call(done, "--out", "out", "--score").returncode == 0
    found, text = json.loads((done / "out/loss.json").read_text()), (done / "out/results.md").read_text()
    assert found["seeds"] == [0] and json.loads((done / "out/alone.json").read_text())["seeds"] == [0, 1]
    assert "One seed, 0: another one may differ" in text and text.count("| of each seed |") == 1
    shutil.rmtree(done / "runs/tiny-ce-seed0")
    (done / "out/loss.json").unlink()
    assert call(done, "--out", "out", "--score").returncode == 0
    text = (done / "out/results.md").read_text()
    assert "Which loss?\n\nNot run yet: `python -m tools.results tiny.yaml --only loss`" in text


def test_other_rows_first_or_other_merges_need_other_numbers(done, call):
    plan = (done / "tiny.yaml").read_text()
    (done / "tiny.yaml").write_text(plan.replace("[dice_ce, ce]", "[ce, dice_ce]") + "merge: ['any=tissue,tumour']\n")
    assert call(done, "--out", "out", "--score").returncode == 0
    found = json.loads((done / "out/loss.json").read_text())
    assert [row["row"] for row in found["rows"]] == ["ce", "dice_ce"] and not found["rows"][0]["difference_to_first"]
    merged = found["rows"][1]["merged"]["any"]
    assert merged["name"] == "tiny-dice_ce" and 0 < merged["dice"]["value"] < 1
    assert f"| {merged['dice']['value']:.3f} | 3 |" in (done / "out/results.md").read_text()


def test_numbers_of_more_seeds_are_not_replaced_by_numbers_of_fewer(done, call):
    before = (done / "out/loss.json").read_text()
    shutil.rmtree(done / "runs/tiny-ce-seed1")
    assert call(done, "--out", "out", "--score").returncode == 0
    assert (done / "out/loss.json").read_text() == before


def test_an_error_of_a_run_ends_all_and_says_where_to_look(done, call):
    (done / "tiny.yaml").write_text((done / "tiny.yaml").read_text().replace("loss.name=ce", "device=cuda:7"))
    shutil.rmtree(done / "runs")
    failed = call(done, "--out", "new", "--jobs", "1", "--only", "alone")
    assert failed.returncode == 2 and failed.stderr.count("error:") == 1
    assert "tiny-ce-seed0: device 'cuda:7' cannot be used here" in failed.stderr
    assert "runs/tiny-ce-seed0.log has more" in failed.stderr and (done / "runs/tiny-ce-seed0.log").exists()
    assert not (done / "runs/tiny-ce-seed1.log").exists(), "no run begins after the error"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_an_interrupt_ends_the_runs_too(done):
    write_plan(done, settings=[*TINY, "train.epochs=100000", "name=long"])
    shutil.rmtree(done / "runs")
    process = subprocess.Popen([sys.executable, "-m", "tools.results", "tiny.yaml", "--out", "new"], cwd=done,
                               env={"PYTHONPATH": str(REPOSITORY), "PATH": ""}, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        run = done / "runs/tiny-dice_ce-seed0"
        while process.poll() is None and not (run / "checkpoints/last.pt").exists():
            time.sleep(0.1)  # the runs need the processor
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130 and "give the same command again" in errors
    resumed = script("train.py", "--resume", run, "train.epochs=1", cwd=done)
    assert "is being" not in resumed.stderr, "no process holds the run"


@pytest.mark.parametrize(("old", "new", "message"), [
    ("title: Tiny", "titel: Tiny", "unknown key 'titel'"),
    ("config: base.yaml\n", "", "config is missing"),
    ("config: base.yaml", "config: none.yaml", "none.yaml: no such config file"),
    ("seeds: [0, 1]", "seeds: [0, 0]", "seeds must be different whole numbers"),
    ("seeds: [0, 1]", "seeds: 3", "seeds must be a list"),
    ("ce: loss.name=ce", "ce: loss.nam=ce", "did you mean 'loss.name'"),
    ("ce: loss.name=ce", "ce: loss.name=dice_ce", "dice_ce and ce have the same settings"),
    ("ce: loss.name=ce", "c/e: loss.name=ce", "'c/e' must be letters"),
    ("[dice_ce, ce]", "[dice_ce, wce]", "loss: there is no row 'wce'; rows are dice_ce, ce"),
    ('question: "Which loss?", ', "", "loss must have a question and rows"),
    ("rows: [dice_ce, ce]", "rows: [dice_ce, ce], show: [curve]", "loss: show: unknown 'curve'; known are curves"),
    ("config: base.yaml", "networks: {{ce: vgg}}\nconfig: base.yaml", "ce: unknown network 'vgg'; known are smp-"),
    ("config: base.yaml", "networks: {{wce: monai-basic}}\nconfig: base.yaml", "networks: there is no row 'wce'"),
    ("config: base.yaml", "networks: {{dice_ce: monai-basic}}\nconfig: base.yaml", "must come after all of ours"),
    ("config: base.yaml", "prepare: {{tiles: make}}\nconfig: base.yaml", "prepare: tiles must be a list of commands"),
    ("config: base.yaml", "test: data.crop=3\nconfig: base.yaml", "data.crop"),
])
def test_a_plan_that_does_not_fit_is_rejected(tmp_path, monkeypatch, old, new, message):
    monkeypatch.chdir(tmp_path)
    assert PLAN.count(old) == 1
    write_plan(tmp_path, PLAN.replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_plan("tiny.yaml")
    assert "tiny.yaml" in str(error.value) or "none.yaml" in message


def test_commands_make_the_folders_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("data: {root: made, group: '^(s[0-9]+)'}\n")
    (tmp_path / "tiny.yaml").write_text("""\
config: base.yaml
seeds: [0]
test: data.root=other data.cache=other_list
prepare:
  made: [python -m tools.make_demo_data made --tiles 8 --slides 4 --size 128 --seed 5]
  other: [python -m tools.make_demo_data other --tiles 6 --slides 3 --size 128 --seed 5]
  other_list: [python data_filter.py --config base.yaml data.root=other data.cache=other_list filter.max_blank=off]
rows: {given: '', all: data.cache=all filter.min_foreground=0 filter.max_blank=off}
comparisons: {filter: {question: "Which?", rows: {by rules: given, all of them: all}}}
""")
    plan = load_plan("tiny.yaml")
    prepare(plan, [runs[0] for runs in plan.runs.values()])
    kept = {folder: [row["split"] in ("train", "test") for row in read_rows(tmp_path / folder / "tiles.csv")]
            for folder in ("made", "all", "other_list")}
    assert len(kept["made"]) == 8 and sum(kept["all"]) == 8 and len(kept["other_list"]) == 6
    assert sum(kept["made"]) < 8 and not (tmp_path / "other/tiles.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.csv")}
    prepare(plan, [runs[0] for runs in plan.runs.values()])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.csv")} == before, "nothing is made twice"
    assert plan.comparisons[0].labels == ("by rules", "all of them") and plan.tested("all").root == "other"
    assert plan.test_words == ["--split", "all", "data.root=other", "data.cache=other_list"]
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "tiny.yaml").write_text((tmp_path / "tiny.yaml").read_text().replace(
        "tools.make_demo_data made", "tools.prepare_ebhi SOURCE made"))
    with pytest.raises(UserError, match="made: no such folder of tiles; make it with: python -m tools.prepare_ebhi"):
        prepare(load_plan("tiny.yaml"), [plan.runs["given"][0]])


def test_rows_of_other_networks_are_other_rows_and_are_scored_by_their_label_images(done, call):
    text = (done / "tiny.yaml").read_text()
    (done / "tiny.yaml").write_text(text.replace("comparisons:", """\
  basic: ''
networks: {basic: monai-basic}
comparisons:
  networks: {question: "Ours or theirs?", rows: {ours: dice_ce, MONAI: basic}}"""))
    out = call(done, "--out", "out", "--only", "networks")
    assert out.returncode == 0, out.stderr
    found = json.loads((done / "out/networks.json").read_text())
    ours, theirs = found["rows"]
    assert theirs["row"] == "MONAI" and theirs["settings"]["network"] == "monai-basic"
    assert not any(name.startswith("model.") for name in theirs["settings"]) and "model.widths" in ours["settings"]
    assert "soft_dice" not in theirs["scores"] and [run["epochs"] for run in theirs["runs"]] == [3, 3]
    values = [run["scores"]["dice"]["mean"] for run in theirs["runs"]]
    assert theirs["scores"]["dice"]["mean"]["value"] == pytest.approx(sum(values) / 2, abs=1e-6)
    assert theirs["difference_to_first"]["dice"]["mean"]["value"] == pytest.approx(
        theirs["scores"]["dice"]["mean"]["value"] - ours["scores"]["dice"]["mean"]["value"], abs=2e-6)
    assert "- MONAI (basic): monai-basic (tools/other_networks.py)" in (done / "out/results.md").read_text()
    assert "all trained" in call(done, "--plan", "--out", "new", "--only", "networks").stdout
    shutil.rmtree(done / "runs/tiny-basic-seed1/predictions")
    assert "runs to train: 1," in call(done, "--plan", "--out", "new", "--only", "networks").stdout


def test_unknown_comparisons_are_rejected(tmp_path, call):
    write_plan(tmp_path)
    out = call(tmp_path, "--only", "losses")
    assert out.returncode == 2 and "has the comparisons loss, alone" in out.stderr


def test_the_time_left_is_that_of_the_same_row(done, monkeypatch):
    monkeypatch.chdir(done)
    plan = load_plan("tiny.yaml")
    for name, seconds in (("dice_ce-seed0", 10), ("ce-seed0", 2), ("dice_ce-seed1", 30)):
        path = done / f"runs/tiny-{name}/metrics.csv"
        header, *lines = path.read_text().splitlines()
        place = header.split(",").index("seconds")
        rows = [[*line.split(",")[:place], str(seconds), *line.split(",")[place + 1:]] for line in lines]
        path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    shutil.rmtree(done / "runs/tiny-ce-seed1")
    known = [run for runs in plan.runs.values() for run in runs]
    assert seconds_left([plan.runs["ce"][1]], known) == 3 * 2
    assert seconds_left([plan.runs["ce"][1]], plan.runs["dice_ce"]) == 3 * 20, "by all that are known"
    assert seconds_left([plan.runs["ce"][1]], []) is None
    assert [duration(seconds) for seconds in (40, 700, 12000)] == ["40 s", "12 min", "3 h 20 min"]


def test_the_plan_of_the_documentation_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (block,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs/training.md").read_text(), re.DOTALL)
    (tmp_path / "my_plan.yaml").write_text(block)
    plan = load_plan(str(tmp_path / "my_plan.yaml"))
    assert plan.comparisons[0].rows == ("flips", "stain") and plan.runs["stain"][2].name == "my_plan-stain-seed2"


# ---------------------------------------------------------------------------------------------- what is committed

KEPT = sorted((REPOSITORY / "docs/results").glob("*/results.md"))


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs/results").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_of_the_repository_can_be_read(file, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    plan = load_plan(file.stem)
    assert plan.runs and {row for comparison in plan.comparisons for row in comparison.rows} == {*plan.rows}
    assert (REPOSITORY / "docs/results" / plan.name / "results.md") in KEPT


def scores_in(value):
    """Every score with an interval in the contents of a JSON file."""
    if isinstance(value, dict) and {"value", "low", "high"} <= value.keys():
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from scores_in(part)


def test_scores_that_the_documentation_quotes_are_those_that_are_kept():
    files = [json.loads(path.read_text()) for path in (REPOSITORY / "docs/results").glob("*/*.json")]
    kept = {tuple(format(score[name], form) for name in ("value", "low", "high"))
            for score in scores_in(files) if score["low"] is not None for form in (".3f", "+.3f", ".1f", "+.1f")}
    quoted = re.findall(r"([+-]?\d+\.\d+)(?: px)? \(([+-]?\d+\.\d+) to ([+-]?\d+\.\d+)\)",
                        (REPOSITORY / "docs/results.md").read_text())
    assert len(quoted) > 15 and not [score for score in quoted if score not in kept]


@pytest.mark.parametrize("file", KEPT, ids=lambda path: path.parent.name)
def test_pages_of_the_repository_follow_from_the_numbers_beside_them(file, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    plan = load_plan(file.parent.name)
    found = {comparison.name: kept for comparison in plan.comparisons
             if (kept := numbers.read_numbers(file.parent, plan, comparison))}
    assert {*found} == {path.stem for path in file.parent.glob("*.json")}, "numbers are of the plan's settings"
    page.write(tmp_path, plan, found, file.parent / "metrics")
    assert (tmp_path / "results.md").read_text() == file.read_text()
    for name, of_one in found.items():
        for row in of_one["rows"]:
            for run in row["runs"]:
                assert (file.parent / f"metrics/{name}/{run['name']}.csv").is_file()
