"""Crash drills: runs that are killed or terminated again and again, and what their losses are.

Minutes long, so `python -m pytest -m stress tests/trainer/test_drills.py` alone runs them; single
crashes are in `test_checkpoint` and `test_distributed`. Last results: docs/reliability.md.
"""

import random
import shlex
import signal
import socket
import sys
import time

import pytest

from examples.lm import run_folder
from tests.trainer import worker

STEPS = 60
RUN = shlex.split(
    f"train --model micro --optimizer sophia_g --steps {STEPS} --batch-size 8 --curvature-batch 8 "
    f"--log-interval 1 --save-interval 3 --eval-interval {STEPS} --eval-batches 1 "
    "--hosts.timeout 60"
)
PAUSE = 0.02  # seconds a step
CRASHES = 5  # of each run

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def drill(request, tmp_path_factory):
    """Processes, their compiled step, and the losses of the run that nothing interrupted."""
    folder, processes = tmp_path_factory.mktemp("drill"), request.param
    started = start(folder / "calm", folder / "compiled", processes)
    finish(started)
    return folder, processes, losses(folder / "calm")


def start(out, cache, processes, *flags, late=0.0):
    """The run in so many processes, of eight devices together; the last compiles late."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [*RUN, "--mesh.fsdp", "4", "--out", str(out), *flags]
    if processes == 1:
        return [worker.start(arguments, 8, cache, pause=PAUSE)]
    arguments += ["--hosts.coordinator", address, "--hosts.processes", str(processes)]
    return [
        worker.start(
            [*arguments, "--hosts.process", str(i)],
            8 // processes,
            cache,
            pause=PAUSE,
            late=late if i == processes - 1 else 0.0,
        )
        for i in range(processes)
    ]


def finish(workers):
    """Waits for a run that has to end well."""
    printed = [process.communicate(timeout=300)[0] for process in workers]
    assert [process.returncode for process in workers] == [0] * len(workers), "\n".join(printed)
    return printed


def losses(out):
    """Of every line: the step, the training loss and the validation loss."""
    lines = run_folder.read_metrics(out / "metrics.jsonl")["sophia_g"]
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in lines]


def wait(condition, workers):
    deadline = time.monotonic() + 200
    while not condition() and all(process.poll() is None for process in workers):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_saving(out):
    return any("tmp" in path.name for path in (out / "checkpoints").glob("*"))


def interrupt(out, workers, number, rng):
    """Sends the signal at a random moment, every second time during a save; whether then."""
    seen = (out / "metrics.jsonl").read_bytes() if (out / "metrics.jsonl").exists() else b""

    def has_moved():
        path = out / "metrics.jsonl"
        return path.exists() and path.read_bytes() != seen

    wait(has_moved, workers)
    time.sleep(rng.uniform(0, 12 * PAUSE))
    in_save = rng.random() < 0.5
    if in_save:
        wait(lambda: is_saving(out), workers)
        time.sleep(rng.uniform(0, 0.02))
    victims = workers if number == signal.SIGKILL else [rng.choice(workers)]
    for process in victims:
        process.send_signal(number)
    printed = [process.communicate(timeout=300)[0] for process in workers]
    codes = [process.returncode for process in workers]
    expected = {-signal.SIGKILL} if number == signal.SIGKILL else {0}
    assert set(codes) == expected, "\n".join([str(codes), *printed])
    return in_save


def test_a_process_waits_for_another_one_that_compiles_forty_seconds_longer(tmp_path):
    """Gloo waits for 30."""
    finish(start(tmp_path / "run", tmp_path / "compiled", 2, late=40.0))


@pytest.mark.parametrize(
    "number, runs", [(signal.SIGKILL, 6), (signal.SIGTERM, 2)], ids=["SIGKILL", "SIGTERM"]
)
def test_interrupted_runs_have_the_losses_of_one_that_was_not_to_the_bit(
    number, runs, drill, capsys
):
    folder, processes, expected = drill
    rng = random.Random(0)
    crashes = in_saves = 0
    started = time.monotonic()
    for index in range(runs):
        out, flags = folder / f"{number.name}-{index}", ()
        for _ in range(CRASHES):
            workers = start(out, folder / "compiled", processes, *flags)
            in_save = interrupt(out, workers, number, rng)
            crashes, in_saves, flags = crashes + 1, in_saves + in_save, ("--resume",)
        finish(start(out, folder / "compiled", processes, *flags))
        assert losses(out) == expected
    with capsys.disabled():
        sys.stdout.write(
            f"\n{number.name}, {processes} process(es): {crashes} crashes in {runs} runs, "
            f"{in_saves} of them during a save; {runs} of {runs} with the calm run's losses; "
            f"{time.monotonic() - started:.0f} s\n"
        )
