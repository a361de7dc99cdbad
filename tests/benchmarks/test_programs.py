"""What `benchmarks.lib.programs` reads out of compiled and traced programs."""

import jax
import jax.numpy as jnp
import optax
import pytest

import sophia_optax
from benchmarks.lib import programs

# Of 256 bytes each: %a and a quarter of %b are copied to memory on the chip and read there with
# %b, to make %c; three rounds of a loop read and write it; the other branch would copy it.
HLO = """HloModule update

%body (arg: (s32[], f32[64])) -> (s32[], f32[64]) {
  %arg = (s32[], f32[64]{0}) parameter(0)
  %x = f32[64]{0:T(128)} get-tuple-element(%arg), index=1
  %y = f32[64]{0:T(128)} negate(%x)
  ROOT %out = (s32[], f32[64]{0}) tuple(%i, %y)
}

%taken (p: f32[64]) -> f32[64] {
  ROOT %p = f32[64]{0:T(128)} parameter(0)
}

%refreshed (q: f32[64]) -> f32[64] {
  %q = f32[64]{0:T(128)} parameter(0)
  ROOT %copied = f32[64]{0:T(128)} copy(%q)
}

ENTRY %main (a: f32[64], b: f32[64]) -> f32[64] {
  %a = f32[64]{0:T(128)} parameter(0)
  %b = f32[64]{0:T(128)} parameter(1)
  %ahead = (f32[64]{0:T(128)S(1)}, f32[64]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)
  %near = f32[64]{0:T(128)S(1)} copy-done(%ahead)
  %part = ((f32[64]{0:T(128)}), f32[16]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%b), slice={[0:16]}
  %quarter = f32[16]{0:T(128)S(1)} slice-done(%part)
  %c = f32[64]{0:T(128)} fusion(%near, %b, %quarter), kind=kLoop, calls=%fused
  %first = (s32[], f32[64]{0}) tuple(%zero, %c)
  %loop = (s32[], f32[64]{0}) while(%first), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %d = f32[64]{0:T(128)} get-tuple-element(%loop), index=1
  ROOT %h = f32[64]{0:T(128)} conditional(%due, %d, %d), branch_computations={%taken, %refreshed}
}
"""  # noqa: E501


def test_traffic_is_that_with_main_memory_loops_as_often_as_they_run():
    copied_ahead, fused, looped = 1 + 1 / 4, 2, 3 * 2
    assert programs.main_memory_bytes(HLO) == 256 * (copied_ahead + fused + looped)


def test_copies_count_where_they_run_off_a_refresh():
    assert programs.copies(HLO, at_least=256) == 0
    assert programs.copies(HLO.replace("{%taken, %refreshed}", "{%refreshed, %taken}"), 256) == 1
    assert programs.copies(HLO.replace("{%taken, %refreshed}", "{%refreshed, %taken}"), 257) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sophia"])
def test_where_there_is_no_memory_on_the_chip_it_is_the_compilers_own_count(optimizer):
    params = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    tx, arguments = {
        "adamw": (optax.adamw(1e-3), {}),
        "sophia": (sophia_optax.sophia_h(1e-3), {"refresh": False}),
    }[optimizer]
    program = programs.donated_update(tx, params, **arguments)
    assert programs.main_memory_bytes(program.as_text()) == pytest.approx(
        program.cost_analysis()["bytes accessed"], rel=0.01
    )


def test_products_in_loops_and_branches_are_counted_as_they_run():
    a, b = jnp.ones((4, 8)), jnp.ones((8, 8))

    def products(a, b):
        a = jax.lax.fori_loop(0, 5, lambda _, x: x @ b, a)
        return jax.lax.cond(a[0, 0] > 0, lambda: jax.jit(jnp.matmul)(a, b), lambda: a)

    assert programs.product_flops(jax.make_jaxpr(products)(a, b).jaxpr) == 6 * 2 * 4 * 8 * 8
