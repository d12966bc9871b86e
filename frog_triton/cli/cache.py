"""Tuned configurations that `frog-triton autotune` has kept.

frog-triton cache path
frog-triton cache show
frog-triton cache export mine.json
frog-triton cache clear
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..autotune.cache import Cache, UnusableError, parse
from .errors import CommandError
from .output import console, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("action", choices=("show", "clear", "path", "export"))
    parser.add_argument(
        "file", nargs="?", type=Path, help="of export: copy this machine's only table"
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="(default: the user's cache)"
    )


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    cache = Cache(args.cache_dir)
    if args.action != "export" and args.file is not None:
        raise CommandError(f"cache {args.action} takes no file")
    return {"show": _show, "clear": _clear, "path": _path, "export": _export}[
        args.action
    ](cache, args.file)


def _path(cache: Cache, file: Path | None) -> int:
    print(cache.folder)
    return 0


def _clear(cache: Cache, file: Path | None) -> int:
    deleted = cache.clear()
    for path in deleted:
        print(f"deleted {path}")
    if not deleted:
        print(f"nothing to delete in {cache.folder}")
    return 0


def _show(cache: Cache, file: Path | None) -> int:
    if not cache.paths():
        print(f"no table in {cache.folder}; run: frog-triton autotune resnet18")
    broken = False
    for path in cache.paths():
        try:
            table = parse(path.read_text())
        except (OSError, UnusableError, UnicodeDecodeError) as error:
            console().print(f"{path.name}: cannot be used: {error}")
            broken = True
            continue
        rows = [
            (key, ", ".join(f"{n}={v}" for n, v in config.values().items()))
            for key, config in table.configs.items()
        ]
        rows += list(table.formulations.items())
        print_table(path.name, ("key ", "choice "), rows)
    return 1 if broken else 0


def _export(cache: Cache, file: Path | None) -> int:
    paths = cache.paths()
    if file is None:
        raise CommandError("cache export needs a file to write to")
    if len(paths) != 1:
        names = ", ".join(p.name for p in paths) or "none"
        raise CommandError(
            f"export copies the folder's only table, and {cache.folder} holds: {names}",
            1,
        )
    try:
        text = paths[0].read_text()
        parse(text)
        file.write_text(text)
    except (OSError, UnusableError) as error:
        raise CommandError(f"{paths[0]} cannot be exported: {error}", 1) from error
    print(f"wrote {file}")
    return 0
