"""What is shipped: source distribution, the wheel built from it, what they say."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import frog_triton

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_SHIPPED = (".ci/", ".github/", ".gitignore")
"""Of what git tracks: what only a checkout needs."""


def run(*command, **options):
    """Standard output of a process that must end well."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the source distribution and the wheel that was built from it."""
    pytest.importorskip("build", reason="the package build is missing: see extra dev")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory):
    """The tree of the source distribution."""
    folder = tmp_path_factory.mktemp("unpacked")
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def wheel(dist):
    """The wheel, opened."""
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def installed(unpacked, tmp_path_factory):
    """Where the source distribution was installed; nothing else was written."""
    before = files(unpacked)
    site = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    run(*pip, "--no-index", "--target", site, unpacked, cwd=site)
    assert files(unpacked) == before
    return site


def files(tree):
    """All files below a folder."""
    found = (path for path in tree.rglob("*") if path.is_file())
    return {str(path.relative_to(tree)) for path in found}


def git(*words):
    """Files that git lists."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout here")
    listed = run("git", "-C", ROOT, "ls-files", *words).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def test_source_distribution_holds_what_git_tracks_and_nothing_that_it_ignores(
    unpacked,
):
    shipped = files(unpacked)
    missing = git() - shipped
    assert all(name.startswith(NOT_SHIPPED) for name in missing), missing
    known = git("--cached", "--others", "--exclude-standard")
    assert shipped - known == {"PKG-INFO", "setup.cfg"}


def test_installing_leaves_nothing_in_the_tree(installed):
    assert (installed / "frog_triton" / "kernels" / "__init__.py").is_file()


def test_tests_of_the_source_distribution_are_collected_against_what_it_installs(
    unpacked, installed
):
    """Nothing is taken from a checkout; `make test-build` runs them, too."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    told = run(*pytest_, "--collect-only", cwd=unpacked, env=environment)
    # Some modules ask for packages that may be missing.
    line = r"^(?:SKIPPED \[\d+\] )?tests/(\w+\.py):"
    collected = set(re.findall(line, told, re.M))
    assert collected == {path.name for path in (ROOT / "tests").glob("test_*.py")}
    code = "import frog_triton.kernels as k, frog_triton as f; print(k, f)"
    found = run(sys.executable, "-c", code, cwd=unpacked, env=environment)
    assert found.count(str(installed)) == 2


def test_wheel_has_one_top_level_package(wheel):
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"frog_triton"}
    assert "frog_triton/py.typed" in names
    for folder, prefix in (
        ("frog_triton", "frog_triton"),
        ("kernels", "frog_triton/kernels"),
        ("benchmarks", "frog_triton/benchmarks"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(ROOT / folder)}" in names, path
    assert not [name for name in names if "results" in name]


def test_what_the_package_says_of_itself(dist, wheel):
    name = f"frog_triton-{frog_triton.__version__}"
    assert {path.name for path in dist.iterdir()} == {
        f"{name}.tar.gz",
        f"{name}-py3-none-any.whl",
    }
    told = email.message_from_bytes(wheel.read(f"{name}.dist-info/METADATA"))
    assert told["License-Expression"] == "MIT"
    assert told["Author"] == "The frog_triton authors"
    assert told["Requires-Python"] == PROJECT["requires-python"]
    assert told["Keywords"].split(",") == PROJECT["keywords"]
    assert told.get_all("Classifier") == PROJECT["classifiers"]
    urls = dict(line.split(", ") for line in told.get_all("Project-URL"))
    assert urls == PROJECT["urls"]
    assert f"{name}.dist-info/licenses/LICENSE" in wheel.namelist()


def test_descriptions_are_those_that_an_index_takes(dist):
    pytest.importorskip("twine", reason="the package twine is missing: see extra dev")
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)


def test_one_version_everywhere():
    version = frog_triton.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" and headings[1].startswith(f"{version} - ")


ADDRESSED = sorted(
    path
    for pattern in ("*.*", "docs/**/*.*", "benchmarks/**/*.md", "tests/test_docs.py")
    for path in ROOT.glob(pattern)
    if path.suffix in (".cff", ".md", ".py", ".toml", ".yml")
)
"""What may hold addresses of the project."""


def test_addresses_are_those_of_the_project_and_lead_to_a_file():
    """They begin as those in pyproject.toml, so that one replacement moves them all."""
    home = PROJECT["urls"]["Homepage"]
    raw = home.replace("//github.com/", "//raw.githubusercontent.com/")
    trees = f"{home}/blob/main", f"{home}/tree/main", f"{raw}/main"
    owner, name = home.split("/")[-2:]
    found = 0
    for path in ADDRESSED:
        for address in re.findall(r"https?://[^\s)\"'<>`]+", path.read_text()):
            if f"{owner}/{name}" not in address and f"{owner}.github.io" not in address:
                continue
            starts = [each.rstrip("/") for each in (*PROJECT["urls"].values(), *trees)]
            assert address.rstrip("/").startswith(tuple(starts)), f"{path}: {address}"
            for tree in trees:
                if address.startswith(tree):
                    inside = address.removeprefix(tree).lstrip("/").partition("#")[0]
                    assert (ROOT / inside).exists(), f"{path}: {address}"
            found += 1
    assert found > len(PROJECT["urls"])


def test_pictures_show_wherever_the_description_is_read():
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"!\[[^]]*\]\(([^)\s]+)", readme):
        assert target.startswith("https://"), target
