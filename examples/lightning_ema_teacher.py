"""An EMA teacher in a Lightning training: asked once per batch, for the distillation loss only.

The teacher is a moving average of the student. A second look at it inside a step costs a forward
pass that nobody sees; one after the update answers with other weights than the loss was made of.
Run me, and then with --break-it, where a helper asks the teacher for a number on the dashboard.
"""

import argparse
import copy
import tempfile

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lensnet_guard import CallPolicy, LensNetViolation
from lensnet_guard.integrations import sanctioned
from lensnet_guard.integrations.lightning import LensNetGuardCallback


class MeanTeacher(LightningModule):
    """Learns from labels and from an average of its own past."""

    def __init__(self, decay: float = 0.9, *, break_it: bool = False) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.decay = decay
        self.break_it = break_it

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, labels = batch
        logits = self.student(x)
        with torch.no_grad(), sanctioned(self.teacher, "distillation"):
            soft = self.teacher(x + 0.1 * torch.randn_like(x)).softmax(-1)  # the one legal call
        if self.break_it:
            self.log("agreement", self.agreement(x))
        return F.cross_entropy(logits, labels) + F.cross_entropy(logits, soft)

    def on_train_batch_end(self, *_: object) -> None:
        with torch.no_grad():  # into the teacher: a new module in its place would have no guard
            for mean, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(new, 1 - self.decay)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("agreement", self.agreement(batch[0]))  # here the teacher may be asked freely

    def agreement(self, x: Tensor) -> Tensor:
        """How often both give the same answer."""
        return (self.student(x).argmax(-1) == self.teacher(x).argmax(-1)).float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.student.parameters(), lr=1e-2)


def make_loader() -> DataLoader:
    """Points whose class is the largest of their first three coordinates."""
    x = torch.randn(64, 8)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=8)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--break-it", action="store_true")
model = MeanTeacher(break_it=parser.parse_args().break_it)
callback = LensNetGuardCallback("teacher", policy=CallPolicy(scopes={"distillation": 1}))
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        max_epochs=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(model, make_loader(), make_loader())
    except LensNetViolation as violation:
        print(f"{type(violation).__name__}: {violation}")
    else:
        print(f"verdict: {callback.verdict}")
