"""Tuned configurations that `frog-triton autotune` has kept.

frog-triton cache path
frog-triton cache show
frog-triton cache export mine.json
frog-triton cache clear
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..autotune.cache import Cache, UnusableError, parse
from .arguments import output_file
from .errors import CommandError
from .output import add_outputs, console, print_table, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("action", choices=("show", "clear", "path", "export"))
    parser.add_argument(
        "file",
        nargs="?",
        type=output_file,
        help="of export: copy this machine's only table",
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="(default: the user's cache)"
    )
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    cache = Cache(args.cache_dir)
    if args.action != "export" and args.file is not None:
        raise CommandError(f"cache {args.action} takes no file")
    if args.action != "show" and args.json is not None:
        raise CommandError("--json goes with cache show")
    return {"show": _show, "clear": _clear, "path": _path, "export": _export}[
        args.action
    ](cache, args)


def _path(cache: Cache, args: argparse.Namespace) -> int:
    print(cache.folder)
    return 0


def _clear(cache: Cache, args: argparse.Namespace) -> int:
    deleted = cache.clear()
    for path in deleted:
        print(f"deleted {path}")
    if not deleted:
        print(f"nothing to delete in {cache.folder}")
    return 0


def _show(cache: Cache, args: argparse.Namespace) -> int:
    if not cache.paths():
        print(f"no table in {cache.folder}; run: frog-triton autotune resnet18")
    found: list[dict[str, Any]] = []
    for path in cache.paths():
        try:
            table = parse(path.read_text())
        except (OSError, UnusableError, UnicodeDecodeError) as error:
            console().print(f"{path.name}: cannot be used: {error}")
            found.append({"file": path.name, "error": str(error)})
            continue
        configs = {key: config.values() for key, config in table.configs.items()}
        found.append(
            {
                "file": path.name,
                "configs": configs,
                "formulations": dict(table.formulations),
            }
        )
        rows = [
            (key, ", ".join(f"{name}={value}" for name, value in values.items()))
            for key, values in configs.items()
        ]
        rows += list(table.formulations.items())
        print_table(path.name, ("key ", "choice "), rows)
    write_json(args.json, {"folder": str(cache.folder), "tables": found})
    return int(any("error" in table for table in found))


def _export(cache: Cache, args: argparse.Namespace) -> int:
    paths, file = cache.paths(), args.file
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
