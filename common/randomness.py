"""All randomness is a function of seed, epoch, fold and purpose: every draw has a generator of its own.

So a resumed run equals an uninterrupted one, and the number of processes changes nothing.
"""

import hashlib

import numpy as np


def generator(seed: int, epoch: int, fold: int, purpose: str) -> np.random.Generator:
    """A generator that depends on its keys alone, so that order, workers and restarts change nothing."""
    return np.random.default_rng(_entropy(seed, epoch, fold, purpose))


def torch_seed(seed: int, epoch: int, fold: int, purpose: str) -> int:
    """The same for `torch.manual_seed`: dropout and initial weights."""
    return int(np.random.SeedSequence(_entropy(seed, epoch, fold, purpose)).generate_state(1, np.uint64)[0] >> 1)


def _entropy(seed: int, epoch: int, fold: int, purpose: str) -> list[int]:
    return [seed, epoch, fold, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")]
