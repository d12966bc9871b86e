"""How much of a model is preconditioned: in a line, in a table, with totals.

Sizes are worked out by hand, from the published architectures.
"""

import io
import subprocess
import sys

import pytest
from torch import nn

from frog_triton import FROG
from frog_triton.model.coverage import magnitude, percent
from frog_triton.model.table import Route, RoutingTable


def rest(name, shape, kind):
    return Route(name, shape, "adamw", f"no adapter for {kind}")


def gpt2(depth=12, width=768, symbols=50257, context=1024):
    """GPT-2 small with tied weights, and its LayerNorms."""
    table = RoutingTable()
    table.append(rest("wte.weight", (symbols, width), "Embedding"))
    table.append(rest("wpe.weight", (context, width), "Embedding"))
    sizes = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for i in range(depth):
        for norm in ("ln_1", "ln_2"):
            for leaf in ("weight", "bias"):
                table.append(rest(f"h.{i}.{norm}.{leaf}", (width,), "LayerNorm"))
        for name, shape in sizes.items():
            table.append(Route(f"h.{i}.{name}.weight", shape, "frog", "Conv1D"))
            table.append(Route(f"h.{i}.{name}.bias", shape[1:], "frog", "Conv1D"))
    for leaf in ("weight", "bias"):
        table.append(rest(f"ln_f.{leaf}", (width,), "LayerNorm"))
    return table


def resnet18(classes=1000):
    """ResNet-18 as in torchvision; its last layer goes to the fallback."""
    table = RoutingTable()

    def conv(name, norm, *shape):
        table.append(Route(f"{name}.weight", shape, "frog", "Conv2d"))
        for leaf in ("weight", "bias"):
            table.append(rest(f"{norm}.{leaf}", shape[:1], "BatchNorm2d"))

    conv("conv1", "bn1", 64, 3, 7, 7)
    for stage, wide in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            first = wide // 2 if block == 0 and stage > 1 else wide
            conv(f"{name}.conv1", f"{name}.bn1", wide, first, 3, 3)
            conv(f"{name}.conv2", f"{name}.bn2", wide, wide, 3, 3)
            if first != wide:
                down = f"{name}.downsample"
                conv(f"{down}.0", f"{down}.1", wide, first, 1, 1)
    table.append(Route("fc.weight", (classes, 512), "adamw", "output layer"))
    table.append(Route("fc.bias", (classes,), "adamw", "output layer"))
    return table


def words(text):
    """The cells of every line of a table: they are two spaces apart, or more."""
    lines = text.splitlines()
    return [[cell.strip() for cell in li.split("  ") if cell.strip()] for li in lines]


def test_gpt2_in_a_line():
    coverage = gpt2().coverage
    # A block: 768x2304 + 2304, 768x768 + 768, 768x3072 + 3072, 3072x768 + 768.
    block = 1_771_776 + 590_592 + 2_362_368 + 2_360_064
    assert coverage.parameters == 12 * block == 85_017_600
    assert coverage.all_parameters == 124_439_808  # what GPT-2 small is known to have
    assert (coverage.tensors, coverage.all_tensors) == (96, 148)
    assert not coverage.low
    embeddings, norms = coverage.left_out
    assert embeddings.names == ("wte.weight", "wpe.weight")
    assert embeddings.parameters == 51_281 * 768
    assert norms.parameters == 25 * 2 * 768 and len(norms.names) == 50
    assert str(coverage) == (
        "FROG preconditions 96 of 148 tensors, 68.3% of 124.4M parameters; left to "
        "AdamW: embeddings 31.6% (wte.weight, ...), norms <0.1%"
    )


def test_resnet_in_a_line():
    coverage = resnet18().coverage
    assert coverage.all_parameters == 11_689_512  # torchvision's own count
    assert coverage.parameters == 11_689_512 - 513_000 - 9_600
    # 513,000 / 11,689,512 = 4.389%, 11,166,912 / 11,689,512 = 95.529%
    assert str(coverage) == (
        "FROG preconditions 20 of 62 tensors, 95.5% of 11.7M parameters; left to "
        "AdamW: output layer 4.4% (fc.weight, ...), norms <0.1%"
    )


def test_a_model_of_embeddings_is_low_and_the_line_says_why():
    table = gpt2(depth=2, width=8, symbols=1000, context=16)
    # 1016 x 8 in embeddings; 2 x (8x24+24 + 8x8+8 + 8x32+32 + 32x8+8) = 2 x 840.
    coverage = table.coverage
    assert coverage.low and coverage.parameters == 1680
    assert coverage.all_parameters == 1680 + 8128 + 5 * 2 * 8
    assert "embeddings 82.2% (wte.weight, ...), norms 0.8%" in str(coverage)


@pytest.mark.parametrize(("covered", "low"), [(49, True), (50, False), (51, False)])
def test_low_is_below_half(covered, low):
    table = RoutingTable(
        [
            Route("a", (covered,), "frog", "Linear"),
            Route("b", (100 - covered,), "sgd", "output layer"),
        ]
    )
    assert table.coverage.low is low
    assert "left to SGD: output layer" in str(table.coverage)


def test_frozen_and_not_optimized_count_apart():
    table = RoutingTable(
        [
            Route("a.weight", (10, 3), "frog", "Linear; gram, N = 6"),
            Route("b.weight", (10, 3), "frog", "Linear; rows 0-4 here; frozen"),
            Route("c.weight", (2, 5), "adamw", "no adapter for FrozenBatchNorm2d"),
            Route("d.weight", (7,), "-", "not in params"),
            Route("e.weight", (2_000_000,), "-", "not in params; frozen"),
            Route("f.weight", (5,), "sgd", "excluded by 'frozen*'"),
        ]
    )
    found = table.coverage
    assert (found.tensors, found.all_tensors) == (1, 3)
    assert (found.parameters, found.all_parameters) == (30, 45)
    assert (found.frozen, found.not_optimized) == (2_000_030, 7)
    assert str(found) == (
        "FROG preconditions 1 of 3 tensors, 66.7% of 45 parameters; left to AdamW and "
        "SGD: norms 22.2% (c.weight), excluded by 'frozen*' 11.1% (f.weight); 2.0M "
        "frozen; 7 not in params"
    )
    totals = [line.cells() for line in table.totals()]
    assert totals == [
        ("total", "", "1", "30", "frog", "66.7%"),
        ("total", "", "2", "2,000,030", "frozen", ""),
        ("total", "", "1", "10", "adamw", "22.2%"),
        ("total", "", "1", "7", "-", ""),
        ("total", "", "1", "5", "sgd", "11.1%"),
        ("total", "", "6", "2,000,082", "", ""),
    ]


def test_all_none_and_nothing():
    own = Route("a.weight", (2, 2), "frog", "Linear")
    bias = Route("a.bias", (2,), "frog", "Linear")
    assert str(RoutingTable([own, bias]).coverage) == (
        "FROG preconditions all of 2 tensors, 100% of 6 parameters"
    )
    norm = [rest("n.weight", (2,), "RMSNorm"), rest("n.bias", (2,), "RMSNorm")]
    found = RoutingTable(norm).coverage
    assert found.low and str(found) == (
        "FROG preconditions none of 2 tensors, 0% of 4 parameters; left to AdamW: "
        "norms 100% (n.weight, ...)"
    )
    nothing = RoutingTable([Route("a.weight", (4,), "frog", "Linear; frozen")]).coverage
    assert not nothing.low and nothing.share == 0
    assert str(nothing) == (
        "FROG preconditions nothing: no parameter is trainable; 4 frozen"
    )
    assert "no parameter is trainable" in str(RoutingTable())


def test_a_line_stays_short():
    long = "a_rather_long_name_of_a_module.and_of_one_in_it.number_{}.weight"
    sizes = (40, 30, 20, 10)
    table = RoutingTable(
        [rest(long.format(i), (n,), f"Kind{i}") for i, n in enumerate(sizes)]
    )
    line = str(table.coverage)
    assert len(line) <= 200
    assert line.endswith(f"Kind0 40.0% ({long.format(0)}), other 60.0%")
    short = RoutingTable([rest(str(i), (n,), f"Kind{i}") for i, n in enumerate(sizes)])
    assert "Kind2 20.0% (2), other 10.0%" in str(short.coverage)


def test_numbers():
    counts = (0, 9_600, 999_999, 1_000_000, 124_439_808, 7_000_000_000)
    texts = ["0", "9,600", "999,999", "1.0M", "124.4M", "7.0B"]
    assert [magnitude(count) for count in counts] == texts
    parts = (0, 1, 2_000, 99_949, 99_999, 100_000)
    texts = ["0%", "<0.1%", "2.0%", ">99.9%", ">99.9%", "100%"]
    assert [percent(part, 100_000) for part in parts] == texts


def test_gpt2_in_groups():
    table = gpt2()
    first, _, _, *lines = words(str(table))
    assert first == [str(table.coverage)]
    rules = [i for i, line in enumerate(lines) if line[0].startswith("---")]
    assert lines[: rules[0]] == [
        ["wte.weight, wpe.weight", "various", "2", "39,383,808", "adamw"]
        + ["no adapter for Embedding"],
        ["h.*.ln_*, ln_f (25 modules)", "768", "50", "38,400", "adamw"]
        + ["no adapter for LayerNorm"],
        *(
            [f"h.*.{name}", shape, "12", f"{12 * size:,}", "frog", "Conv1D"]
            for name, shape, size in (
                ("attn.c_attn.weight", "768x2304", 768 * 2304),
                ("attn.c_attn.bias", "2304", 2304),
                ("attn.c_proj.weight", "768x768", 768 * 768),
                ("attn.c_proj.bias", "768", 768),
                ("mlp.c_fc.weight", "768x3072", 768 * 3072),
                ("mlp.c_fc.bias", "3072", 3072),
                ("mlp.c_proj.weight", "3072x768", 3072 * 768),
                ("mlp.c_proj.bias", "768", 768),
            )
        ),
    ]
    assert lines[rules[0] + 1 :] == [
        ["total", "96", "85,017,600", "frog", "68.3%"],
        ["total", "52", "39,422,208", "adamw", "31.7%"],
        ["total", "148", "124,439,808"],
    ]


def test_resnet_in_groups():
    table = resnet18()
    table.note = "rank 0 of 2"
    text = str(table)
    lines = [line.cells() for line in table.lines()]
    norms = ("bn1, layer*.*.bn*, layer*.0.downsample.1 (20 modules)", "various", "40")
    assert lines == [
        ("conv1.weight", "64x3x7x7", "1", "9,408", "frog", "Conv2d"),
        (*norms, "9,600", "adamw", "no adapter for BatchNorm2d"),
        # 16 kernels of 3x3; over four shapes, so in one line.
        ("layer*.*.conv*.weight", "various", "16", "10,985,472", "frog", "Conv2d"),
        # 128x64, 256x128 and 512x256.
        *(
            (f"layer{i}.0.downsample.0.weight", shape, "1", size, "frog", "Conv2d")
            for i, shape, size in (
                (2, "128x64x1x1", "8,192"),
                (3, "256x128x1x1", "32,768"),
                (4, "512x256x1x1", "131,072"),
            )
        ),
        ("fc.weight, fc.bias", "various", "2", "513,000", "adamw", "output layer"),
    ]
    assert text.splitlines()[-1] == "rank 0 of 2"
    assert words(text)[-2] == ["total", "62", "11,689,512"]


def test_rows_stay_and_all_can_be_printed():
    table = resnet18()
    table.note = "rank 0 of 2"
    full = table.full().splitlines()
    assert len(table) == 62 and len(full) == 62 + 3
    assert words(full[2])[0] == ["conv1.weight", "64x3x7x7", "frog", "Conv2d"]
    assert full[-1] == "rank 0 of 2"
    assert table[0].name in table.updated_by("frog") and len(str(table)) < 2000


def test_notes_that_differ_do_not_part_layers():
    def lines(notes):
        routes = (
            Route(f"{i}.weight", (2, 2), "frog", "; ".join(["Linear", *note]))
            for i, note in enumerate(notes)
        )
        return [(line.names, line.reason) for line in RoutingTable(routes).lines()]

    gram, primal = ["gram, N = 6"], ["primal, N = 6"]
    assert lines([gram, gram]) == [("*.weight", "Linear; gram, N = 6")]
    both = "Linear; gram, N = 6 (2), primal, N = 6 (1)"
    assert lines([gram, primal, gram]) == [("*.weight", both)]
    assert lines([gram, []]) == [
        ("*.weight", "Linear; gram, N = 6 (1), nothing yet (1)")
    ]
    many = [[f"rows {i}-{i} here"] for i in range(3)]
    assert lines(many) == [("*.weight", "Linear; various")]
    assert lines([gram, [*gram, "frozen"]]) == [
        ("0.weight", "Linear; gram, N = 6"),
        ("1.weight", "Linear; gram, N = 6; frozen"),
    ]


def test_names_with_numbers_that_agree_keep_them():
    names = [f"block.{i}.mlp.{j}.weight" for i in range(3) for j in (0, 2)]
    shapes = [(32, 8), (8, 32)] * 3
    table = RoutingTable(
        Route(name, shape, "frog", "Linear")
        for name, shape in zip(names, shapes, strict=True)
    )
    found = [(line.names, line.shape, line.tensors) for line in table.lines()]
    assert found == [
        ("block.*.mlp.0.weight", "32x8", 3),
        ("block.*.mlp.2.weight", "8x32", 3),
    ]


def test_many_names_are_cut():
    table = RoutingTable(
        rest(f"{letter * 20}.{leaf}", (3,), "LayerNorm")
        for letter in "abcde"
        for leaf in ("weight", "bias")
    )
    (line,) = table.lines()
    shown = ", ".join(letter * 20 for letter in "abc")
    assert line.names == f"{shown}, ... (5 modules)"
    biases = RoutingTable(
        Route(f"{i}.bias", (3,), "adamw", "of another dtype than its weight")
        for i in range(4)
    )
    assert [line.names for line in biases.lines()] == ["*.bias"]
    tokens = RoutingTable(rest(name, (3,), "ViT") for name in ("cls_token", "pos"))
    assert [line.names for line in tokens.lines()] == ["cls_token, pos"]


def test_describe_is_headed_by_the_coverage():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.Linear(8, 2),
    )
    net[3].bias.requires_grad_(False)
    printed = io.StringIO()
    table = FROG(net).describe(file=printed)
    # 108 of the kernel, 288 of the first matrix; its bias is frozen.
    first, *_, total = printed.getvalue().splitlines()
    assert first == (
        "FROG preconditions 2 of 6 tensors, 93.8% of 422 parameters; left to AdamW: "
        "output layer 4.3% (4.weight, ...), norms 1.9% (1.weight, ...); 8 frozen"
    )
    assert words(total) == [["total", "7", "430"]] and len(table) == 7


TELLS = """
import logging, sys
from frog_triton.model.coverage import tell

log = logging.getLogger("frog_triton")

def case(name):
    print(name + ":", file=sys.stderr, end=" ")
    tell("the text")
    print(file=sys.stderr)

case("untouched")
log.setLevel(logging.WARNING)
case("a higher level")
log.setLevel(logging.INFO)
case("a level that wants it")
log.setLevel(logging.NOTSET)
logging.disable(logging.INFO)
case("disabled")
logging.disable(logging.NOTSET)
null = logging.NullHandler()
log.addHandler(null)
case("a handler that drops")
log.removeHandler(null)
case("untouched again")
logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
case("set up for warnings")
logging.getLogger().setLevel(logging.INFO)
case("set up")
log.setLevel(logging.WARNING)
case("set up, a higher level")
"""


def test_telling_and_silencing():
    done = subprocess.run(
        [sys.executable, "-c", TELLS], capture_output=True, text=True, check=True
    )
    told = dict(
        line.split(": ") for line in done.stderr.splitlines() if line.count(": ") == 1
    )
    assert not done.stdout and told == {
        "untouched": "the text",
        "a higher level": "",
        "a level that wants it": "the text",
        "disabled": "",
        "a handler that drops": "",
        "untouched again": "the text",
        "set up for warnings": "",
        "set up": "frog_triton INFO the text",
        "set up, a higher level": "",
    }
