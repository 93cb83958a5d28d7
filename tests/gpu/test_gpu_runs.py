"""Whole runs and evaluations on the GPU: equal bits in two runs, the CPU's results, bfloat16, too little memory."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from gpu_helpers import contents, largest_difference, learner_of, run_pass
from helpers import REPOSITORY, arrays, script
from PIL import Image

import train
from common.config_files import apply_overrides, to_yaml
from evaluate import evaluate
from evaluation.candidates import candidate_of_run, predictor_of
from evaluation.test_set import open_test_set
from training import run_folder, training_set

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


def test_runs_of_one_seed_and_resumed_runs_are_equal_in_every_bit(device, workplace, configured, record):
    """With dropout, across processes; so are two evaluations."""
    config = configured(device, "model.dropout=0.5")
    (workplace / "whole.yaml").write_text(to_yaml(config), encoding="utf-8")
    train.start(config)
    train.start(apply_overrides(config, ["name=parts", "train.epochs=1"]))
    for arguments in (("--config", "whole.yaml", "name=again"), ("--resume", "runs/parts", "train.epochs=3")):
        result = script("train.py", *arguments, cwd=workplace)
        assert result.returncode == 0, result.stderr
    for checkpoint in ("last", "best"):
        whole, again, parts = (contents(workplace / f"runs/{name}/checkpoints/{checkpoint}.pt")
                               for name in ("tiny", "again", "parts"))
        record(f"{checkpoint}.pt, two runs of one seed: largest difference", largest_difference(whole, again),
               at_most=0)
        record(f"{checkpoint}.pt, whole and resumed run: largest difference", largest_difference(whole, parts),
               at_most=0)
    assert len(contents(workplace / "runs/tiny/checkpoints/last.pt")["history"]) == 3

    scores, labels = [], []
    for out in ("first", "second"):
        result = script("evaluate.py", "runs/tiny", "--out", out, cwd=workplace)
        assert result.returncode == 0, result.stderr
        scores.append((workplace / out / "scores.json").read_bytes())
        labels.append([path.read_bytes() for path in sorted((workplace / out / "predictions").rglob("*.png"))])
    assert json.loads(scores[0])["entries"][0]["scores"]["dice"]["mean"]["value"] > 0
    assert scores[0] == scores[1] and labels[0] == labels[1] and len(labels[0]) == 20


def test_another_seed_gives_other_bits(device, configured):
    """So the equality above is not trivial."""
    states = []
    for seed in (0, 1):
        config = configured(device, f"seed={seed}")
        learner, data = learner_of(config)
        run_pass(learner, data, config, 1)
        states.append(learner.take_snapshot())
    assert largest_difference(*states) > 1e-3


def test_a_run_equals_that_of_the_cpu_within_bounds(device, workplace, configured, record):
    for name, place in (("here", device), ("cpu", CPU)):
        train.start(configured(place, "model.dropout=0", "optim.lr=0.0005", f"name={name}"))
    ours, exact = (run_folder.read_metrics(workplace / "runs" / name) for name in ("here", "cpu"))
    for loss in ("train_loss", "val_loss"):
        record(f"first epoch, {loss}: relative distance to the CPU's", abs(ours[0][loss] / exact[0][loss] - 1),
               at_most=1e-3)
    record("3 epochs, val_loss: largest distance to the CPU's",
           max(abs(a["val_loss"] - b["val_loss"]) for a, b in zip(ours, exact, strict=True)))
    equal = 0
    for a, b in zip(ours, exact, strict=True):
        if abs(b["val_loss_0"] / b["val_loss_1"] - 1) < 0.01:  # rounding may choose another survivor from here on
            break
        assert a["survivor"] == b["survivor"], f"epoch {a['epoch']}"
        equal += 1
    record("epochs with the CPU's survivor, of 3", equal, at_least=1)


def test_a_checkpoint_is_evaluated_as_on_the_cpu(device, workplace, configured, record):
    train.start(configured(device, "train.epochs=2", "train.images_per_epoch=240"))
    predictions, dice = [], []
    for place in (device, CPU):
        candidate = candidate_of_run(workplace / "runs/tiny", "best", [f"device={place}"], False, "float32")
        assert candidate.device.type == place.type
        out = workplace / f"evaluation-{len(predictions)}"
        found = evaluate([candidate], open_test_set([candidate], "test"), out)
        dice.append(found["entries"][0]["scores"]["dice"]["mean"]["value"])
        predictions.append(np.stack([np.asarray(Image.open(path)) for path in
                                     sorted((out / "predictions/tiny").iterdir())]))
    record("one checkpoint: Dice on the CPU", dice[1], at_least=0.7)
    record("one checkpoint: pixels of the same class as on the CPU", float((predictions[0] == predictions[1]).mean()),
           at_least=0.99)
    record("one checkpoint: distance to the CPU's Dice", abs(dice[0] - dice[1]), at_most=0.005)


def test_bfloat16_predicts_what_float32_predicts(device, configured, record):
    """After training, 99.9 % of the pixels have the same class, as on the CPU. If fewer, the test counts as xfailed."""
    config = configured(device)
    learner, data = learner_of(config)
    run_pass(learner, data, config, 60)
    model = learner.model.eval().requires_grad_(False)
    store = torch.from_numpy(arrays(training_set.prepare_data(configured(CPU)).store)).to(device)
    exact, fast = (predictor_of(model, data.statistics, False, dtype, many=False).logits(store[..., :3]).argmax(1)
                   for dtype in (torch.float32, torch.bfloat16))
    record("60 steps: accuracy in float32", (exact == store[..., 3]).float().mean().item(), at_least=0.9)
    same = (exact == fast).float().mean().item()
    record("bfloat16: pixels of the same class as in float32", same, expected="at least 0.999")
    assert same >= 0.99
    if same < 0.999:
        pytest.xfail(f"bfloat16 and float32 predict the same class for {same:.3%} of the pixels; on the CPU for 99.9 %")


# Run in a new process: allow it only a little more memory than it has already.
LITTLE_MEMORY = {
    "cuda": "torch.cuda.set_per_process_memory_fraction(2**29 / torch.cuda.get_device_properties(0).total_memory)",
    "cpu": """import re, resource
from pathlib import Path
used = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)""",
}


def test_too_little_memory_ends_with_one_line_that_names_the_batch_size_and_leaves_no_run(device, workplace,
                                                                                          configured):
    config = configured(device, "model.widths=[256,512]", "train.batch_size=64", "train.images_per_epoch=128")
    (workplace / "wide.yaml").write_text(to_yaml(config), encoding="utf-8")
    program = (f"import torch\nimport train\nfrom common.console import run\n{LITTLE_MEMORY[device.type]}\n"
               "run(train.main)")
    result = subprocess.run([sys.executable, "-c", program, "--config", "wide.yaml"], cwd=workplace, text=True,
                            capture_output=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: the memory is too small ("), result.stderr
    assert "train.batch_size" in errors[0]
    assert not (workplace / "runs").exists() or not list((workplace / "runs").iterdir())
