"""Images on disk in every form, and the cache of decoded ones."""

import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch

from frog_triton.benchmarks.train import data, sources

Image = pytest.importorskip("PIL.Image")

CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def pixels():
    """What every form holds: two images a class for training, one for testing."""
    rng = np.random.default_rng(0)
    return sources.Images(
        rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8),
        np.array([0, 0, 1, 1]),
        rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
        np.array([0, 1]),
    )


def _folder(root, pixels):
    for split, x, y in (
        ("train", pixels.train_x, pixels.train_y),
        ("test", pixels.test_x, pixels.test_y),
    ):
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            path = root / split / CLASSES[label] / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    (root / "README.md").write_text("not an image")
    return root


def _tar(root, pixels):
    folder = _folder(root / "images", pixels)
    with tarfile.open(root / "images.tar.xz", "w:xz") as archive:
        archive.add(folder, arcname="set")
    shutil.rmtree(folder)
    return root / "images.tar.xz"


def _npz(root, pixels):
    np.savez(root / "images.npz", **pixels._asdict())
    return root / "images.npz"


def _torchvision(root, pixels):
    batches = root / "cifar-10-batches-py"
    batches.mkdir()

    def write(name, x, y):
        planes = x.transpose(0, 3, 1, 2).reshape(len(x), 3072)
        content = {b"data": planes, b"labels": [int(label) for label in y]}
        (batches / name).write_bytes(pickle.dumps(content))

    shares = np.array_split(np.arange(4), 5)
    for number, index in enumerate(shares, 1):
        x, y = pixels.train_x[index], pixels.train_y[index]
        write(f"data_batch_{number}", x, y)
    write("test_batch", pixels.test_x, pixels.test_y)
    return root


@pytest.mark.parametrize("make", [_folder, _tar, _npz, _torchvision])
@pytest.mark.parametrize("cached", [False, True])
def test_forms_agree(make, cached, pixels, tmp_path):
    source = make(tmp_path, pixels)
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):  # the second time from the cache
        found = sources.load(source, cache)
        for got, wanted in zip(found, pixels, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_cache_spares_the_decoding(pixels, tmp_path, monkeypatch):
    source = _tar(tmp_path, pixels)
    sources.load(source, tmp_path / "cache")
    monkeypatch.setattr(Image, "open", None)
    found = sources.load(source, tmp_path / "cache")
    np.testing.assert_array_equal(found.train_x, pixels.train_x)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_limits_are_even_over_classes(pixels, tmp_path):
    found = data.images(_npz(tmp_path, pixels), limit=2, test_limit=2)
    assert sorted(found.train_y.tolist()) == [0, 1]
    assert len(found.test_y) == 2 and found.classes == 2
    torch.testing.assert_close(found.train_x.mean((0, 2, 3)), torch.zeros(3))


def test_sizes_that_differ(pixels, tmp_path):
    _folder(tmp_path, pixels)
    odd = tmp_path / "train" / "dog" / "odd.png"
    Image.fromarray(pixels.train_x[0, :16]).save(odd)
    with pytest.raises(ValueError, match=r"odd\.png has size \(16, 32\)"):
        sources.load(tmp_path)


def test_class_without_training_images(pixels, tmp_path):
    _folder(tmp_path, pixels)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "fox")
    with pytest.raises(ValueError, match="test/fox has no counterpart"):
        sources.load(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data takes"):
        sources.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="train/<class>/"):
        sources.load(tmp_path)
    (tmp_path / "empty.tar").touch()
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(FileNotFoundError, match="no images"):
        sources.load(tmp_path / "empty.tar")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_x": np.zeros((1, 4, 4), np.uint8)}, "lacks the arrays train_y"),
        (
            dict.fromkeys(sources.Images._fields, np.zeros((1, 4, 4), np.float32)),
            "must be uint8",
        ),
    ],
)
def test_wrong_npz(arrays, message, tmp_path):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        sources.load(tmp_path / "wrong.npz")


def test_text(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_text("abcb" * 500)
    found = data.text(path)
    assert found.characters == "abc" and len(found.train) == 1800
    x, y = found.windows(5, 7, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (5, 7)
    assert torch.equal(x[:, 1:], y[:, :-1])
    with pytest.raises(FileNotFoundError, match="text file"):
        data.text(tmp_path / "none")
    path.write_text("short")
    with pytest.raises(ValueError, match="only 5 characters"):
        data.text(path)
