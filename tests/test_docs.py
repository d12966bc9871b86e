"""What README and docs/ say leads somewhere, runs, and comes from a file."""

import argparse
import ast
import importlib.util
import inspect
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import frog_triton
from frog_triton import cli, layers

ROOT = Path(__file__).parents[1]
OURS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = sorted({*ROOT.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")} - {*OURS})
PICTURES = "https://raw.githubusercontent.com/frog-triton/frog-triton/main/"

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
MEASURED = re.compile(
    r"(?<![\w.])\d[\d,.]*\s?(?:%|(?:ms|us|s|microseconds|seconds|steps|points|MiB|GiB)\b)"
)


def name_of(page):
    return str(page.relative_to(ROOT))


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=name_of)


@cache
def without_fences(page):
    return FENCE.sub("", page.read_text())


def headings(page):
    found = re.findall(r"^#+ (.+)$", without_fences(page), re.MULTILINE)
    return [LINK.sub(r"\1", heading) for heading in found]


@cache
def anchors(page):
    """Of a page, as GitHub makes them; those of the site are checked by mkdocs."""
    found = set()
    for heading in headings(page):
        plain = re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-")
        found.add(plain)
    return found


def targets(page, text):
    """Where the links of a text lead: files, and anchors in them."""
    for link in LINK.findall(SPAN.sub("``", text)):
        path, _, anchor = link.removeprefix(PICTURES).partition("#")
        start = ROOT if link.startswith(PICTURES) else page.parent
        if "://" not in path:
            yield (start / path).resolve() if path else page, anchor


@each([*OURS, *OTHERS])
def test_links_lead_somewhere(page):
    for path, anchor in targets(page, without_fences(page)):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


# Numbers.


def paragraphs(text):
    return [p for p in re.split(r"\n\s*\n", text) if p.strip()]


def cells(line):
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def is_table(paragraph):
    return paragraph.startswith("|")


def body(table):
    return [cells(line) for line in table.splitlines()[2:]]


def is_of_results(table):
    """Whether a quarter of the cells beside the first column begin with a digit."""
    found = [cell for row in body(table) for cell in row[1:]]
    return 4 * sum(cell[:1].isdigit() for cell in found) >= len(found)


def value(text):
    return float(text.replace(",", ""))


def numbers(text):
    return [value(n) for n in NUMBER.findall(text)]


@cache
def rows_of(path):
    """Numbers of a file by the first cell of their row, those of all of it by None."""
    text = path.read_text()
    found = {None: numbers(text)}
    for line in text.splitlines():
        if line.startswith("|"):
            found.setdefault(cells(line)[0], []).extend(numbers(line))
    return found


def is_in(text, known):
    """Whether a number is among others, which may have more digits."""
    decimals = len(text.partition(".")[2])
    slack = 1e-9 if "e" in text else 0.500001 * 10**-decimals
    return any(abs(value(text) - other) <= slack for other in known)


@each(OURS)
def test_tables_of_results_name_their_file_and_hold_its_numbers(page):
    parts = paragraphs(without_fences(page))
    for table, after in zip(parts, [*parts[1:], ""], strict=True):
        if not is_table(table) or not is_of_results(table):
            continue
        assert after.startswith("Source: ") and "made" in after, table
        files = [path for path, _ in targets(page, after) if path.suffix != ".py"]
        assert files, after
        for first, *others in body(table):
            found = [rows_of(f).get(first, rows_of(f)[None]) for f in files]
            known = [number for numbers in found for number in numbers]
            for number in NUMBER.findall(" ".join(others)):
                assert is_in(number, known), f"{number} in the row of {first}"


@each(OURS)
def test_measurements_in_prose_name_a_file(page):
    """They link to results, or a source comes at the end of what they begin."""
    for section in re.split(r"^#+ ", without_fences(page), flags=re.MULTILINE):
        sourced = False
        for part in reversed(paragraphs(section)):
            sourced |= part.startswith("Source: [")
            told = SPAN.sub("", LINK.sub("", part))
            if MEASURED.search(told) and "benchmarks/results/" not in part:
                assert sourced, part


# Commands.


def commands(page):
    """Command lines in spans and blocks of code, as words."""
    text = page.read_text()
    blocks = [code for _, code in FENCE.findall(text)]
    blocks += re.findall(r"(?:^(?: {4}.*)?\n)+", without_fences(page), re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    spans = SPAN.findall(without_fences(page).replace("\n", " "))
    for line in [*lines, *spans]:
        found = re.match(r"\s*(?:\w+=\w+ )?((?:frog-triton|python -m|make) .*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


def check_ours(words):
    """Raise if the command line does not know words of it; capitals stand for any."""
    parser = argparse.ArgumentParser()
    cli.add_commands(parser, cli.COMMANDS, words)
    while subparsers := [
        a for a in parser._actions if isinstance(a, argparse._SubParsersAction)
    ]:
        if not words or words[0].startswith("-"):
            return
        parser, words = subparsers[0].choices[words[0]], words[1:]
    takes = [a for a in parser._actions if not a.option_strings]
    options, action = parser._option_string_actions, None
    for word in words:
        if word.startswith("--"):
            action = options[word]
            if action.nargs == 0:
                action = None
            continue
        taken = action or takes.pop(0)
        if taken.choices and not word.isupper():
            assert word in map(str, taken.choices), word
        if action is not None and action.nargs is None:
            action = None


@each([*OURS, *OTHERS])
def test_commands_exist(page):
    for program, *words in commands(page):
        if program == "frog-triton":
            check_ours(words)
        elif program == "make":
            made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert words[0] in made, words
        elif words[1].startswith("frog_triton."):
            assert importlib.util.find_spec(words[1]), words
            known = "".join(p.read_text() for p in (ROOT / "benchmarks").glob("*.py"))
            for word in words[2:]:
                assert not word.startswith("--") or f'"{word}"' in known, words


# Python.


@each(OURS)
@pytest.mark.filterwarnings("ignore:FROG preconditions")
def test_snippets_run(page, monkeypatch, tmp_path):
    """Those called python run, in order; those called py are compiled."""
    monkeypatch.setattr(layers, "_REGISTRY", dict(layers._REGISTRY))
    names = dict(
        torch=torch,
        nn=nn,
        frog_triton=frog_triton,
        model=nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)),
        loss_fn=nn.functional.cross_entropy,
        x=torch.randn(32, 16),
        y=torch.randint(0, 4, (32,)),
        path=tmp_path / "checkpoint.pt",
        __name__="snippet",
    )
    for kind, code in FENCE.findall(page.read_text()):
        if kind in ("python", "py"):
            compiled = compile(code, str(page), "exec")
            if kind == "python":
                exec(compiled, names)


# Options and messages.


def test_every_option_is_told_in_its_group():
    told = re.findall(r"^    Args: (\w+)\n((?:\s{8}.+\n|\n)+)", raw_doc(), re.M)
    groups = {name: re.findall(r"^ {8}(\w+): ", text, re.M) for name, text in told}
    assert [*groups] == ["Essentials", "Method", "Distributed", "Kernels"]
    options = [*inspect.signature(frog_triton.FROG).parameters]
    found = [option for group in groups.values() for option in group]
    assert sorted(found) == sorted(options)


def raw_doc():
    doc = frog_triton.FROG.__doc__
    return doc if "\n    Args: " in doc else doc.replace("\n", "\n    ")


def template(node):
    """The text of a string, or of an f-string, with … for what is put in; or None."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "…" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[^{}]*\}", "…", node.value)
    return None


@cache
def trees():
    folders = (ROOT / "frog_triton", ROOT / "kernels")
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return {path: ast.parse(path.read_text()) for path in paths}


def told_messages():
    page = ROOT / "docs/troubleshooting.md"
    return re.findall(r"^### `(.+)`$", page.read_text(), re.MULTILINE)


def agree(heading, text):
    """Whether a heading is part of a message; … is any text, at the ends none."""
    for part in heading.strip("… ").split("…"):
        _, found, text = text.partition(part)
        if not found:
            return False
    return True


def test_every_message_that_is_explained_exists():
    nodes = [node for tree in trees().values() for node in ast.walk(tree)]
    texts = {text for text in map(template, nodes) if text}
    for heading in told_messages():
        assert any(agree(heading, text) for text in texts), heading


ERRORS = ("ValueError", "TypeError", "RuntimeError", "OutOfMemoryError", "warn")


def test_every_message_that_users_meet_is_explained():
    told, missing = told_messages(), []
    for path, tree in trees().items():
        parts = path.relative_to(ROOT).parts
        if parts[0] == "kernels" or parts[1] in ("cli", "autotune"):
            continue  # they have bugs of ours among them, or say the remedy themselves
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            text = template(node.args[0])
            called = ast.unparse(node.func).rpartition(".")[2]
            if called not in ERRORS or text is None or not text.strip("…: "):
                continue
            if not any(agree(heading, text) for heading in told):
                missing.append(f"{'/'.join(parts)}: {text}")
    assert not missing, "to be explained in docs/troubleshooting.md:\n" + "\n".join(
        missing
    )
