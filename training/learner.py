"""The network with its optimizer, scheduler and loss: what training changes, and how it computes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common.config import Config
from common.console import UserError
from common.devices import autocast, choose_device, choose_precision, compile_by_shape, memory_format
from common.randomness import torch_seed
from dataset import Statistics
from losses import make_loss
from training import checkpoints
from training.snapshots import Snapshot, copy_state, snapshot_of
from unet import UNet


@dataclass(frozen=True)
class Learner:
    """What training changes, and how it computes."""

    model: UNet
    optimizer: torch.optim.Optimizer
    scheduler: ReduceLROnPlateau
    loss: Callable[[Tensor, Tensor], Tensor]  # of the network's answer to images (B, 3, H, W), given targets (B, H, W)
    device: torch.device
    precision: torch.dtype

    @property
    def state(self) -> Snapshot:
        """Weights and Adam state: the tensors themselves, which training changes."""
        return self.model.state_dict(), self.optimizer.state_dict()

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """A copy of weights and Adam state, in the place of an earlier one where there is one."""
        return snapshot_of(self.state, into)

    def restore(self, snapshot: Snapshot) -> None:
        copy_state(snapshot, self.state)


def build_learner(config: Config, statistics: Statistics) -> Learner:
    """The network with its first weights, Adam, scheduler and loss of a config."""
    device = choose_device(config.device)
    torch.manual_seed(torch_seed(config.seed, 0, 0, "weights"))
    model = checkpoints.build_model(config).to(device, memory_format=memory_format(device))
    optim = config.optim
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=fused)
    for weight in model.parameters():  # what its first step would make; from the start, so that there is all to copy
        optimizer.state[weight] = {"step": torch.zeros((), device=device if fused else None),
                                   "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    # a relative threshold takes the worsening of a negative loss for progress, and the Dice losses are negative
    scheduler = ReduceLROnPlateau(optimizer, factor=optim.factor, patience=optim.patience, min_lr=optim.min_lr,
                                  threshold_mode="abs")
    try:
        loss = make_loss(config.loss.name, torch.tensor(statistics.frequencies, device=device))
    except ValueError as error:
        raise UserError(f"loss.name=wce: {error} (classes {', '.join(config.data.classes)})") from None
    precision = choose_precision(config.train.precision, device)

    def loss_of_answer(images: Tensor, target: Tensor) -> Tensor:
        with autocast(device, precision):
            logits = model(images)                                                   # (B, K, H, W)
        return loss(logits, target)

    if config.train.compile:
        mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs: one launch for all of a pass
        loss_of_answer = compile_by_shape(loss_of_answer, mode=mode)
    return Learner(model, optimizer, scheduler, loss_of_answer, device, precision)


def restore_checkpoint(learner: Learner, checkpoint: checkpoints.Checkpoint) -> None:
    """Put the checkpoint's state into a new learner; how Adam computes belongs to the device, not to the state."""
    checkpoints.load_weights(learner.model, checkpoint)
    groups = [saved | {"fused": here["fused"]} for saved, here in
              zip(checkpoint.optimizer["param_groups"], learner.optimizer.param_groups, strict=True)]
    learner.optimizer.load_state_dict(checkpoint.optimizer | {"param_groups": groups})
    learner.scheduler.load_state_dict(checkpoint.scheduler)
