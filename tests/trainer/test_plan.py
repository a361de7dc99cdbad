"""What a pod's plan reads out of a compiled program, which pods it knows, what it advises.

Nothing here needs the TPU compiler; a plan from end to end is in test_tpu_cost.py.
"""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from examples.lm import hlo, plan
from examples.lm.__main__ import main
from examples.lm.config import MODELS, MeshConfig, ModelConfig
from examples.lm.model import parameter_count
from examples.lm.run import resolve

# An inner loop of 2 rounds, as its counter goes to 4 in steps of 2, in an outer loop of 12, as XLA
# notes; a pair of start and done; a result that is a tuple; a fusion that goes on with a collective
# which another one, outside of the loop, started; and what TPUs make of a reduce-scatter.
HLO = """HloModule step

%continued (p: bf16[64]) -> bf16[64] {
  %p = bf16[64]{0:T(256)(2,1)} parameter(0)
  ROOT %gather.9 = bf16[64]{0:T(256)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
}

%inner_body (arg: (u32[], f32[8])) -> (u32[], f32[8]) {
  %two = u32[]{:T(128)} constant(2)
  %arg = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="f(x)/add"}
  %send = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3
  %sent = f32[8]{0} collective-permute-done(%send)
  ROOT %out = (u32[]{:T(128)}, /*index=1*/f32[8]{0}) tuple(%next, /*index=1*/%sent)
}

%inner_condition (arg.1: (u32[], f32[8])) -> pred[] {
  %four = u32[]{:T(128)} constant(4)
  %arg.1 = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%j, %four), direction=LT
}

%outer_body (arg.2: f32[8]) -> f32[8] {
  %arg.2 = f32[8]{0} parameter(0)
  %gather.1 = bf16[16,4]{1,0} all-gather(%arg.2), channel_id=1, dimensions={0}
  %going = bf16[64]{0} fusion(%gather.1), kind=kCustom, calls=%continued
  %first = (u32[], f32[8]{0}) tuple(%zero, %arg.2)
  %loop.1 = (u32[], f32[8]{0}) while(%first), condition=%inner_condition, body=%inner_body
  ROOT %y = f32[8]{0} get-tuple-element(%loop.1), index=1
}

%refreshed (arg.3: f32[8]) -> f32[8] {
  %arg.3 = f32[8]{0} parameter(0)
  ROOT %sum.3 = f32[8]{0} all-reduce(%arg.3), channel_id=4, to_apply=%add
}

%all-reduce-scatter.1 (in: f32[8]) -> f32[2] {
  %in = f32[8]{0} parameter(0)
  %sum.6 = f32[8]{0} all-reduce(%in), channel_id=6, to_apply=%add
  ROOT %part = f32[2]{0} dynamic-slice(%sum.6, %offset), dynamic_slice_sizes={2}
}

%kept (arg.4: f32[8]) -> f32[8] {
  ROOT %arg.4 = f32[8]{0} parameter(0)
}

%started (p.5: bf16[4]) -> bf16[64] {
  %p.5 = bf16[4]{0} parameter(0)
  ROOT %gather.5 = bf16[64]{0} all-gather(%p.5), channel_id=7, dimensions={0}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main.2 (p.6: f32[8]) -> f32[8] {
  %p.6 = f32[8]{0} parameter(0)
  %begin = bf16[64]{0} fusion(%p.6), kind=kCustom, calls=%started
  %loop = f32[8]{0} while(%p.6), condition=%c, body=%outer_body, backend_config={"known_trip_count":{"n":"12"}}
  %scattered = f32[2]{0} fusion(%loop), kind=kCustom, calls=%all-reduce-scatter.1
  %start = f32[32]{0} all-reduce-start(%loop), channel_id=2, to_apply=%add
  %done = f32[32]{0} all-reduce-done(%start)
  %both = (f32[8]{0}, pred[6]{0}) all-reduce(%loop, %begin), channel_id=5, to_apply=%add
  ROOT %h = f32[8]{0} conditional(%due, %loop, %loop), branch_computations={%refreshed, %kept}
}
"""  # noqa: E501


def test_a_collective_in_a_loop_counts_as_often_as_the_loops_around_it_run():
    traffic = hlo.collective_traffic(HLO)
    assert traffic["collective-permute"] == {"count": 24, "bytes": 24 * 8 * 4}


def test_a_loop_that_ends_on_its_data_counts_once():
    traffic = hlo.collective_traffic(HLO.replace("direction=LT", "direction=NE"))
    assert traffic["collective-permute"]["count"] == 12


def test_a_loop_whose_step_is_hidden_in_a_fusion_counts_by_its_bound():
    fused = HLO.replace("%next = u32[]{:T(128)} add(%i, %two)", "%next = u32[] fusion(%i, %two)")
    assert hlo.collective_traffic(fused)["collective-permute"]["count"] == 12 * 4


def test_a_collective_that_fusions_continue_counts_once():
    gathered_in_the_loop, gathered_beside_it = 12 * 16 * 4 * 2, 64 * 2
    assert hlo.collective_traffic(HLO)["all-gather"] == {
        "count": 12 + 1,
        "bytes": gathered_in_the_loop + gathered_beside_it,
    }


def test_a_pair_counts_once_a_tuple_with_all_its_arrays_and_a_branch_as_taken():
    pair, two, branch = 32 * 4, 8 * 4 + 6, 8 * 4
    assert hlo.collective_traffic(HLO)["all-reduce"] == {"count": 3, "bytes": pair + two + branch}


def test_what_tpus_scatter_while_they_reduce_is_told_from_an_all_reduce():
    assert hlo.collective_traffic(HLO)["reduce-scatter"] == {"count": 1, "bytes": 2 * 4}


def test_what_xla_for_cpu_compiles_is_read_too():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))

    @jax.jit
    def summed_in_turn(x):
        return jax.lax.scan(lambda c, row: (jnp.sin(c * row.sum()), None), 1.0, x)[0]

    x = jax.ShapeDtypeStruct((5, 8), "float32", sharding=rows)
    traffic = hlo.collective_traffic(summed_in_turn.lower(x).compile().as_text())
    assert traffic == {"all-reduce": {"count": 5, "bytes": 5 * 4}}


@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "v5e:0x4", "v9:4x4", "v5e:4x4x4x4", "16"])
def test_a_topology_that_cannot_be_read_is_answered_with_how_to_write_it(topology, capsys):
    assert main(["plan", "--topology", topology]) == 2
    assert "v5e:4x4" in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["v5e:64x64", "v5e:2x2x4", "v6e:4x32", "v5p:24x24x24"])
def test_a_slice_larger_than_there_is_never_reaches_the_compiler(topology, capsys):
    assert main(["plan", "--topology", topology]) == 2
    assert "the largest slice is" in capsys.readouterr().err


def test_without_the_compiler_the_answer_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert main(["plan"]) == 2
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt5"], "no model 'gpt5'"),
        (["--optimizer", "adamw", "sgd"], "no optimizer 'sgd'"),
        (["--batch-per-chip", "0"], "--batch-per-chip is 0. It has to be at least 1"),
        (["--accumulate", "0"], "--accumulate is 0. It has to be at least 1"),
        (["--curvature-share", "-1"], "--curvature-share is -1. It has to be at least 1"),
        (["--update-interval", "0"], "--update-interval is 0. It has to be at least 1"),
        (
            ["--optimizer", "adamw", "--update-interval", "5"],
            "--update-interval is 5, and adamw does not use it. Leave it out, or choose one of: "
            "sophia_g, ",
        ),
        (
            ["--optimizer", "adamw", "lion", "--update-interval", "5"],
            "--update-interval is 5, and none of adamw, lion uses it.",
        ),
        (["--json", "nowhere/plan.json"], "not a file in a folder that exists. Make the folder"),
        (["--json", "."], "--json . is not a file"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_compiled(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "chips", "fsdp"), [("gpt2-124m", 16, 16), ("gpt2-1.5b", 256, 64)]
)
def test_params_are_spread_over_as_many_chips_as_divide_their_width(model, chips, fsdp):
    config = plan.PlanConfig(model=model)
    assert plan.layout(config, chips) == MeshConfig(data=-1, fsdp=fsdp, tensor=1)


def test_a_chip_estimates_on_a_sixteenth_of_its_part_but_on_one_sequence_at_least():
    config = plan.PlanConfig(batch_per_chip=32, curvature_share=16)
    assert plan.run_config(config, "sophia_g", chips=16).curvature_batch == 2 * 16
    config = plan.PlanConfig(batch_per_chip=4, curvature_share=16)
    assert plan.run_config(config, "sophia_g", chips=16).curvature_batch == 16


def test_activations_are_recomputed_in_the_models_that_need_it_unless_told_otherwise():
    def remat(**fields):
        return plan.run_config(plan.PlanConfig(**fields), "adamw", chips=4).remat

    assert not remat(model="gpt2-124m")
    assert remat(model="gpt2-124m", remat=True)
    assert remat(model="gpt2-1.5b")
    assert not remat(model="gpt2-1.5b", remat=False)


# --- FLOPs ----------------------------------------------------------------------------------------

SMALL = ModelConfig(layers=3, width=64, heads=4, context=64, vocab_size=512)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)


def small_flops(optimizer, refresh=None, **fields):
    config = plan.PlanConfig(model="small", batch_per_chip=16, **fields)
    return plan.flops(
        resolve(plan.run_config(config, optimizer, 2), devices=jax.devices()[:2]), refresh
    )


def test_flops_are_those_of_the_matrices_and_of_attention_in_every_layer():
    tokens = 2 * 16 * SMALL.context
    in_products = parameter_count(SMALL) - SMALL.context * SMALL.width
    attention = 2 * SMALL.layers * SMALL.context * SMALL.width
    least = 6 * tokens * (in_products + attention)
    assert least <= small_flops("adamw") <= 1.15 * least


def test_flops_do_not_depend_on_the_microbatches():
    assert small_flops("adamw", accumulate=4) == small_flops("adamw", accumulate=1)


def test_a_step_off_a_refresh_costs_what_a_gradient_does_and_a_refresh_its_share_of_the_batch():
    gradient = small_flops("adamw")
    for optimizer, gradients in {"sophia_g": 1, "sophia_h": 2.7}.items():
        assert small_flops(optimizer, refresh=False) == pytest.approx(gradient, rel=0.01)
        assert small_flops(optimizer) - gradient <= 1.3 * gradients * gradient / 16


@pytest.mark.parametrize("optimizer", ["sophia_g_eigenbasis", "soap"])
def test_a_refresh_of_the_bases_is_counted_at_its_own_interval(optimizer):
    config = plan.PlanConfig(model="small", batch_per_chip=16)
    config = dataclasses.replace(plan.run_config(config, optimizer, 1), basis_interval=4)
    run = resolve(config, devices=jax.devices()[:1])
    found = plan.step_flops(run)
    plain, basis = found["flops_step"], found["flops_basis_step"]
    estimates = found["flops_refresh_step"] - plain
    assert (estimates > 0) == (optimizer != "soap")
    assert found["flops_average"] == plain + estimates / 10 + (basis - plain) / 4
    # QR and a product for each basis, and two products for each side of the momentum.
    sizes = [64] * 12 * SMALL.layers  # blocks on the sides of the matrices of a layer
    assert basis - plain >= sum((8 / 3 + 2) * n**3 for n in sizes)
    assert plan.qr_flops(plan.bases_of(run)) >= sum(8 / 3 * n**3 for n in sizes)


def test_qr_has_the_flops_of_the_textbook():
    stack = jax.ShapeDtypeStruct((2, 3, 64, 64), jnp.float32)
    assert plan.qr_flops([stack]) == pytest.approx(6 * 8 / 3 * 64**3)


# --- what does not fit ----------------------------------------------------------------------------

TOO_LARGE = {"peak_bytes": 20 * plan.GIB, "temp_bytes": 16 * plan.GIB, "hbm_bytes": 13 * plan.GIB}


def advice(optimizer="sophia_g", row=TOO_LARGE, **fields):
    config = plan.PlanConfig(**fields)
    run = resolve(plan.run_config(config, optimizer, chips=4), devices=jax.devices()[:4])
    return plan.advice(run, row)


def test_what_does_not_fit_is_answered_with_what_would():
    assert advice(batch_per_chip=16, accumulate=4) == "Try --accumulate 8 or --remat True."
    assert advice(batch_per_chip=16, accumulate=4, remat=True) == "Try --accumulate 8."
    at_once = advice("contrib_sophia", batch_per_chip=16, accumulate=4)
    assert "--batch-per-chip 8 --accumulate 1 or --remat True" in at_once
    assert "--mesh.tensor" in advice(batch_per_chip=1, accumulate=1)
    assert "more chips" in advice(row={**TOO_LARGE, "temp_bytes": plan.GIB})


class DoesNotFit:
    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_the_compilers_refusal_becomes_a_number():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (57.96G) exceeds available HBM (15.75G)."
    )
    assert plan.compile_or_need(DoesNotFit(message)) == (None, int(57.96 * plan.GIB))
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 960M of 500M hbm."
    assert plan.compile_or_need(DoesNotFit(message)) == (None, 960 * 2**20)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan.compile_or_need(DoesNotFit("INTERNAL: a fault of its own"))


# --- from end to end, on CPU devices in the pod's place -------------------------------------------


@pytest.fixture
def pod_of_two(monkeypatch):
    monkeypatch.setattr(plan, "pod", lambda topology: (jax.devices()[:2], 2**30))
    monkeypatch.setitem(MODELS, "small", ModelConfig(1, 16, 2, context=16, vocab_size=64))
    with unoptimized():
        yield


@contextlib.contextmanager
def unoptimized():
    """Compiles faster."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


KEYS = [
    "params_bytes", "state_bytes", "temp_bytes", "peak_bytes", "hbm_bytes", "flops_step",
    "flops_refresh_step", "flops_basis_step", "flops_average", "collectives",
    "compile_seconds",
]  # fmt: skip
ARGUMENTS = ["plan", "--model", "small", "--batch-per-chip", "4", "--accumulate", "2"]


def test_each_optimizer_of_the_list_gets_its_own_numbers(pod_of_two, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main([*ARGUMENTS, "--optimizer", "adamw", "sophia_g", "--json", str(path)]) == 0
    costs = json.loads(path.read_text())
    assert list(costs) == ["adamw", "sophia_g"]
    assert all(list(row) == KEYS for row in costs.values())
    params = 4 * parameter_count(MODELS["small"])
    for row in costs.values():
        assert params / 2 <= row["params_bytes"] <= 0.6 * params  # biases are on both
        assert row["state_bytes"] == pytest.approx(2 * row["params_bytes"], rel=0.01)
        assert row["collectives"]["all-gather"]["count"] > 0
    adamw, sophia = costs.values()
    assert adamw["flops_step"] == adamw["flops_refresh_step"] == adamw["flops_average"]
    refresh = sophia["flops_refresh_step"] - sophia["flops_step"]
    assert sophia["flops_average"] == pytest.approx(sophia["flops_step"] + refresh / 10)
    assert "sophia_g" in capsys.readouterr().out


@pytest.mark.parametrize("optimizers", [["adamw"], ["adamw", "sophia_g"]])
def test_a_plan_speaks_of_curvature_where_an_optimizer_has_some(optimizers, pod_of_two, capsys):
    with_curvature = "sophia_g" in optimizers
    interval = ["--update-interval", "5"] if with_curvature else []
    assert main([*ARGUMENTS, "--optimizer", *optimizers, *interval]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("every 5 steps" in said) == ("curvature on" in said) == with_curvature


def test_a_program_that_the_compiler_refuses_is_answered_in_one_line(
    pod_of_two, monkeypatch, tmp_path, capsys
):
    real = plan.lowered_step

    def refused(run, refresh=None, refresh_basis=None, unroll=False):
        trainer, lowered = real(run, refresh, refresh_basis, unroll)
        message = "RESOURCE_EXHAUSTED: HLO temporaries (1.50G) exceed available HBM (1.00G)."
        return trainer, lowered if unroll else DoesNotFit(message)

    monkeypatch.setattr(plan, "lowered_step", refused)
    path = tmp_path / "plan.json"
    assert main([*ARGUMENTS, "--json", str(path)]) == 2
    answer = capsys.readouterr()
    assert "does not fit" in answer.err
    assert "--accumulate 4" in answer.err
    row = json.loads(path.read_text())["sophia_g"]
    assert row["temp_bytes"] == 1.5 * 2**30
    assert row["peak_bytes"] == row["temp_bytes"] + row["params_bytes"] + row["state_bytes"]
    assert row["flops_average"] > 0
