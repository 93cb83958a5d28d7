"""Ask trained models about tiles that they do not know, because a model that knows a mask would repeat it.

A model knows a tile if it learned from the same image, or from a tile of the same slide or patient (group).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import Config
from common.console import UserError
from common.pictures import read_image
from dataset import Tile, digest_of
from evaluation.candidates import Candidate, candidate_of_run
from training.run_folder import read_trained_on

CROSS_FIT = "python -m tools.cross_fit --config CONFIG trains models of which each tile finds one"


@dataclass(frozen=True)
class Known:
    """What a model has learned from."""

    digests: frozenset[str]  # of images
    groups: frozenset[str]  # of the data folder asked about


@dataclass(frozen=True)
class UnseenTiles:
    """Models that are asked about tiles of one data folder, each tile of the first model that does not know it."""

    models: list[tuple[Candidate, Known]]
    root: Path

    @classmethod
    def of_runs(cls, folders: Sequence[Path], config: Config, tiles: Sequence[Tile]) -> "UnseenTiles":
        """Load the models of run folders; raise a `UserError` if they have other classes than the config.

        `tiles` are those of the data folder as the filter listed them last, if it did. A model knows the groups of
        those whose images it has learned from, and those in its own list if it learned from this folder.
        """
        models = []
        for folder in folders:
            candidate = candidate_of_run(folder, "best", [f"device={config.device}"], flips=False)
            if candidate.config.data.classes != config.data.classes:
                raise UserError(f"{folder} predicts {', '.join(candidate.config.data.classes)}, but data.classes is "
                                f"{', '.join(config.data.classes)}; use a model of the same classes")
            rows = read_trained_on(candidate.run)
            if not all(row["digest"] for row in rows):
                raise UserError(f"{folder}: its list of training tiles has no digests, so nobody can tell whether it "
                                "knows a tile; run data_filter.py and train it again")
            digests = frozenset(row["digest"] for row in rows)
            groups = {tile.group for tile in tiles if tile.digest in digests}
            if Path(candidate.config.data.root).resolve() == Path(config.data.root).resolve():
                groups |= {row["group"] for row in rows}
            groups = frozenset(groups - {""})
            models.append((candidate, Known(digests, groups)))
        return cls(models, Path(config.data.root))

    def ask(self, tile: Tile) -> tuple[str, np.ndarray] | None:
        """Return the name of a model and its probabilities (H, W, K) uint8, 255 for 1; None if the image is unreadable.

        Raises a `UserError` if every model knows the tile.
        """
        try:
            image = np.array(read_image(self.root / tile.image))
        except UserError:
            return None
        candidate = self._unknowing(tile, digest_of(image))
        logits = candidate.predictor.logits(torch.from_numpy(image)[None].to(candidate.device))
        probs = torch.softmax(logits[0].float(), dim=0).mul(255).round().to(torch.uint8)  # (K, H, W)
        return candidate.name, np.ascontiguousarray(probs.movedim(0, -1).cpu().numpy())

    def _unknowing(self, tile: Tile, digest: str) -> Candidate:
        for candidate, known in self.models:
            if tile.group not in known.groups and digest not in known.digests:
                return candidate
        names = ", ".join(candidate.name for candidate, _ in self.models)
        whom = f"its slide or patient '{tile.group}'" if tile.group else "it"
        raise UserError(f"tile '{tile.key}' cannot be asked of {names}: every model has learned from {whom}, and would "
                        f"repeat the given mask. {CROSS_FIT}")
