"""Data sets as tensors: images, and the characters of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import sources


@dataclass(frozen=True)
class Dataset:
    """Images in memory, normalized by the training images' mean and deviation.

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

    def to(self, device: torch.device | str) -> Dataset:
        """The same on a device; batches are then made there."""
        tensors = ("train_x", "train_y", "test_x", "test_y")
        return replace(self, **{t: getattr(self, t).to(device) for t in tensors})

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of full batches in random order, shifted and flipped at random.

        Args:
            batch_size: examples a batch; a smaller last batch is left out.
            generator: of the order and the augmentation, on the data's device.
        """
        order = torch.randperm(
            len(self.train_y), generator=generator, device=generator.device
        )
        batch_size = min(batch_size, len(order))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            index = order[start : start + batch_size]
            yield self._augment(self.train_x[index], generator), self.train_y[index]

    def _augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Shift by up to an eighth of the width; flip where that is allowed."""
        n, _, height, width = x.shape
        device = x.device
        reach = max(1, width // 8)
        padded = torch.nn.functional.pad(x, [reach] * 4)
        shift = torch.randint(
            0, 2 * reach + 1, (2, n, 1), generator=generator, device=device
        )
        rows = shift[0] + torch.arange(height, device=device)
        columns = shift[1] + torch.arange(width, device=device)
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        image = torch.arange(n, device=device)[:, None, None]
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
    return _normalized(
        "handwritten digits (8x8)", x[train], y[train], x[test], y[test], flip=False
    )


def images(
    source: Path,
    limit: int | None = None,
    cache: Path | None = None,
    test_limit: int | None = None,
) -> Dataset:
    """Images from a folder, an archive, a torchvision root or an ``.npz``.

    Args:
        source: see `sources.load`, also for the errors raised.
        limit: use only so many training images, evenly from all classes.
        cache: folder for decoded images.
        test_limit: likewise for the test images.
    """
    found = sources.load(source, cache)
    train = _evenly(found.train_x, found.train_y, limit)
    test = _evenly(found.test_x, found.test_y, test_limit)
    return _normalized(source.name.split(".")[0], *train, *test, flip=True)


def _evenly(
    x: NDArray[np.uint8], y: NDArray[np.int64], limit: int | None
) -> tuple[Tensor, Tensor]:
    """At most so many images, of all classes alike, as float tensors."""
    if limit is not None and limit < len(y):
        classes = np.unique(y)
        share = -(-limit // len(classes))
        kept = np.concatenate([np.flatnonzero(y == c)[:share] for c in classes])
        shuffle = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
        kept = kept[shuffle[:limit].numpy()]
        x, y = x[kept], y[kept]
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().float(), torch.tensor(y)


def _normalized(
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


@dataclass(frozen=True)
class Text:
    """Characters of a text, or its tokens, as integers.

    Attributes:
        name: for titles.
        train: int64, the first nine tenths.
        test: the rest.
        characters: the alphabet; empty for tokens.
        tokens: how many there are, if they are no characters.
    """

    name: str
    train: Tensor
    test: Tensor
    characters: str
    tokens: int = 0

    @property
    def symbols(self) -> int:
        """How many different ones there may be."""
        return self.tokens or len(self.characters)

    def to(self, device: torch.device | str) -> Text:
        """The same on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def windows(
        self, count: int, context: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Windows of the training text at random, and what follows each character."""
        start = torch.randint(
            len(self.train) - context,
            (count, 1),
            generator=generator,
            device=generator.device,
        )
        index = start + torch.arange(context, device=generator.device)
        return self.train[index], self.train[index + 1]


def text(source: Path, limit: int | None = None) -> Text:
    """The characters of a text file, or the tokens of a ``.bin``.

    Args:
        source: the file, in UTF-8; a ``.bin`` holds nothing but tokens in uint16.
        limit: use only so many characters of the training part.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is shorter than a thousand characters or tokens.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist; --data takes a text file")
    if source.suffix == ".bin":
        return _tokens(source)
    content = source.read_text(encoding="utf-8")
    if len(content) < 1000:
        raise ValueError(f"{source} has only {len(content)} characters")
    characters = "".join(sorted(set(content)))
    position = {c: i for i, c in enumerate(characters)}
    codes = torch.tensor([position[c] for c in content])
    split = len(codes) * 9 // 10
    return Text(source.stem, codes[:split][:limit], codes[split:], characters)


GPT2_TOKENS = 50_257
"""In GPT-2's vocabulary."""


def _tokens(source: Path) -> Text:
    found = torch.from_numpy(np.fromfile(source, dtype=np.uint16).astype(np.int64))
    if len(found) < 1000:
        raise ValueError(f"{source} has only {len(found)} tokens")
    tokens = max(GPT2_TOKENS, int(found.max()) + 1)
    split = len(found) * 9 // 10
    return Text(source.stem, found[:split], found[split:], "", tokens)


def program_text(limit: int, held_out: int) -> Text:
    """The Python sources of torch's layers, in one alphabet with `prose`.

    Args:
        limit: characters to learn from.
        held_out: characters to be judged by.
    """
    return _ascii("sources of torch.nn", Path(nn.__file__).parent, limit, held_out)


def prose(held_out: int) -> Text:
    """Descriptions of data sets that scikit-learn ships; see `program_text`."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "descr"
    return _ascii("descriptions of data sets", folder, None, held_out)


_ASCII = "\n" + "".join(map(chr, range(32, 127)))


def _ascii(name: str, folder: Path, limit: int | None, held_out: int) -> Text:
    """All texts of a folder; the held-out part is made of every eighth thousand."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".rst"))
    content = "".join(path.read_text(encoding="utf-8") for path in files)
    position = {c: i for i, c in enumerate(_ASCII)}
    codes = torch.tensor([position[c] for c in content if c in position])
    parts = codes.split(1000)
    test = torch.cat(parts[::8])[:held_out]
    train = torch.cat([part for i, part in enumerate(parts) if i % 8])[:limit]
    return Text(name, train, test, _ASCII)
