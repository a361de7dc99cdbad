"""What holds for every test: where JAX runs, types checked at run time, how hypothesis searches."""

import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

from tests import typechecking

jax.config.update("jax_num_cpu_devices", 8)

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


@pytest.fixture(scope="module")
def no_cache() -> Iterator[None]:
    """Turns the compilation cache off until the module's last test."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
