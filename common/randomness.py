"""Random generators that depend only on seed, epoch, fold and purpose, so that resuming a run changes nothing."""

import hashlib

import numpy as np


def generator(seed: int, epoch: int, fold: int, purpose: str) -> np.random.Generator:
    """Return a new NumPy generator that depends only on these four keys."""
    return np.random.default_rng(_entropy(seed, epoch, fold, purpose))


def torch_seed(seed: int, epoch: int, fold: int, purpose: str) -> int:
    """Return a seed for `torch.manual_seed`, which draws dropout and initial weights."""
    return int(np.random.SeedSequence(_entropy(seed, epoch, fold, purpose)).generate_state(1, np.uint64)[0] >> 1)


def _entropy(seed: int, epoch: int, fold: int, purpose: str) -> list[int]:
    return [seed, epoch, fold, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")]
