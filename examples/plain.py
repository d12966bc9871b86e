"""FROG in a plain training loop, with a schedule and checkpoints that resume.

python examples/plain.py
"""

import tempfile

import torch
import torch.nn.functional as F
from torch import nn

from frog_triton import FROG


def build() -> tuple[nn.Module, FROG, torch.optim.lr_scheduler.LRScheduler]:
    """A model, its optimizer, and a schedule."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)),
    )
    optimizer = FROG(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [5e-2, 3e-3], 40)
    return model, optimizer, schedule


def main() -> float:
    """Train on stripes that run across or down; returns the accuracy."""
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (512,))
    stripes = (torch.arange(8.0) % 2).expand(512, 1, 8, 8)
    images = torch.where(labels.view(-1, 1, 1, 1) == 1, stripes, stripes.mT)
    images = images + torch.randn_like(images)

    model, optimizer, schedule = build()
    with tempfile.TemporaryDirectory() as folder:
        for step in range(40):
            batch = torch.randint(0, 512, (64,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step == 19:  # stop here, and go on in fresh objects
                parts = [part.state_dict() for part in (model, optimizer, schedule)]
                torch.save(parts, f"{folder}/checkpoint.pt")
                model, optimizer, schedule = build()
                saved = torch.load(f"{folder}/checkpoint.pt", weights_only=True)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                schedule.load_state_dict(saved[2])
    model.eval()
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
