"""Several processes as one run: how they meet, agree on when to stop, and notice one that died."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from .config import HostConfig, UsageError

MEETING = 3600  # seconds; of a process that died, JAX tells the others long before
_meetings = itertools.count()

# Waits for its parent to close the pipe or to die, and speaks in the second case.
WATCHER = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"


def join(config: HostConfig) -> None:
    """Connects this process with the others of its run, before anything asks for devices.

    Args:
      config: where the others are.

    Raises:
      UsageError: the others are not described, or do not answer.
    """
    if not config.auto and config.coordinator is None:
        return
    if not config.auto and (config.processes is None or config.process is None):
        raise UsageError("--hosts.coordinator needs --hosts.processes and --hosts.process too.")
    jax.config.update("jax_enable_preemption_service", True)  # for `termination`
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            heartbeat_timeout_seconds=config.timeout,
            shutdown_timeout_seconds=config.timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"The run's processes did not meet ({str(error).splitlines()[0].rstrip('.')}). Check "
            "--hosts.*, and that all of them were started."
        ) from error


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Yields a function that tells, called after every step with its number, whether to leave.

    A single process leaves after the step in which SIGTERM or SIGINT (Ctrl-C) came. Several agree
    on a step that none of them has passed, whichever got the signal: JAX's own protocol, which
    takes about a second. A second signal ends the process at once.
    """
    asked: list[int] = []
    several = jax.process_count() > 1

    def announce(number: int) -> None:
        print(
            "Stopping after the step at hand; a second signal ends at once.",
            file=sys.stderr,
            flush=True,
        )
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX has taken this one, and listens to no other

    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: asked.append(number)) for n in numbers}
    try:
        with listening(numbers, announce):
            yield (
                multihost_utils.reached_preemption_sync_point if several else lambda _: bool(asked)
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def listening(numbers: tuple[int, ...], announce: Callable[[int], None]) -> Iterator[None]:
    """Inside, the first of these signals is announced and the second ends the process.

    A thread does both. The main one may be inside a compilation for minutes, where Python runs no
    handler; what the interpreter writes on a signal's arrival can be read all the same.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def listen() -> None:
        first = None
        while received := ours.recv(1):
            number = received[0]
            if number in numbers and first is not None:
                sys.stdout.flush()
                os._exit(128 + number)
            elif number in numbers:
                first = number
                announce(number)

    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        thread.join()
        ours.close()


def warn(sentence: str) -> None:
    """Warns once, however many processes there are."""
    if jax.process_index() == 0:
        print(f"Warning: {sentence}", file=sys.stderr)


def meet() -> None:
    """Waits until all processes are here.

    The first collective between some devices is not for that: on CPUs, Gloo gives up if one of the
    processes comes 30 seconds later than another. Compiling on a busy machine makes that much.
    """
    if jax.process_count() > 1:
        # Not with multihost_utils.sync_global_devices, which is a collective itself.
        barrier = ocp.multihost.get_barrier_sync_fn()
        barrier(key=f"{__name__}.{next(_meetings)}", timeout_ms=1000 * MEETING)


def gather(position: dict[str, Any]) -> list[dict[str, Any]]:
    """Every process's position in its data, for one of them to write down."""
    meet()
    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.array(len(text)))))
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    rows = multihost_utils.process_allgather(padded).reshape(-1, longest)
    return [json.loads(bytes(row)) for row in rows]


def from_first(value: Any) -> Any:
    """The first process's value, which can be written as JSON, on all of them."""
    return gather({"value": value})[0]["value"] if jax.process_count() > 1 else value


def own_position(positions: list[dict[str, Any]]) -> dict[str, Any]:
    """This process's part of what was gathered; any will do where another number wrote it down."""
    same = len(positions) == jax.process_count()
    return positions[jax.process_index() if same else 0]


@contextlib.contextmanager
def message_on_abort(sentence: str) -> Iterator[None]:
    """Has the sentence printed if this process dies inside, where there are several processes.

    When one dies, JAX's runtime aborts the others: at once if it was process 0, else when its
    heartbeats have been missing for `--hosts.timeout` seconds. Python cannot speak then, so a small
    process does, which waits at the end of a pipe.
    """
    if jax.process_count() == 1:
        yield
        return
    command = [sys.executable, "-S", "-c", WATCHER, sentence]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as watcher:
        try:
            yield
        except UsageError:
            watcher.communicate(b"this process speaks for itself")
            raise
        except Exception:
            # It ends as one that was killed does: what runs at a normal exit waits for the others.
            traceback.print_exc()
            exit_with(1)
        watcher.communicate(b"all is well")


def exit_with(code: int) -> int:
    """Returns the exit code; a process that others wait for ends here, so that they end too."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
