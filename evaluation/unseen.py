"""Ask trained models about tiles that they do not know, because a model that knows a mask would repeat it.

A model knows a tile if it learned from the same image, or from a tile of the same slide or patient (group).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.config import Config
from common.console import Progress, UserError
from common.pictures import read_image
from common.workers import worker_map, workers_for
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
    def of_runs(cls, folders: Sequence[Path], config: Config, tiles: Sequence[Tile],
                before: Sequence[Tile] = ()) -> "UnseenTiles":
        """Load the models of run folders; raise a `UserError` if they have other classes than the config.

        `tiles` are those of the data folder, and `before` those that the filter listed last, whose digests are not
        computed again. A model knows the groups of the tiles that it has learned from, and if there are any in this
        folder, all groups in its own list, of which some tiles may be gone.
        """
        loaded = []
        for folder in folders:
            candidate = candidate_of_run(folder, "best", [f"device={config.device}"], flips=False)
            if candidate.config.data.classes != config.data.classes:
                raise UserError(f"{folder} predicts {', '.join(candidate.config.data.classes)}, but data.classes is "
                                f"{', '.join(config.data.classes)}; use a model of the same classes")
            rows = read_trained_on(candidate.run)
            if not all(row["digest"] for row in rows):
                raise UserError(f"{folder}: its list of training tiles has no digests, so nobody can tell whether it "
                                "knows a tile; run data_filter.py and train it again")
            loaded.append((candidate, rows))
        root, digests = Path(config.data.root), digests_of(tiles, before, Path(config.data.root))
        models = []
        for candidate, rows in loaded:
            learned = frozenset(row["digest"] for row in rows)
            is_its_folder = Path(candidate.config.data.root).resolve() == root.resolve()
            images = {row["image"] for row in rows} if is_its_folder else set()
            groups = {tile.group for tile, digest in zip(tiles, digests, strict=True)
                      if digest in learned or tile.image in images}
            if groups or is_its_folder:
                groups |= {row["group"] for row in rows}
            models.append((candidate, Known(learned, frozenset(groups - {""}))))
        return cls(models, root)

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


def digests_of(tiles: Sequence[Tile], before: Sequence[Tile], root: Path) -> list[str]:
    """Return the digest of each tile's image: that of the list `before`, else of the file; "" if it is unreadable."""
    digests = {tile.image: tile.digest for tile in before if tile.digest}
    unknown = [tile.image for tile in tiles if tile.image not in digests]
    with (worker_map(workers_for(len(unknown))) as parallel_map,
          Progress("read images", len(unknown), "tile") as progress):
        for image, digest in zip(unknown, parallel_map(partial(_digest, root), unknown), strict=True):
            digests[image] = digest
            progress.advance()
    return [digests[tile.image] for tile in tiles]


def _digest(root: Path, image: str) -> str:
    try:
        return digest_of(np.array(read_image(root / image)))
    except UserError:
        return ""
