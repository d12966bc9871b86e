"""The examples run, learn, and resume from their own checkpoints."""

import importlib.util
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def _main(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        # A warning of ours would mean that the framework runs another module than the
        # one with the hooks, or in eval mode.
        warnings.filterwarnings("error", message=".*FROG")
        warnings.filterwarnings("error", message=".*has a gradient but no samples")
        return module.main(*arguments)


def test_plain():
    assert _main("plain") > 0.9  # measured 0.98


def test_hugging_face_trainer():
    pytest.importorskip("transformers")
    assert _main("huggingface") < 0.4  # chance is 0.69; measured 0.04


def test_lightning():
    pytest.importorskip("lightning")
    assert _main("lightning_module") < 0.25  # a constant gives 0.45; measured 0.03


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _main("tensorboard_logging", str(tmp_path), 21)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "cg_residual/0" in events.Tags()["scalars"]
    looks = events.Scalars("update_norm_mean/0")
    assert [e.step for e in looks] == [0, 10, 20]
    assert all(e.value > 0 for e in looks)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_short(path):
    assert len(path.read_text().splitlines()) < 60
