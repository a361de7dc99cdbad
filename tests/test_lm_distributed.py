"""The trainer on two real processes, over the loopback interface."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


def start(out: Path, devices: int, *arguments: str) -> subprocess.Popen:
    command = ["-m", "examples.lm", "train", "--optimizer", "sophia_g", "--steps", "6"]
    command += ["--batch-size", "8", "--eval-interval", "6", "--eval-batches", "2"]
    command += ["--log-interval", "1", "--mesh.data", "-1", "--mesh.fsdp", "2"]
    return subprocess.Popen(
        [sys.executable, *command, "--out", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines]


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both, alone = tmp_path / "both", tmp_path / "alone"
    hosts = ["--hosts.coordinator", address, "--hosts.processes", "2", "--hosts.process"]
    workers = [start(both, 2, *hosts, "0"), start(both, 2, *hosts, "1"), start(alone, 4)]
    try:
        printed = [worker.communicate(timeout=280)[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0, 0], "\n".join(printed)
    finally:
        for worker in workers:
            worker.kill()
    assert len(losses(both)) == 6 + 1
    np.testing.assert_allclose(losses(both), losses(alone), rtol=1e-4)
    assert "validation loss" in printed[0]
    assert "validation loss" not in printed[1]  # only the first process talks
