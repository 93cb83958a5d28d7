"""train.compile, on CUDA by CUDA graphs: what it computes, whether it repeats it, and what it costs."""

import gc
import logging
import threading
import time
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
    pass_over,
    random_crops,
    strides_that_matter,
    without_gradient,
)
from helpers import script
from torch._dynamo.utils import counters

from common.config import Config
from common.config_files import apply_overrides, to_yaml
from common.console import Progress
from dataset import Statistics
from training import epochs
from training.batches import batches_on, copied_to
from training.learner import build_learner

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch):
    """Code that was compiled for one test is not kept for the next: from the eighth network on none is compiled."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # thousands of empty lines
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    gc.collect()


def assert_compiled(device: torch.device, record) -> None:
    """That the steps before this were not computed as they are without compilation."""
    assert counters["stats"]["unique_graphs"] > 0
    if device.type != "cuda":
        return
    from torch._inductor.cudagraph_trees import get_manager

    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    graphs = sum(map(len, manager.roots.values())) if manager else 0
    record("CUDA graphs that a pass begins with", graphs, at_least=1)


def test_30_compiled_steps_equal_those_without_compilation(device, configured, record):
    """Weights that the next batch norm makes meaningless are left out: Adam makes steps of their rounding."""
    results, start = [], None
    for compile in ("false", "true"):
        config = configured(device, "model.dropout=0", "optim.lr=0.001", f"train.compile={compile}")
        learner, data = learner_of(config)
        start = start or learner.snapshot()
        trained = pass_over(learner, data, config, 30), learner.snapshot()
        learner.restore(results[0][1] if results else trained[1])  # those biases shift what a validation sees
        results.append((*trained, pass_over(learner, data, config, 5, training=False)))
    (exact_loss, (exact, exact_adam), exact_validation), (loss, (ours, adam), validation) = results
    record("compiled, 30 steps: distance of the mean loss, of it", abs(loss / exact_loss - 1), at_most=1e-3)
    record("compiled, validation of one network: distance of the loss, of it", abs(validation / exact_validation - 1),
           at_most=1e-4)
    zeros = without_gradient(learner.model)
    weights = [name for name, _ in learner.model.named_parameters() if name not in zeros]
    apart, moved = (torch.sqrt(sum((state[name] - other[name]).square().sum() for name in weights)).item()
                    for state, other in ((ours, exact), (exact, start[0])))
    record("compiled, 30 steps: distance of the weights, of the way they went", apart / moved, at_most=0.2)
    assert all(torch.equal(ours[name], exact[name]) for name in exact if name.endswith("num_batches_tracked"))
    assert all(torch.equal(adam["state"][i]["step"], exact_adam["state"][i]["step"]) for i in adam["state"])
    assert_compiled(device, record)


def test_compiled_steps_with_dropout_repeat_every_bit_and_lie_as_adam_needs_them(device, configured, record):
    """The first time they are compiled and recorded, the second time replayed."""
    config = configured(device, "model.dropout=0.5", "train.compile=true")
    learner, data = learner_of(config)
    start, results = learner.snapshot(), []
    for seed in (1, 1, 2):
        learner.restore(start)
        torch.manual_seed(seed)
        losses = [pass_over(learner, data, config, 12), pass_over(learner, data, config, 3, training=False)]
        results.append((losses, learner.snapshot()))
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


def compiled_run(workplace: Path, name: str, **environment: str) -> None:
    """A run `whole` of three epochs, or one in two `parts`: each process compiles all by itself."""
    steps = {"whole": [("--config", "compiled.yaml", "name=whole")],
             "parts": [("--config", "compiled.yaml", "name=parts", "train.epochs=1"),
                       ("--resume", "runs/parts", "train.epochs=3")]}
    for i, arguments in enumerate(steps[name]):
        cache = workplace / f"cache-{name}-{i}"
        result = script("train.py", *arguments, cwd=workplace, TORCHINDUCTOR_CACHE_DIR=str(cache),
                        TRITON_CACHE_DIR=str(cache / "triton"), **environment)
        assert result.returncode == 0, result.stderr
        assert any(path.is_file() for path in cache.rglob("*")), "nothing was compiled"


def whole_and_resumed(workplace: Path, config: Config, **environment: str) -> tuple[dict, dict]:
    """Both at a time, which also makes the times differ by which a compiler may choose its kernels."""
    workplace.mkdir()
    (workplace / "compiled.yaml").write_text(to_yaml(config), encoding="utf-8")
    failures = []

    def run(name: str) -> None:
        try:
            compiled_run(workplace, name, **environment)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("whole", "parts")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    whole, parts = (contents(workplace / f"runs/{name}/checkpoints/last.pt") for name in ("whole", "parts"))
    assert len(whole["history"]) == len(parts["history"]) == 3
    for ours, theirs in zip(whole["history"], parts["history"], strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.1)
    return whole, parts


def test_a_compiled_run_that_is_resumed_equals_a_whole_one(device, tmp_path, configured, record):
    """Bit for bit, with nothing compiled beforehand. If not, the difference is reported, and whether torch's
    deterministic compilation would do away with it.
    """
    config = configured(device, "train.compile=true", "model.dropout=0.5")
    difference = largest_difference(*whole_and_resumed(tmp_path / "as-shipped", config))
    record("compiled, whole and resumed run: largest difference", difference, expected="0")
    if difference:
        settled = largest_difference(*whole_and_resumed(tmp_path / "deterministic", config,
                                                        TORCHINDUCTOR_DETERMINISTIC="1"))
        record("the same with TORCHINDUCTOR_DETERMINISTIC=1", settled, expected="0")
        pytest.xfail(f"a compiled run that is resumed is not the whole one bit for bit: weights, Adam state or losses "
                     f"differ by up to {difference:.3g}, with TORCHINDUCTOR_DETERMINISTIC=1 by up to {settled:.3g}")


REPORT = ["train.precision=bf16"]  # and the defaults: widths 32 to 512, dropout, batches of 16 crops of 256 pixels
SMALL = [*REPORT, "model.widths=[8,16]", "train.batch_size=2", "data.crop=32"]  # where a CPU stands for the GPU


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_step_of_the_reports_setting_needs_less_than_the_6_gb_that_it_had(device, how, record):
    """With both snapshots of an epoch. The time of a step is measured, and bounded by nothing."""
    is_cuda = device.type == "cuda"
    config = apply_overrides(Config(), [*(REPORT if is_cuda else SMALL), f"device={device}",
                                        f"train.compile={'true' if how == 'compiled' else 'false'}"])
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    side, batch_size, steps = config.data.crop, config.train.batch_size, 60 if is_cuda else 3
    store = np.random.default_rng(0).integers(0, 256, (32, side + 20, side + 20, 4), np.uint8)
    store[..., 3] %= 3
    data = SimpleNamespace(store=copied_to(device, store),
                           statistics=Statistics([0.7, 0.5, 0.7], [0.2, 0.2, 0.2], [0.3, 0.4, 0.3]))
    learner = build_learner(config, data.statistics)
    snapshots = [learner.snapshot(), learner.snapshot()]

    def seconds(batches: int, training: bool) -> float:
        crops = random_crops(np.arange(32), store.shape[1:3], side, batches * batch_size)
        if is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with Progress("", len(crops)) as progress:
            loss = epochs.pass_over(learner, data, crops, batch_size, training, progress)
        assert np.isfinite(loss)
        return time.perf_counter() - started

    first = seconds(1, True)
    for training in (True, False):
        seconds(4, training)
    what = f"report's setting, bf16, {how}"
    record(f"{what}: first step", 1000 * first, unit="ms")
    record(f"{what}: a training step of {batch_size} x {side}²", 1000 * seconds(steps, True) / steps, unit="ms")
    record(f"{what}: a validation step", 1000 * seconds(steps, False) / steps, unit="ms")
    learner.snapshot(into=snapshots[0])
    learner.restore(snapshots[1])
    if is_cuda:
        record(f"{what}: memory reserved from the GPU", torch.cuda.memory_reserved() / 1e9, unit="GB")
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        record(f"{what}: peak memory of tensors", peak, at_most=6, unit="GB")
    if how == "compiled":
        assert_compiled(device, record)
