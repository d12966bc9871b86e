"""Image data sets as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}


@dataclass(frozen=True)
class Dataset:
    """Images in memory, normalised by the training images' mean and deviation.

    Attributes:
        name: for titles.
        train_x: ``(n, channels, height, width)`` float32.
        train_y: int64 labels.
        test_x: held-out images.
        test_y: their labels.
        classes: number of classes.
        flip: whether a mirrored image keeps its label.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    flip: bool

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of full batches in random order, shifted and flipped at random.

        Args:
            batch_size: examples a batch; a smaller last batch is left out.
            generator: of the order and the augmentation.
        """
        order = torch.randperm(len(self.train_y), generator=generator)
        batch_size = min(batch_size, len(order))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            index = order[start : start + batch_size]
            yield self._augment(self.train_x[index], generator), self.train_y[index]

    def _augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Shift by up to an eighth of the width; flip where that is allowed."""
        n, _, height, width = x.shape
        reach = max(1, width // 8)
        padded = torch.nn.functional.pad(x, [reach] * 4)
        shift = torch.randint(0, 2 * reach + 1, (2, n, 1), generator=generator)
        rows = shift[0] + torch.arange(height)
        columns = shift[1] + torch.arange(width)
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        image = torch.arange(n)[:, None, None]
        # Index tensors around the channel slice put channels last.
        return padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def digits() -> Dataset:
    """The 1,797 handwritten digits that scikit-learn ships; 500 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images.astype(np.float32)).unsqueeze(1)
    y = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[:500], order[500:]
    return _normalised(
        "handwritten digits (8x8)", x[train], y[train], x[test], y[test], flip=False
    )


def folder(root: Path, limit: int | None = None) -> Dataset:
    """Images under ``root/train/<class>/`` and ``root/test/<class>/``.

    Args:
        root: the folder.
        limit: use only so many training images, evenly from all classes.

    Raises:
        FileNotFoundError: a folder is missing or holds no image.
        ValueError: the images are not all of one size.
    """
    classes = sorted(p.name for p in _existing(root / "train").iterdir() if p.is_dir())
    if not classes:
        raise FileNotFoundError(f"{root / 'train'} has no sub-folder: one a class")
    share = None if limit is None else -(-limit // len(classes))
    train_x, train_y = _read(root / "train", classes, share)
    test_x, test_y = _read(root / "test", classes, None)
    if limit is not None:
        order = torch.randperm(
            len(train_y), generator=torch.Generator().manual_seed(0)
        )[:limit]
        train_x, train_y = train_x[order], train_y[order]
    return _normalised(root.name, train_x, train_y, test_x, test_y, flip=True)


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist; --data takes a folder with train/<class>/ and "
            "test/<class>/ in it"
        )
    return path


def _read(root: Path, classes: list[str], share: int | None) -> tuple[Tensor, Tensor]:
    from PIL import Image

    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(
            p for p in _existing(root / name).iterdir() if p.suffix.lower() in _SUFFIXES
        )
        for path in files[:share]:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB"), dtype=np.uint8))
            labels.append(label)
            if images[-1].shape != images[0].shape:
                raise ValueError(
                    f"{path} has size {images[-1].shape[:2]}, others have "
                    f"{images[0].shape[:2]}; resize the images to one size first"
                )
    if not images:
        raise FileNotFoundError(f"no images under {root}")
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return stacked.contiguous(), torch.tensor(labels)


def _normalised(
    name: str,
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    flip: bool,
) -> Dataset:
    mean = train_x.mean((0, 2, 3), keepdim=True)
    deviation = train_x.std((0, 2, 3), keepdim=True)
    return Dataset(
        name,
        (train_x - mean) / deviation,
        train_y,
        (test_x - mean) / deviation,
        test_y,
        classes=int(train_y.max()) + 1,
        flip=flip,
    )
