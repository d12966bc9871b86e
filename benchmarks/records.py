"""Results in files, written as soon as they are there."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..cli.errors import CommandError
from .environment import environment


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader, or a killed process, sees all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def write_json(path: Path, content: Any) -> None:
    """Write plain values; see `write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


class Results:
    """What a bench finds out, one entry after another; an error is an entry, too.

    Args:
        path: rewritten with every entry; None for no file.

    Attributes:
        entries: so far.

    Raises:
        CommandError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.environment = environment()
        self.entries: list[dict[str, Any]] = []
        self._write()

    @property
    def good(self) -> list[dict[str, Any]]:
        """Entries without an error."""
        return [entry for entry in self.entries if "error" not in entry]

    @property
    def exit_code(self) -> int:
        """1 if an entry has an error."""
        return int(len(self.good) < len(self.entries))

    def add(
        self, names: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Do some work and keep what comes of it.

        Args:
            names: what is worked on.
            work: gives the rest of the entry.
        """
        try:
            entry = {**names, **work()}
        except Exception as error:  # the next one may still go well
            said = {"type": type(error).__name__, "message": str(error)[:2000]}
            said["trace"] = traceback.format_exc()[-8000:]
            entry = {**names, "error": said}
            where = " ".join(map(str, names.values()))
            print(f"{where}: {said['type']}: {said['message']}", file=sys.stderr)
        self.entries.append(entry)
        self._write()
        return entry

    def _write(self) -> None:
        if self.path is not None:
            content = {"environment": self.environment, "results": self.entries}
            try:
                write_json(self.path, content)
            except OSError as error:
                said = f"{self.path} cannot be written: {error}"
                raise CommandError(said, 1) from error
