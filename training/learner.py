"""The learner: the network with its optimizer, its scheduler and its loss, on a device."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common import ranks
from common.config import Config, Optim
from common.console import UserError
from common.devices import autocast, choose_device, choose_precision, compile_for_training, memory_format
from common.randomness import torch_seed
from common.statistics import Statistics
from losses import make_loss
from training import checkpoints
from training.snapshots import State, copy_state, tensors_of


@dataclass(frozen=True)
class Learner:
    """What training changes, and how it computes."""

    model: nn.Module  # our U-Net, or another network with the same inputs and outputs
    optimizer: torch.optim.Adam
    scheduler: ReduceLROnPlateau
    batch_loss: Callable[[Tensor, Tensor], Tensor]  # images (B, 3, H, W) and target (B, H, W) to the prediction's loss
    device: torch.device
    precision: torch.dtype

    @property
    def state(self) -> State:
        """Weights and Adam state: the tensors that training changes, not copies."""
        return self.model.state_dict(), self.optimizer.state_dict()

    def take_snapshot(self, into: State | None = None) -> State:
        """Return a copy of weights and Adam state; `into` is an earlier snapshot that is overwritten and returned."""
        if into is None:
            return copy.deepcopy(self.state)
        copy_state(self.state, into)
        return into

    def restore_snapshot(self, snapshot: State) -> None:
        copy_state(snapshot, self.state)

    def copy_from_rank(self, rank: int) -> None:
        """Set weights and Adam state to those of another rank; every rank calls this."""
        ranks.copy_tensors(tensors_of(self.state), rank)

    def restore_checkpoint(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Set weights, Adam state and scheduler to those of a checkpoint, so that training continues from there."""
        checkpoints.load_weights(self.model, checkpoint)
        groups = [saved | {"fused": ours["fused"]} for saved, ours in  # fused depends on the device, which may differ
                  zip(checkpoint.optimizer["param_groups"], self.optimizer.param_groups, strict=True)]
        self.optimizer.load_state_dict(checkpoint.optimizer | {"param_groups": groups})
        self.scheduler.load_state_dict(checkpoint.scheduler)


def build_learner(config: Config, statistics: Statistics,
                  build: Callable[[Config], nn.Module] = checkpoints.build_model) -> Learner:
    """Build the network with its first weights, Adam, the scheduler and the loss of a config.

    `build` makes another network than ours, from normalised images (B, 3, H, W) to logits (B, K, H, W).
    """
    device = choose_device(config.device)
    precision = choose_precision(config.train.precision, device)
    torch.manual_seed(torch_seed(config.seed, 0, 0, "weights"))
    model = build(config).to(device, memory_format=memory_format(device))
    optimizer = build_optimizer(model, config.optim, device)
    scheduler = ReduceLROnPlateau(  # a relative threshold would count it as progress if a negative loss worsens
        optimizer, factor=config.optim.factor, patience=config.optim.patience, min_lr=config.optim.min_lr,
        threshold_mode="abs")
    batch_loss = build_batch_loss(model, config, statistics, device, precision)
    return Learner(model, optimizer, scheduler, batch_loss, device, precision)


def build_optimizer(model: nn.Module, optim: Optim, device: torch.device) -> torch.optim.Adam:
    """Build Adam with the state that its first step would create, so that every snapshot is complete."""
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=fused)
    for weight in model.parameters():
        optimizer.state[weight] = {"step": torch.zeros((), device=device if fused else None),
                                   "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    return optimizer


def build_batch_loss(model: nn.Module, config: Config, statistics: Statistics, device: torch.device,
                     precision: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the function that predicts a batch and returns the prediction's loss, compiled if train.compile is set."""
    try:
        loss = make_loss(config.loss, torch.tensor(statistics.frequencies, device=device))
    except ValueError as error:
        raise UserError(f"loss.name={config.loss.name}: {error} (classes {', '.join(config.data.classes)})") from None

    def batch_loss(images: Tensor, target: Tensor) -> Tensor:
        with autocast(device, precision):
            logits = model(images)                                                   # (B, K, H, W)
        return loss(logits, target)

    return compile_for_training(batch_loss, device) if config.train.compile else batch_loss
