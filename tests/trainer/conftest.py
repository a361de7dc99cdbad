"""What the trainer's tests share: a cache of compiled steps, and a run that was not interrupted."""

import jax
import pytest

from tests.trainer import worker


@pytest.fixture(scope="session")
def compiled_steps(tmp_path_factory):
    """The folder of compiled steps, which all modules and the processes that they start share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled(compiled_steps):
    """Where compiled steps are kept; this process trains the micro model, on one device."""
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch, worker.quick_compilation(compiled_steps):
        patch.setattr(jax, "devices", lambda *_: device)
        patch.setitem(worker.MODELS, "micro", worker.MICRO)
        yield compiled_steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled):
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert worker.run([*worker.RUN, "--out", str(folder)]) == 0
    return folder
