"""Tuned tables in a folder: what is kept, merged, refused and survived."""

import errno
import json
import os
import signal
import time
import warnings

import pytest
from table_writers import start

from frog_triton.autotune import cache as cache_module
from frog_triton.autotune.cache import Cache, Machine, UnusableError, parse, render
from frog_triton.kernels.gram import GramConfig
from frog_triton.kernels.table import Table
from frog_triton.kernels.update import UpdateConfig

MACHINE = Machine("NVIDIA Test 1", 90, "3.7.1")
TABLE = Table(
    {"gram n64 d1024 p16 bfloat16": GramConfig(BLOCK_N=32)},
    {"layer n64": "gram"},
)


def test_a_table_comes_back_as_it_was(tmp_path):
    cache = Cache(tmp_path / "new" / "folder")
    assert cache.load(MACHINE) == Table()
    path = cache.store(MACHINE, TABLE)
    assert path == tmp_path / "new" / "folder" / "nvidia-test-1-sm90-triton-3.7.1.json"
    assert cache.load(MACHINE) == TABLE
    assert cache.load(Machine("NVIDIA Test 1", 90, "3.8.0")) == Table()
    assert cache.clear() == [path] and cache.load(MACHINE) == Table()


def test_entries_of_others_are_kept(tmp_path):
    cache = Cache(tmp_path)
    cache.store(MACHINE, TABLE)
    more = Table({"update n64": UpdateConfig(programs=512)}, {"layer n64": "primal"})
    cache.store(MACHINE, more)
    assert cache.load(MACHINE) == TABLE.merged(more)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    writers = [start(tmp_path, str(i), 8) for i in range(3)]
    for writer, _ in writers:
        writer.join(120)
        assert writer.exitcode == 0
    keys = set(Cache(tmp_path).load(MACHINE).configs)
    assert keys == {f"gram n{i} p{name}" for i in range(8) for name in "012"}


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    for round_ in range(4):
        writer, told = start(tmp_path, str(round_), 10_000)
        assert told.recv() == 0
        time.sleep(0.03 * round_)
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert f"gram n0 p{round_}" in Cache(tmp_path).load(MACHINE).configs
    # The lock died with its holder, and what it left behind is cleared away.
    assert Cache(tmp_path).store(MACHINE, TABLE) is not None
    assert not list(tmp_path.glob("*.tmp"))


def test_a_kill_between_write_and_rename_changes_nothing(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    path = cache.store(MACHINE, TABLE)
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.store(MACHINE, Table({"gram n1": GramConfig()}))
    assert path.read_text() == before


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    path = cache.store(MACHINE, TABLE)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left.*for this process only"):
        assert cache.store(MACHINE, Table({"gram n1": GramConfig()})) is None
    assert parse(path.read_text(), MACHINE) == TABLE
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert Cache(file / "below").store(MACHINE, TABLE) is None
    if os.geteuid() == 0:
        return  # nothing is read-only for root
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="could not be kept"):
        assert Cache(folder).store(MACHINE, TABLE) is None


def changed(**entries):
    return json.dumps({**json.loads(render(MACHINE, TABLE)), **entries})


GRAM = GramConfig().values()


@pytest.mark.parametrize(
    ("text", "why", "suffix"),
    [
        ("", "no JSON", "corrupt"),
        (render(MACHINE, TABLE)[:-40], "no JSON", "corrupt"),
        ("\x00\x01garbage", "no JSON", "corrupt"),
        ("[]", "not written by frog_triton", "foreign"),
        ('{"format": "other"}', "not written by frog_triton", "foreign"),
        (changed(version=2), "newer than 1", "newer"),
        (changed(version="1"), "version is no number", "corrupt"),
        (changed(gpu="NVIDIA Test 2"), "gpu is 'NVIDIA Test 2'", "foreign"),
        (changed(triton="3.6.0"), "triton is '3.6.0'", "foreign"),
        (changed(configs=None), "missing", "corrupt"),
        (changed(configs={"magic n64": GRAM}), "no kernel", "corrupt"),
        (changed(configs={" ": GRAM}), "no kernel", "corrupt"),
        (changed(configs={"gram n64": {}}), "other fields", "corrupt"),
        (
            changed(configs={"gram n64": GRAM | {"BLOCK_N": "__import__('os')"}}),
            "not a whole number",
            "corrupt",
        ),
        (changed(configs={"gram n64": GRAM | {"BLOCK_N": 48}}), "range", "corrupt"),
        (changed(configs={"gram n64": GRAM | {"num_warps": 0}}), "range", "corrupt"),
        (changed(formulations={"layer": "dual"}), "'dual'", "corrupt"),
    ],
)
def test_a_file_that_cannot_be_used_is_set_aside(tmp_path, text, why, suffix):
    cache = Cache(tmp_path)
    path = cache.path(MACHINE)
    path.write_text(text)
    with pytest.raises(UnusableError, match=why):
        parse(text, MACHINE)
    with pytest.warns(UserWarning, match=f"{path.name}.*set aside.*{suffix}"):
        assert cache.load(MACHINE) == Table()
    assert path.with_name(f"{path.name}.{suffix}").read_text() == text
    assert cache.store(MACHINE, TABLE) == path and cache.load(MACHINE) == TABLE


def test_bytes_that_are_no_text_are_set_aside(tmp_path):
    cache = Cache(tmp_path)
    cache.path(MACHINE).write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="corrupt"):
        assert cache.load(MACHINE) == Table()


def test_no_table_is_shipped_yet():
    assert cache_module.shipped(MACHINE) == Table()
