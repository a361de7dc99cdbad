"""What holds for every test: where JAX runs, types checked at run time, how hypothesis searches."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
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
