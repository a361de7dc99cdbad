"""Real processes that talk over `jax.distributed` on the loopback interface."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def start(
    address: str, processes: int, process: int, devices: int, output: Path
) -> subprocess.Popen:
    arguments = [address, str(processes), str(process), str(devices), str(output)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.library.distributed_worker", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_have_the_params_and_the_state_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    outputs = [tmp_path / f"{name}.npz" for name in ("first", "second", "alone")]
    workers = [
        start(address, 2, 0, 2, outputs[0]),
        start(address, 2, 1, 2, outputs[1]),
        start(address, 1, 0, 4, outputs[2]),
    ]
    try:
        for worker in workers:
            printed, _ = worker.communicate(timeout=240)
            assert worker.returncode == 0, printed
    finally:
        for worker in workers:
            worker.kill()
    first, second, alone = ({**np.load(output)} for output in outputs)
    assert first.keys() == second.keys() == alone.keys()
    assert len(first) == 2 + 5 + 2 + 2  # params, scalars, m, h
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert int(alone["[1][0].refreshes"]) == 3
