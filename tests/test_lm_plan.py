"""What a pod's plan reads out of a compiled program, and which pods it knows."""

import pytest

from examples.lm import plan
from examples.lm.__main__ import main
from examples.lm.config import MeshConfig

HLO = """HloModule step

%body.1 (arg: f32[8]) -> f32[8] {
  %arg = f32[8]{0} parameter(0)
  ROOT %gather.1 = bf16[16,4]{1,0} all-gather(%arg), dimensions={0}
}

ENTRY %main.2 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %loop = f32[8]{0} while(%p), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"12"}}
  %start = (f32[8]{0}, f32[32]{0}) all-reduce-start(%loop), to_apply=%add
  ROOT %done = f32[32]{0} all-reduce-done(%start)
}
"""  # noqa: E501


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs():
    assert plan.collectives(HLO) == {
        "all-gather": {"count": 12, "bytes": 12 * 16 * 4 * 2},
        "all-reduce": {"count": 1, "bytes": 32 * 4},
    }


@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "v9:4x4", "v5e:4x4x4x4", "16"])
def test_a_topology_that_cannot_be_read_is_answered_with_how_to_write_it(topology, capsys):
    assert main(["plan", "--topology", topology]) == 2
    assert "v5e:4x4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "chips", "fsdp"), [("gpt2-124m", 16, 16), ("gpt2-1.5b", 256, 64)]
)
def test_params_are_spread_over_as_many_chips_as_divide_their_width(model, chips, fsdp):
    config = plan.PlanConfig(model=model)
    assert plan.layout(config, chips) == MeshConfig(data=-1, fsdp=fsdp, tensor=1)


def test_what_does_not_fit_is_answered_with_what_would():
    config = plan.PlanConfig(batch_per_chip=16)
    row = {"peak_bytes": 20 * plan.GIB, "temp_bytes": 16 * plan.GIB, "hbm_bytes": 12 * plan.GIB}
    assert "--batch-per-chip 8" in plan.advice(config, row)
    row = {"peak_bytes": 20 * plan.GIB, "temp_bytes": plan.GIB, "hbm_bytes": 12 * plan.GIB}
    assert "more chips" in plan.advice(config, row)
