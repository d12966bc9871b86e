"""Where tuned tables are kept: one JSON file for each GPU and version of Triton.

Files are plain JSON, checked entry by entry when read, written beside and renamed under
a lock, and merged with what another process has written meanwhile. A file that cannot
be used is set aside under another name, with a warning, and never stops training.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import triton

from ..kernels.config import Config
from ..kernels.registry import kernel_of
from ..kernels.table import Table
from ..warning import warn

FORMAT, VERSION = "frog_triton autotune table", 1
LOCK_SECONDS = 20.0
_FORMULATIONS = ("primal", "gram")


class UnusableError(ValueError):
    """A file that is not a table this version can read.

    Args:
        why: in words.
        suffix: of the name it is set aside under.
    """

    def __init__(self, why: str, suffix: str = "corrupt") -> None:
        super().__init__(why)
        self.suffix = suffix


@dataclass(frozen=True)
class Machine:
    """What a table holds for.

    Attributes:
        gpu: its name, as the driver reports it.
        capability: of the GPU, 90 for 9.0.
        triton: version.
    """

    gpu: str
    capability: int
    triton: str = triton.__version__

    @property
    def file_name(self) -> str:
        """Name of its file."""
        gpu = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        return f"{gpu}-sm{self.capability}-triton-{self.triton}.json"


def default_folder() -> Path:
    """The user's cache folder; one for temporary files where there is no home."""
    try:
        import platformdirs  # a step must not need it

        found = Path(platformdirs.user_cache_dir("frog_triton", appauthor=False))
    except (ImportError, RuntimeError):  # the latter where it knows no home
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        found = Path(base, "frog_triton")
    return found if found.is_absolute() else Path(tempfile.gettempdir(), "frog_triton")


def shipped(machine: Machine) -> Table:
    """The table that comes with the package; empty where nobody has measured one."""
    path = resources.files(__package__).joinpath("tables", machine.file_name)
    return parse(path.read_text(), machine) if path.is_file() else Table()


class Cache:
    """Tables in a folder.

    Args:
        folder: None takes the user's cache folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder)

    def path(self, machine: Machine) -> Path:
        """File of a machine's table."""
        return self.folder / machine.file_name

    def paths(self) -> list[Path]:
        """Files of all tables."""
        return sorted(self.folder.glob("*.json"))

    def load(self, machine: Machine) -> Table:
        """The machine's table; empty if there is none, or none that can be used."""
        path = self.path(machine)
        try:
            return parse(path.read_text(encoding="utf-8"), machine)
        except FileNotFoundError:
            return Table()
        except UnusableError as error:
            self._set_aside(path, error)
        except (OSError, UnicodeDecodeError) as error:
            self._set_aside(path, UnusableError(str(error)))
        return Table()

    def store(self, machine: Machine, table: Table) -> Path | None:
        """Add a table's entries to the machine's file.

        Returns:
            The file; None if it could not be written, which a warning says.
        """
        path = self.path(machine)
        try:
            from filelock import FileLock, Timeout  # a step must not need it
        except ImportError:
            warn(
                f"tuned configurations were not kept in {path}: the package filelock "
                "is missing; they hold for this process only. pip install filelock"
            )
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
                for left in self.folder.glob(f"{path.name}*.tmp"):
                    left.unlink(missing_ok=True)  # by a process that was killed
                merged = self.load(machine).merged(table)
                _write(path, render(machine, merged))
        except (OSError, Timeout) as error:
            warn(
                f"tuned configurations could not be kept in {path}: {error}; they hold "
                "for this process only. Choose another folder, or make room"
            )
            return None
        return path

    def clear(self) -> list[Path]:
        """Delete all tables; returns what was deleted."""
        paths = self.paths()
        for path in paths:
            path.unlink(missing_ok=True)
        return paths

    def _set_aside(self, path: Path, error: UnusableError) -> None:
        aside = path.with_name(f"{path.name}.{error.suffix}")
        try:
            os.replace(path, aside)
            moved = f"it was set aside as {aside.name}"
        except OSError as problem:
            moved = f"it could not be set aside ({problem})"
        warn(
            f"{path} is not a table of tuned configurations that can be used here: "
            f"{error}; {moved}, and defaults are used instead"
        )


def _write(path: Path, text: str) -> None:
    """Write beside and rename, so that readers see the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def render(machine: Machine, table: Table) -> str:
    """A table as JSON."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "gpu": machine.gpu,
        "capability": machine.capability,
        "triton": machine.triton,
        "configs": {key: table.configs[key].values() for key in sorted(table.configs)},
        "formulations": dict(sorted(table.formulations.items())),
    }
    return json.dumps(content, indent=1) + "\n"


def parse(text: str, machine: Machine | None = None) -> Table:
    """A table out of its JSON; nothing in it is evaluated.

    Args:
        text: as `render` writes it.
        machine: that it should be for; None takes any.

    Raises:
        UnusableError: it is damaged, of a later version, or for another machine.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UnusableError(f"it is no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UnusableError("it was not written by frog_triton", "foreign")
    version = content.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise UnusableError("its version is no number")
    if version > VERSION:
        raise UnusableError(f"version {version} is newer than {VERSION}", "newer")
    if machine is not None:
        for name in ("gpu", "capability", "triton"):
            if content.get(name) != getattr(machine, name):
                raise UnusableError(f"its {name} is {content.get(name)!r}", "foreign")
    configs, formulations = content.get("configs"), content.get("formulations")
    if not isinstance(configs, dict) or not isinstance(formulations, dict):
        raise UnusableError("configs or formulations are missing")
    for key, formulation in formulations.items():
        if formulation not in _FORMULATIONS:
            raise UnusableError(f"{key!r} has the formulation {formulation!r}")
    made = {key: _config(key, values) for key, values in configs.items()}
    return Table(made, formulations)


def _config(key: str, values: Any) -> Config:
    kernel = kernel_of(key)
    if kernel is None:
        raise UnusableError(f"{key!r} is for no kernel that is known")
    kind = kernel.config
    if not isinstance(values, Mapping) or set(values) != set(kind().values()):
        raise UnusableError(f"{key!r} has other fields than {kind.__name__}")
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UnusableError(f"{key!r}: {name} is {value!r}, not a whole number")
        power = value & (value - 1) == 0 or name in ("num_stages", "programs")
        if not 1 <= value <= 4096 or not power:
            raise UnusableError(f"{key!r}: {name} = {value} is out of range")
    return kind(**values)
