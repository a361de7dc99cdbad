"""The trainer on two real processes, over the loopback interface."""

import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.lm import run_folder
from tests.trainer import worker

STEPS = 100
RUN = ["train", "--model", "micro", "--optimizer", "sophia_g", "--steps", str(STEPS)]
RUN += ["--batch-size", "8", "--curvature-batch", "8", "--log-interval", "1"]
RUN += ["--save-interval", "5", "--eval-interval", str(STEPS), "--eval-batches", "1"]
RUN += ["--mesh.data", "2", "--mesh.fsdp", "4"]
TIMEOUT = 10  # seconds without a heartbeat

pytestmark = pytest.mark.timeout(600)


def start_two(out: Path, cache: Path, *flags: str) -> list[subprocess.Popen]:
    """Two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = ["--hosts.coordinator", address, "--hosts.processes", "2"]
    hosts += ["--hosts.timeout", str(TIMEOUT), "--out", str(out), *flags]
    return [
        worker.start([*RUN, *hosts, "--hosts.process", str(i)], 4, cache, pause=0.04)
        for i in range(2)
    ]


def lines(out: Path) -> list[dict[str, float]]:
    path = out / "metrics.jsonl"
    return run_folder.read_metrics(path)["sophia_g"] if path.exists() else []


def wait_for_step(step: int, out: Path, workers: list[subprocess.Popen]) -> None:
    """Returns once the step is in the metrics; fails where it does not come."""
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        if time.monotonic() > deadline or any(worker.poll() is not None for worker in workers):
            for worker in workers:
                worker.kill()
            pytest.fail(f"No step {step}:\n" + "\n".join(finish(workers)[0]))
        time.sleep(0.02)


def finish(workers: list[subprocess.Popen]) -> tuple[list[str], list[int | None]]:
    """What they print, and their exit codes."""
    try:
        printed = [worker.communicate(timeout=200)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return printed, [worker.returncode for worker in workers]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of two processes, terminated, resumed, bereft of a process, and resumed to its end.

    Beside it, the same run of one process with eight devices.
    """
    folder = tmp_path_factory.mktemp("hosts")
    out, cache, seen = folder / "both", folder / "compiled", {}
    workers = start_two(out, cache)
    wait_for_step(5, out, workers)
    workers[1].send_signal(signal.SIGTERM)
    seen["terminated"] = finish(workers)
    seen["terminated at"] = len(lines(out))

    workers = start_two(out, cache, "--resume")
    wait_for_step(seen["terminated at"] + 6, out, workers)
    workers[1].kill()
    workers[1].wait()
    seen["killed at"] = len(lines(out))
    seen["bereft"] = finish(workers)
    seen["bereft at"] = len(lines(out))

    workers = start_two(out, cache, "--resume")
    workers.append(worker.start([*RUN, "--out", str(folder / "alone")], 8, cache))
    seen["finished"] = finish(workers)
    seen["losses"], seen["expected"] = (
        [line.get("loss", line.get("val_loss")) for line in lines(path)]
        for path in (out, folder / "alone")
    )
    return seen


def test_sigterm_to_one_of_two_processes_ends_both_with_a_checkpoint_of_the_same_step(history):
    printed, codes = history["terminated"]
    assert codes == [0, 0], "\n".join(printed)
    step = history["terminated at"]
    assert 5 < step < STEPS
    assert (
        f"Stopped after step {step}. Continue: python -m examples.lm train --resume" in printed[0]
    )
    assert f"Resuming after step {step}." in history["bereft"][0][0]


def test_a_killed_process_ends_the_other_before_another_step_with_a_way_to_go_on(history):
    printed, codes = history["bereft"]
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert "another one of the run died" in printed[0]
    assert "--resume --out" in printed[0]
    # It waits for the other one in its next step, and logs a step late.
    assert history["killed at"] <= history["bereft at"] <= history["killed at"] + 2


def test_two_processes_interrupted_twice_have_the_losses_of_one_that_was_not(history):
    printed, codes = history["finished"]
    assert codes == [0, 0, 0], "\n".join(printed)
    assert len(history["losses"]) == STEPS + 1
    np.testing.assert_allclose(history["losses"], history["expected"], rtol=1e-3)


def test_only_the_first_process_talks(history):
    printed, _ = history["finished"]
    assert "validation loss" in printed[0]
    of_xla = re.compile(r"[IWE]\d{4} |.*\[Gloo\]")  # it warns and informs in every process
    assert [line for line in printed[1].splitlines() if line and not of_xla.match(line)] == []
