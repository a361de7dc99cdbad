"""The speed that a run logs: of its steps alone, on devices of every kind, in simulated time."""

from types import SimpleNamespace

import numpy as np
import pytest

from examples.lm import data, loop, report, timing
from examples.lm.config import TrainConfig
from examples.lm.run import resolve
from tests.trainer import worker

STEP, REFRESH, COMPILE, PAUSE = 1.0, 5.0, 50.0, 300.0
TEXT = np.arange(4096, dtype=np.uint16) % 256


class World:
    """Time, one device, and how long things take on it and beside it.

    Args:
      waits: whether starting a step returns when that has ended only, as on some CPUs.
      batch: seconds in which the host makes a batch.
      line: seconds in which it writes a line.
    """

    def __init__(self, waits=False, batch=0.0, line=0.0):
        self.waits, self.batch, self.line = waits, batch, line
        self.now, self.free = 0.0, 0.0
        self.programs = set()

    def spend(self, seconds):
        self.now += seconds

    def until(self, moment):
        self.now = max(self.now, moment)

    def run(self, seconds):
        """Gives the device something to do; returns when it will have ended."""
        self.free = max(self.free, self.now) + seconds
        if self.waits:
            self.until(self.free)
        return self.free


class Number:
    """A metric that is there once its step has ended."""

    def __init__(self, world, ready):
        self.world, self.ready = world, ready

    def is_ready(self):
        return self.world.now >= self.ready

    def __array__(self, dtype=None, copy=None):
        self.world.until(self.ready)
        return np.array(1.0, dtype)


class Trainer:
    """A trainer whose steps take a known time, and whose validations take long."""

    is_sophia = True

    def __init__(self, world, refresh="cond"):
        self.world, self.on_host = world, refresh == "host"

    def init(self, seed):
        return SimpleNamespace(params=None)

    def refreshes_at(self, step):
        return step % 10 == 0

    def compile_with_the_others(self, state, batch):
        """There are no others."""

    def program_at(self, step):
        return self.refreshes_at(step) if self.on_host else None

    def step(self, state, batch, step):
        program = self.program_at(step)
        self.world.spend(0 if program in self.world.programs else COMPILE)
        self.world.programs.add(program)
        ready = self.world.run(REFRESH if self.refreshes_at(step) else STEP)
        return state, {"loss": Number(self.world, ready), "grad_norm": Number(self.world, ready)}

    def evaluate(self, params, batch):
        self.world.run(PAUSE)
        self.world.until(self.world.free)
        return 1.0


@pytest.fixture
def speeds(monkeypatch):
    """Trains in a world; returns the lines, with steps a second in place of tokens."""
    monkeypatch.setitem(worker.MODELS, "micro", worker.MICRO)

    def of(world, profile=None, refresh="cond", **flags):
        class Batches:
            def __next__(self):
                world.spend(world.batch)

            def get_state(self):
                return {}

        def save(*args):
            world.spend(PAUSE)

        store = SimpleNamespace(save=save, check=lambda: None, restore=lambda state: None)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: world.now)
        monkeypatch.setattr(data, "training_batches", lambda *args: Batches())
        monkeypatch.setattr(loop.mesh, "global_batch", lambda batch, mesh: batch)
        config = TrainConfig(
            model="micro", steps=30, batch_size=8, eval_batches=1,
            **{"eval_interval": 6, "save_interval": 8, "log_interval": 1, **flags},
        )  # fmt: skip
        result = loop.fit(
            resolve(config),
            data.Corpus(TEXT, TEXT, TEXT, 256),
            trainer=Trainer(world, refresh),
            log=lambda line: world.spend(world.line),
            store=store,
            profile=profile,
        )
        tokens = config.batch_size * worker.MICRO.context
        lines = [line for line in result.records if "loss" in line]
        return result, {
            line["step"]: line["tokens_per_second"] / tokens
            for line in lines
            if "tokens_per_second" in line
        }

    return of


def step_seconds(number):
    return REFRESH if number % 10 == 0 else STEP


FIRST = {*range(0, 30, 6), *range(0, 30, 8)}  # after a pause
LAST = {step - 1 for step in FIRST} | {29}  # before one


@pytest.mark.parametrize(
    "world, expected",
    [
        ({}, step_seconds),
        ({"batch": 0.5, "line": 0.25}, lambda n: step_seconds(n) + (0.5 if n in FIRST else 0)),
        ({"waits": True}, step_seconds),
        ({"waits": True, "batch": 0.5}, lambda n: step_seconds(n) + 0.5),
        ({"batch": 7.0}, lambda n: 7.0 + (step_seconds(n) if n in LAST else 0)),
    ],
    ids=["beside the host", "with hidden work", "in turns", "in turns with a batch", "slow input"],
)
def test_each_line_has_the_speed_of_its_step_whatever_comes_after_it(world, expected, speeds):
    result, found = speeds(World(**world))
    assert {step: 1 / speed for step, speed in found.items()} == pytest.approx(
        {step: expected(step) for step in range(1, 30)}  # the first one compiles
    )
    assert len(result.seconds) == len(result.refreshed) == 29


def test_a_line_has_the_speed_of_all_steps_since_the_one_before(speeds):
    _, found = speeds(World(), log_interval=10)
    assert 1 / found[10] == pytest.approx((9 * STEP + REFRESH) / 10)
    assert 1 / found[20] == pytest.approx((9 * STEP + REFRESH) / 10)
    assert 1 / found[29] == pytest.approx(STEP)


def test_both_programs_of_a_refresh_by_the_host_compile_before_they_are_timed(speeds):
    result, found = speeds(World(), refresh="host")
    assert sorted(found) == list(range(2, 30))
    assert result.step_seconds == pytest.approx((28 - 2) / 28 * STEP + 2 / 28 * REFRESH)


def test_starting_and_writing_a_profile_is_no_part_of_a_step(speeds, tmp_path, monkeypatch):
    world = World()
    trace = SimpleNamespace(
        start_trace=lambda *args, **more: world.spend(PAUSE), stop_trace=lambda: world.spend(PAUSE)
    )
    monkeypatch.setattr(report, "jax", SimpleNamespace(profiler=trace))
    _, found = speeds(world, profile=report.Profiler(tmp_path, 3))
    assert world.now > 2 * PAUSE
    assert {step: 1 / speed for step, speed in found.items()} == pytest.approx(
        {step: step_seconds(step) for step in range(1, 30)}
    )
