"""train.compile, on a GPU with CUDA graphs: its results, whether they repeat bit for bit, and its cost."""

import gc
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_helpers import (
    contents,
    crops_for,
    largest_difference,
    learner_of,
    loss_of,
    random_crops,
    run_pass,
    strides_that_matter,
    without_gradient,
)
from helpers import as_store, script
from torch._dynamo.utils import counters

from common.config import Config
from common.config_files import apply_overrides, to_yaml
from common.console import Progress
from common.statistics import Statistics
from training import epochs
from training.batches import batches_on, store_on
from training.learner import build_learner

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch):
    """Forget the compiled code of earlier tests: from the eighth network on, torch would not compile."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # thousands of empty lines
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    gc.collect()


def assert_compiled(device: torch.device, record) -> None:
    """Assert that the steps before this ran as compiled code, on a GPU with CUDA graphs."""
    assert counters["stats"]["unique_graphs"] > 0
    if device.type != "cuda":
        return
    from torch._inductor.cudagraph_trees import get_manager

    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    graphs = sum(map(len, manager.roots.values())) if manager else 0
    record("CUDA graphs that a pass begins with", graphs, at_least=1)


def test_30_compiled_steps_equal_those_without_compilation(device, configured, record):
    """Biases that the next batch norm subtracts are left out: Adam makes steps from their rounding."""
    results, start = [], None
    for compile in ("false", "true"):
        config = configured(device, "model.dropout=0", "optim.lr=0.001", f"train.compile={compile}")
        learner, data = learner_of(config)
        start = start or learner.take_snapshot()
        trained = run_pass(learner, data, config, 30), learner.take_snapshot()
        learner.restore_snapshot(results[0][1] if results else trained[1])  # those biases would shift the validation
        results.append((*trained, run_pass(learner, data, config, 5, training=False)))
    (exact_loss, (exact, exact_adam), exact_validation), (loss, (ours, adam), validation) = results
    record("compiled, 30 steps: relative distance of the mean loss", abs(loss / exact_loss - 1), at_most=1e-3)
    record("compiled, validation of one network: relative distance of the loss", abs(validation / exact_validation - 1),
           at_most=1e-4)
    zeros = without_gradient(learner.model)
    weights = [name for name, _ in learner.model.named_parameters() if name not in zeros]
    apart, moved = (torch.sqrt(sum((state[name] - other[name]).square().sum() for name in weights)).item()
                    for state, other in ((ours, exact), (exact, start[0])))
    record("compiled, 30 steps: distance of the weights, in units of their path", apart / moved, at_most=0.2)
    assert all(torch.equal(ours[name], exact[name]) for name in exact if name.endswith("num_batches_tracked"))
    assert all(torch.equal(adam["state"][i]["step"], exact_adam["state"][i]["step"]) for i in adam["state"])
    assert_compiled(device, record)


def test_compiled_steps_with_dropout_repeat_every_bit_and_have_the_strides_that_adam_needs(device, configured, record):
    """The first pass compiles and records, the second one replays."""
    config = configured(device, "model.dropout=0.5", "train.compile=true")
    learner, data = learner_of(config)
    start, results = learner.take_snapshot(), []
    for seed in (1, 1, 2):
        learner.restore_snapshot(start)
        torch.manual_seed(seed)
        losses = [run_pass(learner, data, config, 12), run_pass(learner, data, config, 3, training=False)]
        results.append((losses, learner.take_snapshot()))
    first, again, other = results
    record("compiled with dropout, two passes of one seed: largest difference", largest_difference(first, again),
           at_most=0)
    record("compiled with dropout, another seed: largest difference", largest_difference(first, other), at_least=1e-3)

    unlike = set()
    for batch in batches_on(device, crops_for(data, config, 3), data.store, config.train.batch_size):
        loss_of(learner, data, batch).backward()
        learner.optimizer.step()
        for name, weight in learner.model.named_parameters():
            state = learner.optimizer.state[weight]
            four = (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])
            assert len({tuple(strides_that_matter(tensor)) for tensor in four}) == 1, name
            if len({tensor.stride() for tensor in four}) > 1:
                unlike.add(name)
        learner.optimizer.zero_grad()
    record("compiled step: parameters whose strides differ where they mean nothing",
           ", ".join(sorted(unlike)) or "none")
    assert_compiled(device, record)


def compiled_run(workplace: Path, name: str) -> None:
    """Train three epochs in one process (`whole`) or in two (`parts`), each with an empty cache of compiled code."""
    steps = {"whole": [("--config", "compiled.yaml", "name=whole")],
             "parts": [("--config", "compiled.yaml", "name=parts", "train.epochs=1"),
                       ("--resume", "runs/parts", "train.epochs=3")]}
    for i, arguments in enumerate(steps[name]):
        cache = workplace / f"cache-{name}-{i}"
        result = script("train.py", *arguments, cwd=workplace, TORCHINDUCTOR_CACHE_DIR=str(cache),
                        TRITON_CACHE_DIR=str(cache / "triton"))
        assert result.returncode == 0, result.stderr
        assert any(path.is_file() for path in cache.rglob("*")), "nothing was compiled"


def test_a_compiled_run_that_is_resumed_equals_a_whole_one(device, workplace, configured, record):
    """Both run at the same time, which disturbs the times that the compiler measures for its kernels."""
    (workplace / "compiled.yaml").write_text(to_yaml(configured(device, "train.compile=true", "model.dropout=0.5")),
                                             encoding="utf-8")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiled_run, [workplace] * 2, ["whole", "parts"]))
    whole, parts = (contents(workplace / f"runs/{name}/checkpoints/last.pt") for name in ("whole", "parts"))
    assert len(whole["history"]) == len(parts["history"]) == 3
    record("compiled, whole and resumed run: largest difference", largest_difference(whole, parts), at_most=0)


REPORT = ["train.precision=bf16"]  # and the defaults: widths 32 to 512, dropout, 16 crops of 256 pixels
SMALL = [*REPORT, "model.widths=[8,16]", "train.batch_size=2", "data.crop=32"]  # for CRC_GPU_TESTS_ON=cpu


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_step_of_the_reports_setting_needs_less_than_the_6_gb_of_its_gpu(device, mode, record):
    """With both snapshots of an epoch. The time of a step is measured and has no bound."""
    is_cuda = device.type == "cuda"
    config = apply_overrides(Config(), [*(REPORT if is_cuda else SMALL), f"device={device}",
                                        f"train.compile={'true' if mode == 'compiled' else 'false'}"])
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    side, batch_size, steps = config.data.crop, config.train.batch_size, 60 if is_cuda else 3
    tiles = np.random.default_rng(0).integers(0, 256, (32, side + 20, side + 20, 4), np.uint8)
    tiles[..., 3] %= 3
    data = SimpleNamespace(store=store_on(device, as_store(tiles)),
                           statistics=Statistics([0.7, 0.5, 0.7], [0.2, 0.2, 0.2], [0.3, 0.4, 0.3]))
    learner = build_learner(config, data.statistics)
    snapshots = [learner.take_snapshot(), learner.take_snapshot()]

    def seconds(batches: int, training: bool) -> float:
        crops = random_crops(np.arange(32), tiles.shape[1:3], side, batches * batch_size)
        if is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with Progress("", len(crops)) as progress:
            loss = epochs.run_pass(learner, data, crops, batch_size, training, progress)
        assert np.isfinite(loss)
        return time.perf_counter() - started

    first = seconds(1, True)
    for training in (True, False):
        seconds(4, training)
    what = f"report's setting, bf16, {mode}"
    record(f"{what}: first step", 1000 * first, unit="ms")
    record(f"{what}: a training step of {batch_size} x {side}²", 1000 * seconds(steps, True) / steps, unit="ms")
    record(f"{what}: a validation step", 1000 * seconds(steps, False) / steps, unit="ms")
    learner.take_snapshot(into=snapshots[0])
    learner.restore_snapshot(snapshots[1])
    if is_cuda:
        record(f"{what}: memory reserved from the GPU", torch.cuda.memory_reserved() / 1e9, unit="GB")
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        record(f"{what}: peak memory of tensors", peak, at_most=6, unit="GB")
    if mode == "compiled":
        assert_compiled(device, record)
