"""Pictures: what is drawn is what was found, and names can be read."""

import itertools
import json
from pathlib import Path

import pytest

from frog_triton.benchmarks import estimate, pictures, plot
from frog_triton.benchmarks.train import report, survival_picture
from frog_triton.benchmarks.train.loop import Run
from frog_triton.kernels.gpu import GPUS

figures = pytest.importorskip("matplotlib.figure")
colours = pytest.importorskip("matplotlib.colors")

H200 = GPUS["h200"]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def drawn(monkeypatch):
    """Figures, in place of files."""
    found = []

    def keep(self, path):
        self.draw_without_rendering()
        found.append(self)

    monkeypatch.setattr(figures.Figure, "savefig", keep)
    return found


def texts(artist):
    return [text.get_text() for text in artist.texts if text.get_text()]


def boxes(panel):
    return [t.get_window_extent() for t in panel.texts if t.get_text()]


def test_names_lie_beside_each_other():
    """Where points lie in a heap, and where they lie alone."""
    figure = figures.Figure(figsize=(7, 5))
    panel = figure.subplots()
    heap = [(1 + i / 50, 1 + i / 70) for i in range(12)]
    places = [*heap, (5, 5), (9.9, 9.9), (0.1, 5)]
    panel.set_xlim(0, 10)
    panel.set_ylim(0, 10)
    figure.draw_without_rendering()
    names = [f"kernel {i}: a longer name" for i in range(len(places))]
    pictures.label_points(panel, places, names)
    assert sorted(texts(panel)) == sorted(names)
    for a, b in itertools.combinations(boxes(panel), 2):
        assert not a.overlaps(b)
    inside = panel.get_window_extent()
    for box in boxes(panel):
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1


def points(time_us):
    names = ("gram", "cg", "update")
    found = [plot.Point(n, 10 ** (9 + i), 10**7, time_us) for i, n in enumerate(names)]
    return [*found, plot.Point("largest", 0, 10**6, time_us)]


@pytest.mark.parametrize(
    ("times", "time_us", "label"),
    [
        (plot.MEASURED, 200.0, "measured"),
        (plot.ESTIMATED, 200.0, "estimated from machine code, never measured"),
        (plot.MEASURED, None, "at most (nothing was timed)"),
    ],
)
def test_roofline(drawn, tmp_path, times, time_us, label):
    models = [plot.Roofline(name, points(time_us)) for name in ("a", "b", "c")]
    empty = plot.Roofline("d", [])
    path = tmp_path / "roof.png"
    plot.draw_rooflines(path, "kernels", [*models, empty], H200, times)
    (figure,) = drawn
    (key,) = figure.legends
    told = [text.get_text() for text in key.texts]
    assert told[-1] == label and all("datasheet" in text for text in told[:-1])
    *panels, spare = figure.axes
    assert [p.get_title(loc="left").split("\n")[0] for p in panels] == ["a", "b", "c"]
    assert not spare.axison
    for panel in panels:
        assert panel.get_xscale() == panel.get_yscale() == "log"
        assert "not shown: largest" in panel.get_title(loc="left")
        _, reached = panel.lines[-1].get_data()
        for rate, point in zip(reached, points(time_us), strict=False):
            roof = min(point.intensity * H200.bandwidth, H200.bf16)
            assert rate <= roof / 1e12
            if time_us:
                assert rate == pytest.approx(point.operations / 200.0 / 1e6)
        assert ("estimated" in panel.get_ylabel()) == (times == plot.ESTIMATED)
    plot.draw_rooflines(path, "nothing", [empty], H200, times)
    assert len(drawn) == 1


def test_speedups_stand_beside_their_roofline(drawn, tmp_path):
    models = [
        plot.Roofline("a", points(5.0), [("gram", 2.0), ("cg", 0.5)]),
        plot.Roofline("b", points(5.0)),
    ]
    plot.draw_rooflines(tmp_path / "a.png", "kernels", models, H200, plot.MEASURED)
    _, bars, _, none = drawn[0].axes
    assert [bar.get_width() for bar in bars.patches] == [2.0, 0.5]
    assert not none.axison


def test_an_estimate_becomes_a_panel_for_each_step():
    kernel = {"kernel": "_gram_kernel", "operations": 9, "bytes": 3, "time_us": 2.0}
    forward = kernel | {"kernel": "_primal_forward_kernel"}
    entry = {"model": "m", "estimate_us": 12.0, "kernels": [kernel, forward]}
    steps = [entry | {"samples": n} for n in (64, 128)]
    first, second = estimate.rooflines(steps)
    assert first.title == "m, N = 64: 12 µs, estimated" and "N = 128" in second.title
    names = [point.name for point in first.points]
    assert names == ["gram", "primal_forward"]
    images = [entry | {"geometry": name} for name in ("stem", "body")]
    (panel,) = estimate.rooflines(images)
    assert panel.title == "m"
    names = [point.name for point in panel.points]
    assert names == ["primal_forward stem", "primal_forward body"]


def test_shares(drawn, tmp_path):
    layers = [("12 x qkv", 0.5, 0.75), ("beside the layers", 0.0, 0.25)]
    left = [("embeddings", 0.4999), ("norms", 0.0001)]
    plot.draw_shares(tmp_path / "a.png", "model", layers, left, "of 9 µs")
    held, cost = drawn[0].axes
    assert [bar.get_width() for bar in held.patches] == [0.5, 0.0, 0.4999, 0.0001]
    assert [bar.get_width() for bar in cost.patches] == [0.75, 0.25]
    assert texts(held) == ["50.0%", "50.0%", "<0.1%"]
    names = [label.get_text() for label in held.get_yticklabels()]
    assert names == ["12 x qkv", "beside the layers", "embeddings", "norms"]
    assert "nothing was timed" in cost.get_title(loc="left")
    plot.draw_shares(tmp_path / "b.png", "model", [], left, "of 0 µs")
    assert not drawn[1].axes[1].get_visible()


def test_survivors(drawn, tmp_path):
    path = ROOT / "benchmarks" / "results" / "cpu" / "stability" / "stability.json"
    entries = json.loads(path.read_text())["results"]
    survival_picture.draw(tmp_path / "a.png", entries)
    (panel,) = drawn[0].axes
    peers = list(dict.fromkeys(e["peer"] for e in entries))
    rates = sorted({e["rate"] for e in entries})
    trainings = {(e["case"], e["schedule"]) for e in entries}
    cells = (len(trainings) + 1) * len(peers) * len(rates)
    assert len(panel.patches) == cells
    assert set(peers) <= set(texts(panel))
    for peer, rate in itertools.product(peers, rates):
        mine = [e for e in entries if (e["peer"], e["rate"]) == (peer, rate)]
        assert f"{sum(e['survived'] for e in mine)}/{len(mine)}" in texts(panel)
    # An error is no survival.
    failed = [{k: entries[0][k] for k in ("peer", "rate", "case", "schedule")}]
    survival_picture.draw(tmp_path / "b.png", failed)
    assert texts(drawn[1].axes[0]) == ["0/1", failed[0]["peer"]]


def test_shades_are_of_none_some_and_all():
    shades = [survival_picture._shade(i / 12) for i in range(13)]
    assert shades == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, -1]


def runs():
    found = []
    for number in range(10):
        for seed in range(3):
            values = [0.1 + number / 50 + seed / 100, 0.5 + seed / 10]
            series = ([10, 20], values, [1.0 + seed, 2.0 + seed])
            found.append(Run(f"peer {number}", 0.1, seed, *series))
    found[0].diverged = found[3].diverged = found[4].diverged = True
    found[5].diverged = True  # with it, all of the second optimizer
    return found


def test_curves_are_medians_with_a_band_and_alike_in_both_panels(drawn, tmp_path):
    report.plot(tmp_path / "curves.png", "data", runs())
    steps, seconds = drawn[0].axes
    looks = []
    for panel in (steps, seconds):
        assert len(panel.lines) == len(panel.collections) == 9
        looks.append(
            {a.get_label(): (a.get_color(), a.get_linestyle()) for a in panel.lines}
        )
        for line, band in zip(panel.lines, panel.collections, strict=True):
            assert colours.same_color(line.get_color(), band.get_facecolor()[:, :3])
    assert looks[0] == looks[1] and len(set(looks[0].values())) == 9
    last = steps.lines[-1]
    assert list(last.get_ydata()) == pytest.approx([0.1 + 9 / 50 + 0.01, 0.6])
    assert list(last.get_xdata()) == [10, 20]
    assert list(seconds.lines[-1].get_xdata()) == [2.0, 3.0]
    _, low, _, high = steps.collections[-1].get_datalim(steps.transData).extents
    assert (low, high) == pytest.approx((0.1 + 9 / 50, 0.7))


def test_nothing_but_failures_is_a_picture_too(drawn, tmp_path):
    failed = runs()[3:6]
    report.plot(tmp_path / "curves.png", "data", failed)
    assert len(drawn) == 1
