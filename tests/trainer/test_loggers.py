"""What a run leaves for people to look at: pictures, a profile, Weights & Biases."""

import gzip
import json
import math
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from examples.lm import plot, report
from tests.trainer import worker
from tests.trainer.worker import RUN

# --- pictures -------------------------------------------------------------------------------------


def curve(start, end):
    training = [{"step": s, "loss": end + (start - end) * math.exp(-s / 9)} for s in range(100)]
    validation = [{"step": s, "val_loss": end + 0.1} for s in range(10, 110, 10)]
    return training + validation


def test_the_losses_plot_shows_all_of_every_curve(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    plot.losses({"a": curve(9.0, 2.0), "b": curve(5.5, 1.5)}, tmp_path / "loss.png", 2.5)
    whole, end = figures[0].axes
    (left, right), (low, high) = whole.get_xlim(), whole.get_ylim()
    assert len(whole.lines) == 5
    for line in whole.lines:
        assert low <= min(line.get_ydata()) <= max(line.get_ydata()) <= high
    assert left <= 0 < 100 <= right
    assert 40 < end.get_xlim()[0] < 60
    assert [len(line.get_xdata()) for line in end.lines] == [10, 10]


@pytest.mark.parametrize(
    "records", [[], [{"step": 0, "loss": 5.0}], [{"step": 1, "loss": math.nan}]]
)
def test_a_run_of_hardly_any_points_is_drawn_too(records, tmp_path):
    plot.losses({"a": records}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.get_fignums()


def test_a_gamma_that_does_not_change_is_not_drawn(tmp_path):
    def runs(*gammas):
        return {"a": [{"step": i, "gamma": g} for i, g in enumerate(gammas)]}

    plot.curvature(runs(0.05, 0.05), tmp_path)
    assert list(tmp_path.iterdir()) == []
    plot.curvature(runs(0.05, 0.06), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gamma.png"]


# --- the profiler ---------------------------------------------------------------------------------


def test_a_run_that_ends_before_its_profile_says_so(tmp_path, capsys):
    profile = report.Profiler(tmp_path, 10)
    profile.before(0)
    profile.close()
    assert "No step was profiled: it begins after 2 steps." in capsys.readouterr().out


def test_a_profile_holds_as_many_steps_as_asked_for(tmp_path, compiled):
    out = tmp_path / "run"
    assert worker.run([*RUN, "--profile", "3", "--out", str(out)]) == 0
    (trace,) = out.glob("profile/sophia_g/**/perfetto_trace.json.gz")
    assert list(out.glob("profile/sophia_g/plugins/profile/*/*.xplane.pb"))  # TensorBoard's
    events = json.loads(gzip.decompress(trace.read_bytes()))
    events = events["traceEvents"] if isinstance(events, dict) else events
    steps = {e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})}
    assert {int(step) for step in steps} == {2, 3, 4}


# --- Weights & Biases -----------------------------------------------------------------------------


@pytest.fixture
def service(monkeypatch):
    """A stand-in for the package, which remembers what it is told."""
    told = SimpleNamespace(started=[], lines=[], finished=0)

    def finish():
        told.finished += 1

    def init(**settings):
        told.started.append(settings)
        number = settings["id"] or f"run-{len(told.started)}"
        return SimpleNamespace(
            id=number, finish=finish, log=lambda line, step: told.lines.append((step, line))
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return told


def test_wandb_gets_every_line_and_a_resumed_run_goes_on_there(service, tmp_path, compiled):
    out = tmp_path / "run"
    flags = [*RUN, "--wandb", "my-project", "--out", str(out)]
    assert worker.run(flags, stop_after=3) == 0
    (first,) = service.started
    assert (first["project"], first["name"]) == ("my-project", "run-sophia_g")
    assert first["config"]["optimizer"] == "sophia_g"
    assert worker.run(["train", "--resume", "--out", str(out)]) == 0
    assert [(s["id"], s["resume"]) for s in service.started] == [(None, None), ("run-1", "allow")]
    assert service.finished == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    sent = [{"step": step, **values} for step, values in service.lines]
    assert sent == [{k: v for k, v in line.items() if k != "run"} for line in lines]


def test_wandb_that_does_not_start_is_one_sentence(
    service, tmp_path, compiled, capsys, monkeypatch
):
    def refuse(**settings):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    assert worker.run([*RUN, "--wandb", "p", "--out", str(tmp_path / "run")]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "RuntimeError: no API key" in message
    assert "wandb login" in message


def test_without_the_flags_there_is_no_profile_and_wandb_is_not_imported(
    tmp_path, compiled, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    assert worker.run([*RUN, "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "profile").exists()
