"""Labelled images on disk, in the forms people have them, decoded once into a cache."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
_SPLITS = ("train", "test")
_Entry = tuple[str, str, NDArray[np.uint8]]  # class, file name, pixels


class Images(NamedTuple):
    """Images ``(n, height, width, channels)`` in uint8 with int64 labels."""

    train_x: NDArray[np.uint8]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.uint8]
    test_y: NDArray[np.int64]


def load(source: Path, cache: Path | None = None) -> Images:
    """Read a data set, from the cache if it has been decoded before.

    Args:
        source: a folder with ``train/<class>/`` and ``test/<class>/``; a torchvision
            root, that is a folder with ``cifar-10-batches-py/``; a tar archive of
            either layout's images; or an ``.npz`` with ``train_x``, ``train_y``,
            ``test_x`` and ``test_y``, images in uint8 with channels last.
        cache: folder for decoded images; None: decode every time.

    Raises:
        FileNotFoundError: nothing there, or no images in it.
        ValueError: images of different sizes, or classes that differ between splits.
    """
    reader = _reader(source)
    if cache is None or reader is _read_npz:
        return reader(source)
    status = source.stat()
    identity = f"{source.resolve()} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    cached = cache / f"{source.name.split('.')[0]}-{digest}.npz"
    if cached.exists():
        return _read_npz(cached)
    images = reader(source)
    cache.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **images._asdict())
    partial.replace(cached)  # a run killed while it writes leaves no half cache
    return images


def _reader(source: Path) -> Callable[[Path], Images]:
    if source.is_dir():
        return _read_torchvision if _batches(source).is_dir() else _read_folder
    if not source.is_file():
        raise FileNotFoundError(
            f"{source} does not exist; --data takes a folder with train/<class>/ and "
            "test/<class>/ in it, a torchvision root, a tar of images or an .npz"
        )
    return _read_npz if source.suffix == ".npz" else _read_tar


def _read_npz(source: Path) -> Images:
    with np.load(source) as arrays:
        missing = [name for name in Images._fields if name not in arrays]
        if missing:
            raise ValueError(f"{source} lacks the arrays {', '.join(missing)}")
        images = Images(*(arrays[name] for name in Images._fields))
    for x in (images.train_x, images.test_x):
        if x.dtype != np.uint8 or x.ndim not in (3, 4):
            raise ValueError(
                f"{source}: images must be uint8 of shape (n, height, width, channels) "
                f"or (n, height, width), got {x.dtype} of shape {x.shape}"
            )
    with_channels = [x.reshape(*x.shape[:3], -1) for x in (images[0], images[2])]
    return Images(
        with_channels[0],
        images.train_y.astype(np.int64),
        with_channels[1],
        images.test_y.astype(np.int64),
    )


def _batches(source: Path) -> Path:
    return source / "cifar-10-batches-py"


def _read_torchvision(source: Path) -> Images:
    def read(names: Iterable[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        x, y = [], []
        for name in names:
            with (_batches(source) / name).open("rb") as file:
                batch = pickle.load(file, encoding="bytes")
            x.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            y.append(np.asarray(batch[b"labels"], dtype=np.int64))
        return np.ascontiguousarray(np.concatenate(x)), np.concatenate(y)

    train = read(f"data_batch_{i}" for i in range(1, 6))
    return Images(*train, *read(["test_batch"]))


def _read_folder(source: Path) -> Images:
    for split in _SPLITS:
        if not (source / split).is_dir():
            raise FileNotFoundError(
                f"{source / split} does not exist; --data takes a folder with "
                "train/<class>/ and test/<class>/ in it"
            )
    paths = sorted(p for split in _SPLITS for p in (source / split).glob("*/*"))
    return _decode(
        source, ((p.relative_to(source).as_posix(), p.read_bytes()) for p in paths)
    )


def _read_tar(source: Path) -> Images:
    def members() -> Iterator[tuple[str, bytes]]:
        with tarfile.open(source) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name, file.read()

    return _decode(source, members())


def _decode(source: Path, files: Iterable[tuple[str, bytes]]) -> Images:
    """Sort encoded images by ``.../<split>/<class>/<name>`` and decode them."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(
            f"{source}: decoding images needs pillow (pip install pillow); an .npz or "
            "a torchvision root does not"
        ) from None
    found: dict[str, list[tuple[str, str, NDArray[np.uint8]]]] = {
        s: [] for s in _SPLITS
    }
    size: tuple[int, ...] | None = None
    for name, content in files:
        path = PurePosixPath(name)
        parts = path.parts
        if path.suffix.lower() not in _SUFFIXES or len(parts) < 3:
            continue
        if parts[-3] not in found:
            continue
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
        size = size or pixels.shape
        if pixels.shape != size:
            raise ValueError(
                f"{name} has size {pixels.shape[:2]}, others have {size[:2]}; resize "
                "the images to one size first"
            )
        found[parts[-3]].append((parts[-2], path.name, pixels))
    classes = sorted({label for label, _, _ in found["train"]})
    arrays: list[NDArray[np.uint8] | NDArray[np.int64]] = []
    for split in _SPLITS:
        entries = sorted(found[split], key=lambda entry: entry[:2])
        if not entries:
            raise FileNotFoundError(f"no images in {source} under {split}/<class>/")
        unknown = {label for label, _, _ in entries} - set(classes)
        if unknown:
            raise ValueError(
                f"{source}: test/{min(unknown)} has no counterpart under train/"
            )
        arrays.append(np.stack([pixels for _, _, pixels in entries]))
        arrays.append(np.array([classes.index(label) for label, _, _ in entries]))
    return Images(*arrays)  # type: ignore[arg-type]
