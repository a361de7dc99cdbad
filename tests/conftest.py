"""What holds for every test: where JAX runs, how it compiles, types checked, hypothesis's search.

Most of the tests' time is compilation of programs that run a few times. So LLVM's optimizations
are off in this process and in those that tests start. JAX_DISABLE_MOST_OPTIMIZATIONS=false leaves
them on, with which the tests have to pass too. XLA's own passes run in either case: `as_text`,
`cost_analysis` and `memory_analysis` of a program are the same, so that tests of costs and of
communication need no exception. Rounding alone differs.

Programs are kept in a folder for the run, so that its processes compile each of them once. Where
JAX_COMPILATION_CACHE_DIR names a folder, they stay there for the next run.
"""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads wait for the other tests'
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

from tests import typechecking

gc.set_threshold(50_000)  # a trace makes many objects, none of them garbage: 3 % of the CPU time
jax.config.update("jax_num_cpu_devices", 8)

compiled = None
if jax.config.jax_compilation_cache_dir is None:
    compiled = tempfile.TemporaryDirectory(prefix="sophia_optax.")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name  # pytest-xdist's workers inherit it
    jax.config.update("jax_compilation_cache_dir", compiled.name)

# Before 0.11, XLA for CPU has two emitters of kernels, and the newer one takes twice as long for
# small ones. Later releases have one, and refuse the flag. Here the text of a program does differ.
if jax.__version_info__ < (0, 11) and jax.config.read("jax_disable_most_optimizations"):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".lstrip()

# From here on, importing the library checks its annotations, shapes included, on every call.
install_import_hook("sophia_optax", f"{typechecking.__name__}.typechecker")

hypothesis.settings.register_profile(
    "sophia_optax",
    max_examples=25,
    deadline=None,  # the first example compiles
    derandomize=True,
    database=None,
    print_blob=True,
)
hypothesis.settings.load_profile("sophia_optax")


def pytest_unconfigure() -> None:
    """Removes the programs of this run."""
    if compiled is not None:
        compiled.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the library's tests last, and measures coverage by them alone: it slows all Python down.

    A worker takes the next module of this order whenever it is free. Some modules of the other
    folders take more than a minute: at the end, one of them would leave the other workers idle.
    """
    library = Path(__file__).parent / "library", config.rootpath / "sophia_optax"

    def is_of_library(item: pytest.Item) -> bool:
        return any(item.path.is_relative_to(folder) for folder in library)

    items.sort(key=is_of_library)
    for item in items:
        if not is_of_library(item):
            item.add_marker("no_cover")


@pytest.fixture(scope="module")
def no_cache() -> Iterator[None]:
    """Turns the compilation cache off until the module's last test."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@pytest.fixture
def optimizations() -> Iterator[None]:
    """Compiles a test's programs as users do."""
    disabled = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", disabled)
