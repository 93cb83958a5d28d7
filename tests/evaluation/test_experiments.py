"""evaluation/experiments.py: runs of several seeds as one row, whose interval holds slides and seeds."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import always_predict, copy_run, read_rows, read_scores, run_evaluate
from scipy import stats

from common import bootstrap
from common.config import Config, Filter, Loss
from evaluation.experiments import (
    experiments_of,
    explain_separate_seeds,
    mean_samples,
    seed_margins,
    seed_margins_of_difference,
)
from evaluation.results import with_interval


def candidate(name, seed=0, file="best.pt", run=True, tiles="same", **settings):
    config = replace(Config(name=name.partition(" ")[0], seed=seed), **settings)
    return SimpleNamespace(name=name, config=config, source=SimpleNamespace(name=file), run=run or None,
                           tiles_identity=tiles, label_images=None if run else {"a tile": "its file"})


def test_runs_that_differ_only_in_their_seed_belong_together():
    ce = {"loss": Loss(name="ce")}
    candidates = [candidate("a-seed2", 2), candidate("b-seed0", 0, **ce), candidate("a-seed1", 1, device="cpu"),
                  candidate("labels", run=False), candidate("b-seed7", 7, **ce), candidate("a-seed0", 0),
                  candidate("a-seed0 (last)", 0, file="last.pt")]
    found = experiments_of(candidates)
    assert [(e.name, e.members, e.seeds) for e in found] == [
        ("a", (5, 2, 0), (0, 1, 2)), ("b", (1, 4), (0, 7)), ("labels", (3,), ()), ("a-seed0 (last)", (6,), ())]


def test_label_images_are_seeds_of_one_experiment_if_their_names_say_so():
    labels = [candidate(name, run=False) for name in ("other_seed1", "other-seed0", "other2", "lone-seed3")]
    found = experiments_of([candidate("other-seed0", 0), candidate("other-seed1", 1), *labels])
    assert [(e.name, e.members, e.seeds) for e in found] == [
        ("other", (0, 1), (0, 1)), ("other", (3, 2), (0, 1)), ("other2", (4,), ()), ("lone-seed3", (5,), ())]


def test_two_runs_of_one_seed_are_not_two_seeds_and_other_names_are_kept():
    assert [e.members for e in experiments_of([candidate("a"), candidate("b")])] == [(0,), (1,)]
    (pair,) = experiments_of([candidate("cat", 1), candidate("dog", 2)])
    assert pair.name == "cat and 1 more"


def test_margins_are_students_over_seeds():
    values = np.array([[0.5, 0.1], [0.7, 0.1], [0.9, 0.4]])
    samples = [{"dice": np.stack([of_run, of_run + 1])} for of_run in values]
    low, high = stats.t.interval(0.95, 2, values[:, 0].mean(), stats.sem(values[:, 0]))
    margins = seed_margins(samples)["dice"]
    assert margins[0] == pytest.approx((high - low) / 2)
    assert mean_samples(samples)["dice"][1] == pytest.approx(values.mean(0) + 1)
    assert (seed_margins(samples[:1])["dice"] == 0).all()
    other = [{"dice": sample["dice"] + 0.25} for sample in samples]
    assert seed_margins_of_difference(samples, other, are_pairs=True, are_runs=True)["dice"] == pytest.approx([0, 0])
    apart = seed_margins_of_difference(samples, other, are_pairs=False, are_runs=True)["dice"]
    assert apart == pytest.approx(margins * 2**0.5)
    alone = seed_margins_of_difference(samples, other[:1], are_pairs=False, are_runs=True)["dice"]
    assert alone == pytest.approx(np.hypot(margins, margins * 3**0.5)), "one run varies like those of the other config"
    alone = seed_margins_of_difference(samples[:1], other, are_pairs=False, are_runs=True)["dice"]
    assert alone == pytest.approx(np.hypot(margins, margins * 3**0.5)), "also if it is the first one"
    labels = seed_margins_of_difference(samples, other[:1], are_pairs=False, are_runs=False)["dice"]
    assert labels == pytest.approx(margins), "label images have no seed"
    assert (seed_margins_of_difference(samples[:1], other[:1], False, True)["dice"] == 0).all()


@pytest.mark.parametrize(("slides", "seeds", "of_slides", "of_seeds"), [
    (30, 3, 0.1, 0.01), (30, 3, 0.02, 0.05), (30, 3, 0.1, 0.03), (20, 8, 0.05, 0.05), (40, 2, 0.1, 0.02)])
def test_the_interval_contains_the_expected_score_as_often_as_it_says(slides, seeds, of_slides, of_seeds):
    """The expected score is that over all slides and seeds. Each slide is as hard for each seed, with its own noise."""
    random, hits, trials = np.random.default_rng(0), 0, 300
    widths = []
    weights = bootstrap.resampled_weights([f"s{i}" for i in range(slides)])[:501]
    for _ in range(trials):
        scores = (0.8 + of_slides * random.normal(size=slides) + of_seeds * random.normal(size=(seeds, 1))
                  + 0.02 * random.normal(size=(seeds, slides)))
        samples = [{"dice": weights @ of_run / slides} for of_run in scores]
        interval = with_interval(mean_samples(samples)["dice"], slides, seed_margins(samples)["dice"])
        hits += interval["low"] <= 0.8 <= interval["high"]
        widths.append(interval["high"] - interval["low"])
    assert hits / trials >= 0.92
    parts = 2 * stats.t.ppf(0.975, slides - 1) * of_slides / slides**0.5, (
        2 * stats.t.ppf(0.975, seeds - 1) * of_seeds / seeds**0.5)
    assert np.mean(widths) < 1.15 * np.hypot(*parts), "and it is no wider than it needs to be"


@pytest.fixture
def seeds(trained, tmp_path):
    """Runs of two configs with seeds 0 and 1: `tiny`, and one with another loss; the networks answer constants."""
    def run(name, seed, loss, k):
        folder = copy_run(trained, name, always_predict(k))
        for path in (folder / "checkpoints").iterdir():
            import torch
            contents = torch.load(path, weights_only=True)
            contents["config"]["seed"], contents["config"]["loss"]["name"] = seed, loss
            torch.save(contents, path)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("seed: 0", f"seed: {seed}").replace("dice_ce", loss))
        return folder
    return [run("a-seed0", 0, "dice_ce", 1), run("a-seed1", 1, "dice_ce", 2), run("b-seed0", 0, "ce", 1),
            run("b-seed1", 1, "ce", 2)]


def test_an_evaluation_of_several_seeds(seeds, tmp_path, capsys):
    run_evaluate(*seeds, "--split", "all", "--out", "out")
    printed = capsys.readouterr().out
    contents = read_scores(tmp_path / "out")
    a, b = contents["experiments"]
    assert (a["name"], a["runs"], a["seeds"]) == ("a", ["a-seed0", "a-seed1"], [0, 1])
    assert (b["loss"], b["levels"], len(contents["entries"])) == ("ce", 2, 4)
    dice = {entry["name"]: entry["scores"]["dice"]["mean"]["value"] for entry in contents["entries"]}
    for experiment in (a, b):
        found = experiment["scores"]["dice"]["mean"]
        of_runs = [dice[name] for name in experiment["runs"]]
        assert found["value"] == pytest.approx(np.mean(of_runs), abs=2e-6)
        margin = stats.t.ppf(0.975, 1) * abs(of_runs[0] - of_runs[1]) / 2
        assert found["high"] - found["value"] >= margin - 2e-6
    difference = b["difference_to_first"]["dice"]["mean"]
    assert difference == {"value": 0, "low": 0, "high": 0}, "the runs of each seed answer the same"
    run_evaluate(seeds[1], seeds[0], seeds[2], seeds[3], "--split", "all", "--out", "shuffled")
    assert read_scores(tmp_path / "shuffled")["experiments"][1]["difference_to_first"]["dice"]["mean"] == difference
    run_evaluate(*seeds[:3], "--split", "all", "--out", "single")
    single = read_scores(tmp_path / "single")["experiments"][1]["difference_to_first"]["dice"]["mean"]
    margin = stats.t.ppf(0.975, 1) * abs(dice["a-seed0"] - dice["a-seed1"]) / 2
    assert single["high"] - single["value"] >= np.hypot(margin, margin * 2**0.5) - 2e-6
    lines = printed.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [["run", "seeds"], ["a", "2"], ["b", "2"], ["all", "tumour"]]
    assert "hold the chance of slides and of seeds" in printed and "another seed" not in printed
    rows = read_rows(tmp_path / "out/table.csv")
    assert [(row["run"], row["seeds"]) for row in rows] == [
        ("a", "2"), ("b", "2"), ("a-seed0", ""), ("a-seed1", ""), ("b-seed0", ""), ("b-seed1", "")]
    markdown, page = ((tmp_path / "out" / name).read_text() for name in ("table.md", "report.html"))
    assert markdown.index("Means over seeds") < markdown.index("Each run")
    assert "a (mean over 2 seeds)" in page


def test_one_run_beside_seeds_is_a_row_of_one(seeds, tmp_path, capsys):
    run_evaluate(seeds[2], *seeds[:2], "--split", "all", "--out", "out")
    single, both = read_scores(tmp_path / "out")["experiments"]
    assert (single["name"], single["seeds"], both["seeds"]) == ("b-seed0", [], [0, 1])
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[:2] == ["b-seed0", "1"] and "of one run describe these weights" in printed


def test_runs_named_like_seeds_that_are_not_of_one_config_are_explained(seeds, capsys):
    runs = [candidate("a-seed0"), candidate("a-seed1", 1, loss=Loss(name="ce")), candidate("a-seed2", 0),
            candidate("a-seed3", 3, filter=Filter(max_shift=1)), candidate("a-seed4", 4, tiles="others"),
            candidate("b")]
    assert explain_separate_seeds(runs) == [
        "a-seed0 and a-seed1 are not seeds of one config: loss.name is dice_ce and ce",
        "a-seed0 and a-seed2 are not seeds of one config: both have seed=0",
        "a-seed0 and a-seed4 are not seeds of one config: tiles.csv or the checkpoints are others"]
    (seeds[0].parent / "a-seed1").rename(seeds[0].parent / "b-seed5")
    run_evaluate(seeds[0], seeds[0].parent / "b-seed5", seeds[2], "--split", "all", "--out", "out")
    assert "b-seed5 and b-seed0 are not seeds of one config: loss.name is dice_ce and ce" in capsys.readouterr().err


def test_intervals_stay_in_the_range_of_the_score():
    samples, margin = np.array([0.9, 0.8, 0.85, 0.95] * 500), 3.0
    assert with_interval(samples, 30, margin) == {"value": 0.9, "low": 0.0, "high": 1.0}
    assert with_interval(samples, 30, margin, (-1.0, 1.0))["low"] == -1
    assert with_interval(samples, 30, margin, (0.0, np.inf))["high"] == pytest.approx(3.9, abs=0.01)
