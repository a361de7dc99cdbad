"""The examples beyond language: what they say of curvature, exactly, and that they run."""

import functools
import itertools
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sophia_optax
from tests import oracles
from tests.trainer import worker

pytest.importorskip("sklearn", reason="the examples need scikit-learn")

from examples import contrastive, vision

_rng = np.random.default_rng(0)
ALPHA = 0.3


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(_rng.normal(size=shape), jnp.float32)


def gauss_newton_diagonal(
    outputs_fn: Any, loss_of_outputs: Any, params: Any, *batches: Any
) -> np.ndarray:
    """The diagonal of Jᵀ (∇²_z L) J: the Hessian is that of the loss in all its outputs at once.

    Both functions take what there is of `batches` after their first argument; each is an array
    with an axis of batches, and then the result has a row for each.
    """
    flat = oracles.flatten(params)

    def diagonal(*batch):
        z = outputs_fn(flat.rebuild(flat.vector), *batch)
        jacobian = jax.jacrev(lambda v: outputs_fn(flat.rebuild(v), *batch))(flat.vector)
        hessian = jax.hessian(loss_of_outputs)(z, *batch).reshape(z.size, z.size)
        jacobian = jacobian.reshape(z.size, -1)
        return jnp.einsum("an,ab,bn->n", jacobian, hessian, jacobian)

    with jax.enable_x64(True):
        return np.asarray(oracles.jit(jax.vmap(diagonal) if batches else diagonal)(*batches))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(vision, "WIDTH", 8)
    monkeypatch.setattr(vision, "BLOCKS", 1)


# --- smoothed labels ------------------------------------------------------------------------------

INPUTS, LABELS = normal(6, 3), jnp.array([0, 1, 2, 3, 1, 1])
WEIGHTS = normal(3, 4)


def logits_fn(params: Any) -> jax.Array:
    return jnp.tanh(INPUTS.astype(params.dtype) @ params)


def smoothed(logits: jax.Array) -> jax.Array:
    return vision.smoothed_cross_entropy(logits, LABELS, ALPHA)


def test_smoothing_changes_the_gradient_and_not_the_hessian_in_the_logits():
    def plain(logits):
        return vision.smoothed_cross_entropy(logits, LABELS, 0.0)

    logits = logits_fn(WEIGHTS)
    assert np.abs(jax.grad(smoothed)(logits) - jax.grad(plain)(logits)).max() > 0.02
    np.testing.assert_allclose(
        oracles.hessian(smoothed, logits), oracles.hessian(plain, logits), atol=1e-12
    )


def test_the_categorical_likelihood_is_the_gauss_newton_matrix_of_a_smoothed_loss():
    hessian_fn = sophia_optax.gauss_newton_bartlett(logits_fn, WEIGHTS)
    samples = oracles.many(hessian_fn, seed=0, n=16384)
    oracles.assert_unbiased(samples, gauss_newton_diagonal(logits_fn, smoothed, WEIGHTS))


def test_drawn_labels_that_are_smoothed_count_their_mean_as_curvature():
    # E[B ĝ²] = (1 - α)² G + B ḡ², with ḡ the gradient of the mean loss on labels p.
    logits, pullback = jax.vjp(logits_fn, WEIGHTS)
    batch, p = len(logits), jax.nn.softmax(logits)

    def wrong(key):
        drawn = jax.random.categorical(key, logits)
        loss = jax.grad(lambda z: vision.smoothed_cross_entropy(z, drawn, ALPHA))
        return batch * jnp.square(pullback(loss(logits))[0])

    samples = oracles.many(wrong, seed=0, n=16384)
    exact = gauss_newton_diagonal(logits_fn, smoothed, WEIGHTS)
    (mean,) = pullback(ALPHA * (p - 0.25) / batch)
    expected = (1 - ALPHA) ** 2 * exact + batch * np.square(np.ravel(mean))
    oracles.assert_unbiased(samples, expected)
    with pytest.raises(AssertionError):
        oracles.assert_unbiased(samples, exact)


# --- a given variance -----------------------------------------------------------------------------

TARGETS, SIGMAS = normal(6, 4), jnp.exp(normal(6, 1))


@pytest.mark.parametrize("sigma", [0.2, SIGMAS], ids=["one", "each"])
@pytest.mark.parametrize("sampling", ["labels", "curvature_propagation"])
def test_gaussian_over_sigma_is_the_hessian_of_a_linear_model(sigma, sampling):
    def loss_fn(params):
        return 0.5 * jnp.mean(jnp.square((TARGETS - INPUTS @ params) / sigma))

    hessian_fn = sophia_optax.gauss_newton_bartlett(
        lambda params: INPUTS @ params / sigma,
        WEIGHTS,
        likelihood=sophia_optax.gaussian,
        sampling=sampling,
    )
    samples = oracles.many(hessian_fn, seed=0, n=16384)
    oracles.assert_unbiased(samples, oracles.hessian_diagonal(loss_fn, WEIGHTS))


def test_weights_cannot_say_what_sigma_is():
    def estimate(**arguments):
        return sophia_optax.gauss_newton_bartlett(
            lambda params: INPUTS @ params, WEIGHTS, likelihood=sophia_optax.gaussian, **arguments
        )(jax.random.key(0))

    weights = jnp.full((6, 1), 1 / 0.2**2)
    np.testing.assert_allclose(estimate(weights=weights), estimate(), rtol=1e-5)


def test_the_pixels_outputs_are_those_of_their_loss(tiny):
    task = vision.pixels()
    batch = jax.tree.map(lambda leaf: leaf[:2], vision.digits()["train"])
    params = jax.jit(task.init)(0)
    outputs = jax.jit(task.outputs)(params, batch)
    targets = batch["images"][:, 4:].reshape(-1, 32) / vision.SIGMA
    residual = 0.5 * jnp.mean(jnp.square(outputs - targets))
    np.testing.assert_allclose(jax.jit(task.loss)(params, batch), residual, rtol=1e-5)


# --- a contrastive loss ---------------------------------------------------------------------------

PAIRS = 5
IMAGES, CAPTIONS, DIGITS = normal(PAIRS, 3), normal(PAIRS, 2), np.array([0, 1, 0, 2, 3])
TOWERS = {"image": normal(3, 2), "caption": normal(2, 2), "log_scale": jnp.float32(1.0)}


def similarity(params: Any, rows: Any = slice(None)) -> jax.Array:
    images = contrastive.normalized(IMAGES[rows] @ params["image"])
    captions = contrastive.normalized(CAPTIONS[rows] @ params["caption"])
    return jnp.exp(params["log_scale"]) * images @ captions.T


def loss_of(labels: np.ndarray, weights: Any = None) -> Any:
    """The contrastive loss as a function of the logits [B, B]."""
    return lambda z: contrastive.contrastive_loss(
        contrastive.directions(z, labels, weights), weights
    )


def exact(rows: Any, weights: Any = None) -> np.ndarray:
    """The Gauss-Newton diagonal of the contrastive loss of some of the pairs."""
    rows = np.asarray(rows)
    return gauss_newton_diagonal(
        lambda params: similarity(params, rows), loss_of(DIGITS[rows], weights), TOWERS
    )


def many(hessian_fn: Any, n: int) -> np.ndarray:
    """Independent estimates, `[n, d]`, some at a time.

    Of more than a few thousand at once, jaxlib 0.10 for CPU gets products of the later ones wrong.
    """
    keys = jax.random.split(jax.random.key(0), n)
    tree = oracles.jit(lambda keys: jax.lax.map(hessian_fn, keys, batch_size=512))(keys)
    columns = [np.asarray(x, np.float64).reshape(n, -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(columns, axis=1)


def estimated(weights: Any = None, n: int = 16384) -> np.ndarray:
    hessian_fn = sophia_optax.gauss_newton_bartlett(
        lambda params: contrastive.directions(similarity(params), DIGITS, weights),
        TOWERS,
        weights=None if weights is None else weights[None],
    )
    return many(hessian_fn, n)


ALL = tuple(range(PAIRS))
PADDED = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])


def test_the_loss_is_the_mean_over_both_directions_without_duplicates():
    z = np.asarray(similarity(TOWERS), np.float64)
    wrong = np.not_equal.outer(DIGITS, DIGITS) | np.eye(PAIRS, dtype=bool)
    rows, columns = (np.log(np.sum(np.exp(z), axis=axis, where=wrong)) for axis in (1, 0))
    expected = 0.5 * np.mean(rows - np.diagonal(z)) + 0.5 * np.mean(columns - np.diagonal(z))
    np.testing.assert_allclose(loss_of(DIGITS)(jnp.asarray(z)), expected, rtol=1e-5)


def test_rows_and_columns_give_the_gauss_newton_matrix_of_both_directions():
    samples = estimated()
    oracles.assert_unbiased(samples, exact(ALL))
    oracles.assert_rejects_a_factor(samples, exact(ALL), 2, 0.5, PAIRS, 1 / PAIRS)


def test_by_hand_the_factor_is_two_for_each_pair():
    predictions, pullback = jax.vjp(
        lambda params: contrastive.directions(similarity(params), DIGITS), TOWERS
    )

    def by_hand(key):
        drawn = jax.random.categorical(key, predictions)
        residual = jax.nn.softmax(predictions) - jax.nn.one_hot(drawn, PAIRS)
        (g,) = pullback(residual / (2 * PAIRS))
        return jax.tree.map(lambda leaf: 2 * PAIRS * jnp.square(leaf), g)

    oracles.assert_unbiased(many(by_hand, 16384), exact(ALL))


def test_a_masked_duplicate_is_never_drawn_nor_pulled_back():
    predictions, pullback = jax.vjp(lambda z: contrastive.directions(z, DIGITS), similarity(TOWERS))
    keys = jax.random.split(jax.random.key(0), 256)
    residuals = jax.vmap(sophia_optax.categorical.sample_residual, (0, None))(keys, predictions)
    assert np.all(np.isfinite(residuals))
    assert np.all(residuals[:, :, [0, 2], [2, 0]] == 0)
    (cotangent,) = pullback(jnp.ones_like(predictions))
    assert np.all(cotangent[np.array([0, 2]), np.array([2, 0])] == 0)


def test_padding_with_weight_and_mask_is_as_if_it_were_not_there():
    oracles.assert_unbiased(estimated(PADDED), exact(ALL[:4]))
    np.testing.assert_allclose(exact(ALL, PADDED), exact(ALL[:4]), rtol=1e-5, atol=1e-12)

    def loss_fn(params, rows, weights):
        return loss_of(DIGITS[rows], weights)(similarity(params, rows))

    np.testing.assert_allclose(
        loss_fn(TOWERS, np.array(ALL), PADDED), loss_fn(TOWERS, np.array(ALL[:4]), None), rtol=1e-6
    )


def test_a_weight_alone_leaves_padding_as_a_wrong_answer():
    def without_mask(z):
        predictions = contrastive.directions(z, DIGITS)
        return contrastive.contrastive_loss(predictions, PADDED)

    found = gauss_newton_diagonal(similarity, without_mask, TOWERS)
    assert np.abs(found - exact(ALL[:4])).max() > 0.05 * exact(ALL[:4]).max()


def test_the_hutchinson_estimate_sees_through_masks_and_weights():
    def loss_fn(params):
        return loss_of(DIGITS, PADDED)(similarity(params))

    samples = oracles.many(sophia_optax.hutchinson(loss_fn, TOWERS), seed=0, n=16384)
    oracles.assert_unbiased(samples, oracles.hessian_diagonal(loss_fn, TOWERS))


def test_a_part_of_the_batch_is_another_loss():
    pairs = np.array(list(itertools.combinations(ALL, 2)))

    def loss(z, rows):
        return loss_of(jnp.asarray(DIGITS)[rows])(z)

    parts = gauss_newton_diagonal(similarity, loss, TOWERS, pairs)
    assert parts.mean(axis=0).sum() < 0.8 * exact(ALL).sum()


def test_a_part_of_the_predictions_among_all_candidates_is_the_same_loss():
    def loss(z, weights):
        # A weight of zero is no padding here: the pair stays a candidate.
        return contrastive.contrastive_loss(contrastive.directions(z, DIGITS), weights)

    parts = gauss_newton_diagonal(lambda p, _: similarity(p), loss, TOWERS, np.eye(PAIRS))
    np.testing.assert_allclose(parts.mean(axis=0), exact(ALL), rtol=1e-5)


def test_the_exact_curvature_of_the_scale_can_be_negative():
    params = {**TOWERS, "log_scale": jnp.float32(-2.0)}

    def aligned(params):  # as in towers that are right already, but for the scale
        return jnp.exp(params["log_scale"]) * 2 * jnp.eye(PAIRS)

    hessian = oracles.hessian_diagonal(lambda p: loss_of(np.arange(PAIRS))(aligned(p)), params)
    newton = gauss_newton_diagonal(aligned, loss_of(np.arange(PAIRS)), params)
    assert hessian["log_scale"] < 0 < newton[-1]


# --- training -------------------------------------------------------------------------------------


def run_of(make, name, steps):
    tx, estimator = vision.optimizers(steps)[name]
    return functools.partial(vision.train, make(), tx, estimator, vision.digits(), steps)


@pytest.mark.parametrize(
    "make, name",
    [
        (vision.pixels, "sophia_g"),
        (vision.classes, "sophia_h"),
        *((contrastive.captions, n) for n in vision.optimizers(20)),
    ],
)
def test_every_optimizer_trains_on_what_it_is_given(tiny, make, name):
    shapes = jax.eval_shape(run_of(make, name, 20), 0)
    assert shapes["training"].shape == (20,)
    assert set(shapes["test"]) > {"loss"}
    assert ("win_rate" in shapes) == name.startswith("sophia")


def test_duplicate_captions_are_masked_in_the_task(tiny):
    task = contrastive.captions()
    batch = jax.tree.map(lambda leaf: leaf[:32], vision.digits()["train"])
    outputs = jax.jit(task.outputs)(jax.jit(task.init)(0), batch)
    same = np.equal.outer(*[np.asarray(batch["labels"])] * 2) & ~np.eye(32, dtype=bool)
    assert same.any()
    for direction in np.asarray(outputs):
        assert np.array_equal(np.isneginf(direction), same)


def test_a_run_learns_and_repeats_itself(tiny):
    run = jax.jit(run_of(vision.pixels, "sophia_g", 60))
    first, again = run(0), run(0)
    assert first["training"][-10:].mean() < 0.8 * first["training"][:10].mean()
    np.testing.assert_array_equal(first["training"], again["training"])


def test_copied_out_of_the_repository_the_examples_run(tmp_path):
    folder = tmp_path / "examples"
    folder.mkdir()
    for name in ("__init__", "arguments", "vision", "contrastive"):
        shutil.copy(worker.ROOT / "examples" / f"{name}.py", folder)
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "sophia_optax").symlink_to(worker.ROOT / "sophia_optax")
    small = (
        "import sys; from examples import vision, contrastive; "
        "vision.WIDTH, vision.BLOCKS = 8, 1; "
        "sys.argv = ['', '--steps', '10', '--optimizers', 'adamw', 'sophia_g_eigenbasis']; "
        "vision.main({'captions': contrastive.captions})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", small],
        cwd=tmp_path,
        env={**worker.environment(devices=1), "PYTHONPATH": str(tmp_path / "installed")},
        check=True,
        capture_output=True,
        text=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        ["captions", "adamw"],
        ["captions", "sophia_g_eigenbasis"],
    ]
    assert all(np.isfinite(float(line[3])) for line in lines)
