"""Which orthonormalization refreshes a basis: QR, rounds of CholeskyQR, or Newton-Schulz.

    pip install -e '.[examples,tpu]'
    python -m benchmarks.orthonormalize [--quick]

A refresh of `in_eigenbasis` makes orth(L Q) from a factor L and a basis Q that is nearly its
eigenbasis. Here L has eigenvalues that fall by a number of decades, or is singular. Measured are:

* the error, the largest entry of |QᵀQ - I|, in float32;
* the seconds over those of QR on this CPU or GPU, a median over rounds in which all run in turn;
* for a TPU, compiled ahead of time without one: the processor's seconds of the compilation, the
  temporary memory and XLA's FLOPs. `flops_over_cube` has the textbook's FLOPs;
* for a CPU, the seconds of QR with one thread of LAPACK's OpenBLAS over those with one for each
  core, on an idle machine and beside a busy process for each core.

Writes `results/orthonormalize.json`, and measures what is missing there. On a machine with a GPU it
measures that one's part alone. The TPU's part needs the extra `tpu`.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.lib.provenance import RESULTS, provenance
from examples.lm import plan

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
STEPS = 12  # of Newton-Schulz
TOPOLOGY = "v5e:2x2"


def gram(a: jax.Array) -> jax.Array:
    """aᵀ a."""
    return matmul(jnp.swapaxes(a, -1, -2), a)


def qr(a: jax.Array) -> jax.Array:
    """Householder's."""
    return jnp.linalg.qr(a)[0]


def cholesky_qr(a: jax.Array, shift: float = 0.0) -> jax.Array:
    """a R⁻¹ with the Cholesky factor R of aᵀ a, plus a multiple of its trace on the diagonal."""
    square = gram(a)
    trace = jnp.trace(square, axis1=-2, axis2=-1)[..., None, None]
    lower = jnp.linalg.cholesky(square + shift * trace * jnp.eye(a.shape[-1]))
    solve = jax.lax.linalg.triangular_solve
    return solve(lower, a, left_side=False, lower=True, transpose_a=True)


def cholesky_qr2(a: jax.Array) -> jax.Array:
    """Twice, as the error of one round is that of aᵀ a."""
    return cholesky_qr(cholesky_qr(a))


def shifted_cholesky_qr3(a: jax.Array) -> jax.Array:
    """Twice after a round whose Gram matrix rounding cannot make indefinite: the library's."""
    return cholesky_qr2(cholesky_qr(a, a.shape[-1] * jnp.finfo(a.dtype).eps))


def newton_schulz(a: jax.Array) -> jax.Array:
    """The orthogonal factor of the polar decomposition, by matrix products alone."""
    x = a / jnp.linalg.norm(a, axis=(-2, -1), keepdims=True)
    for _ in range(STEPS):
        x = 1.5 * x - 0.5 * matmul(x, gram(x))
    return x


METHODS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "qr": qr,
    "cholesky_qr2": cholesky_qr2,
    "shifted_cholesky_qr3": shifted_cholesky_qr3,
    "newton_schulz": newton_schulz,
}
# Of n x n matrices, over n³. Householder: 4/3 for R and 4/3 for Q. CholeskyQR, twice: 2 for the
# product, 1/3 for the factor, 1 for the triangular solve. Newton-Schulz: two products a step.
FLOPS = {
    "qr": 8 / 3,
    "cholesky_qr2": 2 * (2 + 1 / 3 + 1),
    "shifted_cholesky_qr3": 3 * (2 + 1 / 3 + 1),
    "newton_schulz": 4 * STEPS,
}


def problem(
    stack: int, size: int, decades: float, rank: float = 1.0, *, shift: bool = True
) -> jax.Array:
    """What a refresh orthonormalizes, `[stack, size, size]`.

    Args:
      stack: how many matrices.
      size: of each.
      decades: by which the eigenvalues of the factor fall.
      rank: the share of them that is not zero.
      shift: whether the library's small multiple of Q is added.

    Returns:
      L Q for a basis Q near the eigenbasis of L, with the library's scale.
    """
    keys = jax.random.split(jax.random.key(0))
    axes = qr(jax.random.normal(keys[0], (stack, size, size)))
    values = 10.0 ** (-decades * jnp.arange(size) / (size - 1))
    values = jnp.where(jnp.arange(size) < rank * size, values, 0.0)
    factor = matmul(axes * (values / values.sum()), jnp.swapaxes(axes, -1, -2))
    noise = jax.random.normal(keys[1], axes.shape) / jnp.sqrt(size)
    basis = qr(axes + 0.01 * noise)
    moved = matmul(factor, basis)
    return moved + 128 * jnp.finfo(jnp.float32).eps * basis if shift else moved


def error(q: jax.Array) -> float | None:
    """The largest entry of |QᵀQ - I|; None if it is not finite."""
    errors = jnp.abs(gram(q) - jnp.eye(q.shape[-1]))
    return float(errors.max()) if bool(jnp.isfinite(errors).all()) else None


def on_this_device(stack: int, size: int, rounds: int = 9) -> dict[str, Any]:
    """Errors on factors of several kinds, and seconds over those of QR."""
    factors = {
        "2 decades": problem(stack, size, 2),
        "4 decades": problem(stack, size, 4),
        "6 decades": problem(stack, size, 6),
        "singular": problem(stack, size, 2, rank=0.5),
        "singular, no shift": problem(stack, size, 2, rank=0.5, shift=False),
    }
    compiled = {name: jax.jit(method) for name, method in METHODS.items()}
    errors = {
        name: {kind: error(run(a)) for kind, a in factors.items()} for name, run in compiled.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(factors["2 decades"]))
            seconds[name].append(time.perf_counter() - start)
    over_qr = {
        name: statistics.median(own / qr for own, qr in zip(found, seconds["qr"], strict=True))
        for name, found in seconds.items()
    }
    return {
        "stack": stack,
        "size": size,
        "errors": errors,
        "seconds_over_qr": over_qr,
        "seconds_of_qr": statistics.median(seconds["qr"]),
    }


def on_tpu(stack: int, size: int) -> dict[str, Any]:
    """What XLA makes of them for one chip; a first compilation warms up the compiler."""
    devices, _ = plan.pod(TOPOLOGY)
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    a = jax.ShapeDtypeStruct((stack, size, size), jnp.float32, sharding=sharding)
    jax.jit(jnp.negative).lower(a).compile()
    found = {}
    for name, method in METHODS.items():
        lowered = jax.jit(method).lower(a)
        start = time.process_time()
        compiled: Any = lowered.compile()
        seconds = time.process_time() - start
        found[name] = {
            "compile_seconds": round(seconds, 2),
            "xla_flops_over_cube": compiled.cost_analysis()["flops"] / (stack * size**3),
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
    return {"stack": stack, "size": size, "methods": found}


def qr_seconds(stack: int, size: int, rounds: int = 31) -> float:
    """The median of several calls."""
    run, a = jax.jit(qr), problem(stack, size, 2)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(a))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def one_thread(busy: bool) -> list[dict[str, Any]]:
    """Seconds of QR by shape, in processes with one thread of OpenBLAS over those with all."""
    cores = os.cpu_count() or 1
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(cores if busy else 0)]
    try:
        seconds = {}
        for threads in (cores, 1):
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
            command = [sys.executable, "-m", "benchmarks.orthonormalize", "--qr"]
            found = subprocess.run(command, env=environment, check=True, capture_output=True)
            seconds[threads] = json.loads(found.stdout)
    finally:
        for process in others:
            process.kill()
    return [
        {"stack": stack, "size": size, "threads": cores, "over_all_threads": one / many}
        for (stack, size), one, many in zip(SHAPES["cpu"], seconds[1], seconds[cores], strict=True)
    ]


SHAPES = {
    "cpu": ((16, 64), (8, 256), (2, 768)),
    "gpu": ((16, 64), (8, 256), (256, 256), (2, 768), (24, 768)),
    "tpu": ((36, 256),),
}


def main(quick: bool = False, qr: bool = False) -> None:
    """Measures and writes the results.

    Args:
      quick: small, for this device only, and not written.
      qr: prints the seconds of QR alone, with the threads that the environment sets.
    """
    if quick:
        print(json.dumps(on_this_device(2, 16, 2)))
        return
    if qr:
        print(json.dumps([qr_seconds(*shape) for shape in SHAPES["cpu"]]))
        return
    # A cached program would compile in no time.
    jax.config.update("jax_enable_compilation_cache", False)
    path = RESULTS / "orthonormalize.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    backend = jax.default_backend()
    parts = {backend: on_this_device} | ({} if backend == "gpu" else {"tpu": on_tpu})
    result |= {"flops_over_cube": FLOPS, "topology": TOPOLOGY}
    for part, measure in parts.items():
        origin = provenance("benchmarks.orthonormalize")
        if part == "tpu":
            origin["versions"]["libtpu"] = version("libtpu")
        else:
            origin["device"] = jax.devices()[0].device_kind
        rows = result.setdefault(part, {}).setdefault("rows", [])
        known = {(row["stack"], row["size"]) for row in rows}
        for shape in SHAPES[part]:
            if shape not in known:
                result[part] |= origin
                rows.append(measure(*shape))
                path.write_text(json.dumps(result, indent=1) + "\n")
    if backend == "cpu" and "one_thread" not in result:
        result["one_thread"] = {"idle": one_thread(busy=False), "busy": one_thread(busy=True)}
        result["one_thread"] |= provenance("benchmarks.orthonormalize")
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
