"""FROG in Lightning: ``configure_optimizers`` builds it on the module itself.

python examples/lightning_module.py
"""

import tempfile

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frog_triton import FROG


class Regression(lightning.LightningModule):
    """A small net that learns a sine of two variables."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Mean squared error of one batch."""
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """FROG and a schedule that is stepped once a batch."""
        optimizer = FROG(self, lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main() -> float:
    """Train, save, and go on from the checkpoint; returns the last loss."""
    torch.manual_seed(0)
    x = 2 * torch.rand(512, 2) - 1
    y = torch.sin(3 * x.sum(1, keepdim=True))
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True
    )
    quiet = {"logger": False, "enable_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        for epochs, checkpoint in ((3, None), (6, f"{folder}/last.ckpt")):
            model = Regression()
            trainer = lightning.Trainer(max_epochs=epochs, **quiet)
            trainer.fit(model, data, ckpt_path=checkpoint)
            trainer.save_checkpoint(f"{folder}/last.ckpt")
    return trainer.callback_metrics["loss"].item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
