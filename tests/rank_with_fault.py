"""Run a script of this repository as a rank that goes wrong: python rank_with_fault.py FAULT RANK train.py --config ...

The fault comes in epoch 2, in the rank RANK. A lost rank is found after seconds instead of half a minute.
"""

import importlib
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from common import console, files, ranks
from training import checkpoints, epochs
from training.learner import Learner


def send(number):
    """Send this process a signal as soon as the others know what this rank does."""
    sent = ranks._pulse.state.beats
    while ranks._pulse.state.beats < sent + 2:
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def kill(*_arguments, **_options):
    send(signal.SIGKILL)


def kill_once(*_arguments, **_options):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill()
    return run_pass(*_arguments, **_options)


def hang(*_arguments, **_options):
    time.sleep(1000)


def wait_for_the_others(*_arguments, **_options):
    """Train no further, and end as soon as the others are gone."""
    Path("reached").touch()
    while True:
        ranks.check()
        time.sleep(0.01)


def stop(*_arguments, **_options):
    send(signal.SIGSTOP)


def no_memory(*_arguments, **_options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")


def write_half(*arguments, **options):
    """Write a part of the checkpoint, and die."""
    replacing = files.replacing

    @contextmanager
    def half(path):
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            kill()
            yield temporary

    checkpoints.replacing = half
    checkpoints_save(*arguments, **options)


checkpoints_save, run_pass = checkpoints.save_checkpoint, epochs.run_pass
FAULTS = {"killed": (epochs, "run_pass", kill), "killed once": (epochs, "run_pass", kill_once),
          "hangs": (epochs, "run_pass", hang),
          "waits": (epochs, "run_pass", wait_for_the_others),
          "stopped": (epochs, "run_pass", stop), "no memory": (epochs, "run_pass", no_memory),
          "killed in the exchange": (Learner, "copy_from_rank", kill),
          "killed while it writes": (checkpoints, "save_checkpoint", write_half), "none": (None, "", None)}


def plant(place, name, fault):
    """Let a function of the program go wrong when epoch 2 calls it."""
    run_epoch, original = epochs.run_epoch, getattr(place, name)
    epoch = 0

    def watched(learner, data, config, number):
        nonlocal epoch
        epoch = number
        return run_epoch(learner, data, config, number)

    def planted(*arguments, **options):
        return (fault if epoch == 2 else original)(*arguments, **options)

    importlib.import_module("train").run_epoch = watched
    setattr(place, name, planted)


if __name__ == "__main__":
    fault, rank, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    ranks.SECONDS_OF_SILENCE, ranks.SECONDS_FOR_A_STEP = 5.0, 8.0
    place, name, function = FAULTS[fault]
    if place and os.environ["RANK"] == rank:
        plant(place, name, function)
    console.run(importlib.import_module(script.removesuffix(".py")).main)
