"""The language model trainer: its data, its model, its step, and a comparison from end to end."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.lm import compare, data, mesh, report
from examples.lm.__main__ import main
from examples.lm.config import (
    MODELS,
    CompareConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    UsageError,
    compared,
)
from examples.lm.loop import Result, fit
from examples.lm.model import Transformer, dropout, parameter_count
from examples.lm.optimizers import OPTIMIZERS, Curvature, Optimizer, build, sophia_g
from examples.lm.run import resolve
from examples.lm.train import Trainer
from tests.trainer import worker

MICRO = ModelConfig(layers=2, width=16, heads=4, context=16, vocab_size=256, init_scale=0.1)
STEPS = 24  # the same everywhere: the schedule is a constant of the step, which is compiled once


@pytest.fixture(scope="module", autouse=True)
def micro_preset(compiled_steps):
    with pytest.MonkeyPatch.context() as patch, worker.quick_compilation(compiled_steps):
        patch.setitem(MODELS, "micro", MICRO)
        yield


@pytest.fixture(scope="module")
def corpus():
    return data.load("stdlib")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A comparison of a few steps with every optimizer, its folder and what it prints."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    config = CompareConfig(
        model="micro", steps=STEPS, batch_size=8, eval_interval=12, eval_batches=2, log_interval=1,
        mesh=MeshConfig(1, 1, 1), out=str(folder), optimizers=tuple(OPTIMIZERS), half=("adamw",),
    )  # fmt: skip
    printed = []
    one_device, table = jax.devices()[:1], report.table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: one_device)
        patch.setattr(report, "table", lambda *args: printed.append(table(*args)))
        compare.compare(config)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return folder, [json.loads(line) for line in lines], printed


# --- data -----------------------------------------------------------------------------------------


def test_each_file_is_in_one_split_and_every_split_has_megabytes_or_a_good_part_of_one(corpus):
    files = data.stdlib_files()
    assert len(files) == len({name for name, _ in files}) > 300
    sizes = {split: len(getattr(corpus, split)) for split in data.SPLITS}
    assert sum(sizes.values()) == pytest.approx(sum(p.stat().st_size for _, p in files), rel=0.01)
    assert sizes["train"] > 4e6
    assert min(sizes["tune"], sizes["validation"]) > 3e5


def test_no_source_file_is_in_two_splits(corpus):
    name, path = data.stdlib_files()[0]
    text = path.read_bytes()
    holders = [s for s in data.SPLITS if text in getattr(corpus, s).astype(np.uint8).tobytes()]
    assert holders == [data.split_of(name)]


def test_batches_are_the_same_for_the_same_seed_and_others_for_another(corpus):
    def first(seed):
        return next(data.batches(corpus.train, 16, 4, seed))

    np.testing.assert_array_equal(first(1), first(1))
    assert (first(1) != first(2)).any()


def test_the_processes_rows_one_after_another_are_the_single_process_batch(corpus):
    whole = data.batches(corpus.train, 16, 4, seed=0)
    parts = [data.batches(corpus.train, 16, 4, 0, process=p, processes=2) for p in range(2)]
    for _ in range(3):
        np.testing.assert_array_equal(next(whole), np.concatenate([next(p) for p in parts]))


def test_a_restored_iterator_gives_the_very_next_batch(corpus):
    batches = data.batches(corpus.train, 16, 4, seed=0)
    next(batches)
    state, expected = batches.get_state(), next(batches)
    resumed = data.batches(corpus.train, 16, 4, seed=0)
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed), expected)


def test_bigram_counts_predict_a_periodic_text_and_not_a_random_one():
    periodic = np.tile(np.array([1, 2, 3]), 1000)
    random = np.random.default_rng(0).integers(0, 4, 3000)
    assert data.bigram_loss(data.Corpus(periodic, periodic, periodic, 4), periodic) < 0.05
    assert data.bigram_loss(data.Corpus(random, random, random, 4), random) > 1.3


# --- model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-355m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1.5b", 1_557_611_200),
    ],
)
def test_presets_have_the_official_parameter_counts(name, count):
    assert parameter_count(MODELS[name]) == count


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (2, 2)])
def test_batches_of_one_window_come_without_end(batch_size, processes):
    tokens = np.arange(65)
    batches = data.batches(tokens, 16, batch_size, 0, process=0, processes=processes)
    starts = [int(next(batches)[0, 0]) for _ in range(12)]
    assert set(starts) == {0, 16, 32, 48}


@pytest.mark.parametrize(("name", "millions"), [("1m", 1), ("10m", 10), ("30m", 30)])
def test_presets_between_have_about_the_parameters_that_they_are_named_for(name, millions):
    model = dataclasses.replace(MODELS[name], vocab_size=256)
    assert parameter_count(model) == pytest.approx(millions * 1e6, rel=0.1)


def test_sizes_replace_those_of_the_model_and_the_rate_and_the_weights_follow_the_width():
    wide = {"layers": 3, "width": 256, "heads": 8, "context": 32}
    tiny, run = (resolve(TrainConfig(**sizes)) for sizes in ({}, wide))
    assert {name: getattr(run.model, name) for name in wide} == wide
    assert run.model.init_scale == tiny.model.init_scale / 2
    assert run.hyperparameters.learning_rate == tiny.hyperparameters.learning_rate / 4
    assert resolve(TrainConfig(width=32)).hyperparameters == tiny.hyperparameters
    assert resolve(TrainConfig(width=256, learning_rate=0.1)).hyperparameters.learning_rate == 0.1


def test_dropout_changes_what_is_trained_and_nothing_else():
    model = Transformer(MICRO, nnx.Rngs(0))
    tokens, key = jnp.arange(16)[None], jax.random.key(0)
    whole = model(tokens)
    np.testing.assert_array_equal(model(tokens, dropout_rate=0.5), whole)
    np.testing.assert_array_equal(model(tokens, key=key), whole)
    dropped = model(tokens, dropout_rate=0.5, key=key)
    assert (dropped != whole).any(axis=-1).all()
    assert (dropped != model(tokens, dropout_rate=0.5, key=jax.random.key(1))).any()


def test_dropout_sets_that_share_to_zero_and_keeps_the_mean():
    dropped = dropout(jnp.ones(100_000), 0.2, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.8)}
    assert float((dropped == 0).mean()) == pytest.approx(0.2, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)


def test_a_position_sees_itself_and_what_is_before_it_alone():
    model = Transformer(MICRO, nnx.Rngs(0))
    tokens = jnp.arange(16)[None]
    logits = model(tokens)
    assert logits.shape == (1, 16, 256)
    assert logits.dtype == jnp.float32
    changed = model(tokens.at[0, 9].set(77))
    np.testing.assert_array_equal(logits[:, :9], changed[:, :9])
    assert (logits[:, 9:] != changed[:, 9:]).any(axis=-1).all()


def test_remat_changes_no_logit():
    model = Transformer(MICRO, nnx.Rngs(0))
    tokens = jnp.arange(16)[None]
    np.testing.assert_array_equal(model(tokens), model(tokens, remat=True))


def test_bfloat16_computes_the_logits_to_its_precision_and_returns_float32():
    model = Transformer(MICRO, nnx.Rngs(0))
    tokens = jnp.arange(16)[None]
    wide, narrow = model(tokens), model(tokens, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.float32
    assert (narrow != wide).any()
    np.testing.assert_allclose(narrow, wide, atol=0.03 * float(jnp.abs(wide).max()))


# --- step -----------------------------------------------------------------------------------------


def batch_of(trainer, seed=0):
    rng = np.random.default_rng(seed)
    shape = trainer.run.config.batch_size, trainer.run.model.context + 1
    return mesh.global_batch(rng.integers(0, 256, shape).astype(np.int32), trainer.run.mesh)


def trainer_on(devices, mesh_config, row=None, traced=False, **settings):
    config = TrainConfig(model="micro", batch_size=8, mesh=mesh_config, **settings)
    return Trainer(resolve(config, row, jax.devices()[:devices]), traced=traced)


def test_accumulated_microbatches_give_the_gradient_of_the_whole_batch():
    whole = trainer_on(1, MeshConfig(), optimizer="adamw")
    cut = trainer_on(1, MeshConfig(), optimizer="adamw", accumulate=4)
    params, batch = whole.init().params, batch_of(whole)
    expected = jax.jit(whole.loss_and_gradient)(params, batch)
    actual = jax.jit(cut.loss_and_gradient)(params, batch)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("layers", "unrolled"), [(1, True), (2, True), (5, False)])
def test_few_layers_are_compiled_one_by_one_on_a_cpu(layers, unrolled):
    trainer = trainer_on(1, MeshConfig(), layers=layers)
    assert trainer.unroll == unrolled
    length = trainer.run.model.context
    loops = jax.make_jaxpr(trainer.logits)(trainer.init().params, jnp.zeros((1, length), jnp.int32))
    turns = [eqn.params["length"] for eqn in loops.eqns if eqn.primitive.name == "scan"]
    unrolls = [eqn.params["unroll"] for eqn in loops.eqns if eqn.primitive.name == "scan"]
    assert turns == [layers]
    assert unrolls == [layers if unrolled else 1]


def test_dropout_follows_the_seed_and_the_step_with_seeds_as_arguments_too():
    settings = {"optimizer": "adamw", "dropout": 0.5}
    losses = {}
    for traced in (False, True):
        trainer = trainer_on(1, MeshConfig(), traced=traced, **settings)
        params, batch = trainer.init(0).params, batch_of(trainer)
        for seed, step in ((0, 0), (0, 1), (1, 0)):
            if traced or seed == 0:
                other = trainer.at(trainer_on(1, MeshConfig(), seed=seed, **settings).run)
                state = trainer.init(0)._replace(params=params, step=jnp.int32(step))
                state = jax.tree.map(jnp.copy, state)
                losses[traced, seed, step] = float(other.step(state, batch, step)[1]["loss"])
        evaluated = float(trainer.evaluate(params, batch))
        plain = trainer_on(1, MeshConfig(), optimizer="adamw")
        assert evaluated == float(plain.evaluate(params, batch))
    assert losses[True, 0, 0] == pytest.approx(losses[False, 0, 0], rel=1e-6)
    assert losses[True, 0, 1] == pytest.approx(losses[False, 0, 1], rel=1e-6)
    assert len({round(loss, 6) for loss in losses.values()}) == 3
    assert trainer._step._cache_size() == 1


def without_key_bias(state):
    """The params, but for a bias that changes no logit: steps along it follow rounding errors."""
    params = nnx.to_pure_dict(jax.device_get(state.params))
    params["blocks"]["qkv_bias"] = params["blocks"]["qkv_bias"][:, [0, 2]]
    return jax.tree.leaves(params)


def test_eight_devices_step_as_one_does():
    params, losses = [], []
    for devices, layout in ((1, MeshConfig()), (8, MeshConfig(data=2, fsdp=2, tensor=2))):
        trainer = trainer_on(devices, layout, optimizer="sophia_g", warmup=0.0)
        state = trainer.init()
        for number in range(2):
            state, metrics = trainer.step(state, batch_of(trainer, number), number)
        params.append(without_key_bias(state))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for x, y in zip(*params, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sophia_g", "contrib_sophia"])
def test_a_step_whose_hyperparameters_are_arguments_is_the_step_of_those_hyperparameters(optimizer):
    values = {"learning_rate": 3e-3, "b1": 0.6, "warmup": 0.1, "steps": 20}
    alone = trainer_on(1, MeshConfig(), optimizer=optimizer, steps=STEPS)  # the comparison's step
    others = trainer_on(1, MeshConfig(), optimizer=optimizer, traced=True, **values)
    shared = others.at(alone.run)
    ends = []
    for trainer in (alone, shared):
        state = trainer.init(0)
        for number in range(3):
            state, _ = trainer.step(state, batch_of(trainer, number), number)
        ends.append(without_key_bias(state))
    for x, y in zip(*ends, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_other_hyperparameters_and_seeds_do_not_compile_a_traced_step_again():
    trainer = trainer_on(1, MeshConfig(), optimizer="sophia_g", traced=True)
    for seed, rate in ((0, 1e-3), (1, 1e-2)):
        settings = {"optimizer": "sophia_g", "learning_rate": rate, "steps": 20 + seed}
        other = trainer.at(trainer_on(1, MeshConfig(), **settings).run)
        _, metrics = other.step(other.init(seed), batch_of(other), 0)
        assert float(metrics["loss"]) > 0
    assert trainer._step._cache_size() == trainer.init._cache_size() == 1


def test_a_step_that_was_lowered_before_is_not_traced_again(monkeypatch):
    traced = []

    def counted(*args, step=Trainer.train_step):
        traced.append(args)
        return step(*args)

    monkeypatch.setattr(Trainer, "train_step", counted)
    trainer = trainer_on(1, MeshConfig())
    state, batch = trainer.init(), batch_of(trainer)
    trainer.lower(state, batch, trainer.program_at(0))
    trainer.step(state, batch, 0)
    assert len(traced) == 1


def test_an_estimator_that_is_in_no_table_gets_its_win_rate_logged_and_the_host_refresh():
    def unit(forward, params, batch):
        return lambda key: jax.tree.map(jnp.ones_like, params)

    row = Optimizer(
        sophia_g, OPTIMIZERS["sophia_g"].tiny, OPTIMIZERS["sophia_g"].large, Curvature(unit)
    )
    trainer = trainer_on(1, MeshConfig(), row=row, refresh="host", update_interval=2)
    state, refreshes = trainer.init(), []
    for number in range(3):
        state, metrics = trainer.step(state, batch_of(trainer), number)
        refreshes.append(int(state.opt_state[1][0].refreshes))
    assert refreshes == [1, 1, 2]
    assert trainer._step._cache_size() == 2
    assert {"win_rate", "gamma"} <= set(metrics)


def test_params_and_optimizer_state_are_born_in_shards():
    trainer = trainer_on(8, MeshConfig(data=1, fsdp=4, tensor=2), optimizer="sophia_g")
    state = trainer.init()
    params = jax.tree_util.tree_leaves_with_path(state.params)
    matrices = [p for path, p in params if p.ndim > 2 and "bias" not in jax.tree_util.keystr(path)]
    assert len(matrices) == 4
    for matrix in matrices:
        assert matrix.addressable_shards[0].data.size == matrix.size // 8
    moments = state.opt_state[1][0]
    for moment in (moments.mu, moments.nu):
        for x, (_, y) in zip(jax.tree.leaves(moment), params, strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_derivatives_are_laid_out_as_the_params_whatever_takes_them():
    trainer = trainer_on(8, MeshConfig(data=1, fsdp=4, tensor=2), optimizer="sophia_g")
    batch, expected = batch_of(trainer), jax.tree.leaves(trainer.shardings.params)

    def sum_of_logits(params):
        return trainer.forward.logits(params, batch[:, :-1]).sum()

    for function in (lambda params: trainer.loss(params, batch), sum_of_logits):
        jaxpr = jax.make_jaxpr(jax.grad(function))(trainer.abstract_state.params).jaxpr
        made = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
        assert [made[var].params.get("sharding") for var in jaxpr.outvars] == expected


def test_no_device_holds_a_whole_matrix_while_the_params_are_born():
    trainer = trainer_on(8, MeshConfig(data=1, fsdp=4, tensor=2), optimizer="sophia_g")
    program = trainer.init.lower().compile().as_text()
    shapes = [leaf.shape for leaf in jax.tree.leaves(trainer.abstract_state.params)]
    for shape in shapes:
        if np.prod(shape) > 512:
            assert f"[{','.join(map(str, shape))}]" not in program


def test_metrics_are_fetched_a_step_late_so_that_the_device_never_waits(corpus, monkeypatch):
    happened, step = [], Trainer.step

    def recorded(self, state, batch, number):
        happened.append(f"start {number}")
        return step(self, state, batch, number)

    def log(line):
        if "loss" in line:
            happened.append(f"log {line['step']}")

    monkeypatch.setattr(Trainer, "step", recorded)
    config = TrainConfig(
        model="micro", optimizer="adamw", steps=STEPS, batch_size=8, log_interval=1, eval_batches=1
    )
    fit(resolve(config, devices=jax.devices()[:1]), corpus, log=log, stop=lambda done: done == 4)
    assert happened == [
        "start 0", "start 1", "log 0", "start 2", "log 1", "start 3", "log 2", "log 3",
    ]  # fmt: skip


# --- from end to end ------------------------------------------------------------------------------


def test_a_comparison_leaves_plot_metrics_and_summary_and_prints_the_table(comparison):
    folder, _, (table,) = comparison
    for name in ("loss", "win_rate"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "gamma.png").exists()  # no gamma changes
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["runs"]) == [*OPTIMIZERS, "adamw_half"]
    assert 2 < summary["bigram_loss"] < 3
    assert [c.header for c in table.columns][1:] == [
        "steps", "validation loss", "step time", "on curvature", "win rate",
    ]  # fmt: skip
    assert table.row_count == len(OPTIMIZERS) + 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_lowers_both_losses(comparison, optimizer):
    _, records, _ = comparison
    mine = [r for r in records if r["run"] == optimizer]
    for name in ("loss", "val_loss"):
        losses = [r[name] for r in mine if name in r]
        assert losses[-1] < losses[0]


def test_all_optimizers_start_from_the_same_params_and_batch(comparison):
    _, records, _ = comparison
    assert len({r["loss"] for r in records if r["step"] == 0}) == 1


@pytest.mark.parametrize("optimizer", ["sophia_g", "sophia_h"])
def test_curvature_is_estimated_on_every_tenth_step_and_on_no_other(comparison, optimizer):
    _, records, _ = comparison
    rates = [r["win_rate"] for r in records if r["run"] == optimizer and "win_rate" in r]
    changes = [step for step in range(1, STEPS) if rates[step] != rates[step - 1]]
    assert changes == [10, 20]


def test_half_of_the_steps_have_a_schedule_of_their_own_length(comparison):
    folder, records, _ = comparison
    half = [r for r in records if r["run"] == "adamw_half" and "loss" in r]
    assert [r["step"] for r in half] == list(range(STEPS // 2))
    whole = [r for r in records if r["run"] == "adamw" and "loss" in r]
    assert half[0]["loss"] == whole[0]["loss"]
    assert half[-1]["loss"] != whole[STEPS // 2 - 1]["loss"]
    runs = json.loads((folder / "summary.json").read_text())["runs"]
    assert runs["adamw_half"]["steps"] == STEPS // 2
    assert runs["adamw_half"]["step_seconds"] == runs["adamw"]["step_seconds"]


def test_the_verdict_says_what_half_of_the_steps_were_enough_for():
    def row(loss, steps, diverged=None):
        return {"validation_loss": loss, "steps": steps, "diverged": diverged}

    runs = {"adamw": row(2.0, 10), "sophia_g": row(1.8, 10), "sophia_g_half": row(1.9, 5)}
    first, half = report.verdict(runs).split(". ")
    assert first == "sophia_g ends lowest, at 1.8000 nats a token: 0.1000 below sophia_g_half"
    assert half == "sophia_g_half ends 0.1000 below adamw, after 5 steps instead of 10."
    assert "0.1000 above adamw" in report.verdict(runs | {"sophia_g_half": row(2.1, 5)})
    for name in ("adamw", "sophia_g_half"):
        assert "instead of" not in report.verdict(runs | {name: row(1.9, 5, diverged=0)})


def test_half_takes_only_what_is_compared():
    assert list(compared(CompareConfig(optimizers=("adamw", "lion")))) == ["adamw", "lion"]
    with pytest.raises(UsageError, match=r"--half names 'lion', which is not compared"):
        compared(CompareConfig(optimizers=("adamw", "sophia_g"), half=("lion",)))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_results_in_it_is_left_as_it_is(comparison, capsys):
    folder, _, _ = comparison
    before = contents(folder)
    assert main(["train", "--out", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err
    assert contents(folder) == before


def test_the_share_of_curvature_is_what_refreshing_steps_take_more_than_others():
    result = Result([], [2.0] + [1.0] * 9, [True] + [False] * 9, 0.0)
    assert result.step_seconds == pytest.approx(1.1)
    assert result.curvature_share == pytest.approx(0.1 / 1.1)
    assert dataclasses.replace(result, refreshed=[False] * 10).curvature_share == 0.0


# --- Flax Linen -----------------------------------------------------------------------------------


LINEN = """
from examples import linen_lm
linen_lm.WIDTH, linen_lm.HEADS, linen_lm.LAYERS, linen_lm.CONTEXT = 16, 2, 1, 32
losses = linen_lm.main(steps=30, batch_size=16)
assert losses[-1] < losses[0] - 0.1, losses
"""


def test_the_linen_example_trains_in_shards_on_eight_devices():
    # By itself: checking types at run time, Flax's TrainState does not take shapes for arrays.
    subprocess.run(
        [sys.executable, "-W", "error", "-c", LINEN],
        cwd=worker.ROOT,
        env=worker.environment(devices=8),
        check=True,
        timeout=200,
    )


def test_the_linen_example_trains_on_batches_of_one():
    subprocess.run(
        [sys.executable, "-m", "examples.linen_lm", "--steps", "1", "--batch-size", "1"],
        cwd=worker.ROOT,
        env=worker.environment(devices=1),
        check=True,
        timeout=200,
    )


@pytest.mark.parametrize(("name", "absolute"), [("sophia_h", True), ("sophia_h_paper", False)])
def test_negative_curvature_steps_by_its_size_unless_the_row_is_the_papers(name, absolute):
    row = OPTIMIZERS[name]
    tx, _ = build(row, row.tiny, steps=100)
    params, grads = jnp.zeros(2), jnp.full(2, 0.1)
    state = tx.init(params)
    for _ in range(2):  # the first has a learning rate of zero
        updates, state = tx.update(
            grads, state, params, hessian_fn=lambda key: jnp.array([-1e3, 1e3])
        )
    assert jnp.allclose(updates[0], updates[1]) == absolute
