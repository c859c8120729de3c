"""Kernels over columns: against the transformers they stand for, block by block, and by finite
differences."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import kernels, nets
from jflow.bijectors import coupling, scales, univariate
from jflow.bijectors.splines import rational_quadratic_knots
from jflow.kernels import affine, columns, logistic_mixture, rational_quadratic

SPLINE = univariate.rational_quadratic(5, implementation="plain")
# the kernel, the transformer that is its reference, and a scale for raw numbers
MAPS = {
    "spline": (rational_quadratic.transform, SPLINE),
    "spline of one bin": (rational_quadratic.transform, None),
    "spline of two bins": (
        rational_quadratic.transform,
        univariate.rational_quadratic(2, implementation="plain"),
    ),
    "affine": (partial(affine.transform, log_scale=scales.bounded()), univariate.affine()),
    "mixture": (logistic_mixture.transform, univariate.logistic_mixture(2)),
}
BOTH = [pytest.param(False, id="forward"), pytest.param(True, id="inverse")]


def columns_of(name, d, n, dtype=None, spread=1.0, seed=0):
    size = 2 if MAPS[name][1] is None else MAPS[name][1].size
    rng = np.random.default_rng((seed, d, n))
    x, raw = 3 * rng.normal(size=(d, n)), spread * rng.normal(size=(size, d, n))
    return jnp.asarray(x, dtype), jnp.asarray(raw, dtype)


def reference(name, inverse, x, raw):
    """By the transformer, its raw numbers last."""
    transformer = MAPS[name][1]
    y, log_slope = (transformer.inverse if inverse else transformer.forward)(
        x, jnp.moveaxis(raw, 0, -1)
    )
    return y, jnp.sum(log_slope, axis=0)


def scalar(f):
    """Something that both outputs enter, each number with a weight of its own."""

    def of(x, raw):
        y, log_det = f(x, raw)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(log_det) * log_det)

    return of


def with_gradients(f):
    """(x, raw) -> (the outputs of f, the gradients of `scalar`), which the same pass gives."""

    def of(x, raw):
        outputs = f(x, raw)
        return scalar(lambda *args: outputs)(x, raw), outputs

    def run(x, raw):
        gradients, outputs = jax.grad(of, (0, 1), has_aux=True)(x, raw)
        return outputs, gradients

    return jax.jit(run)


@cache
def differentiated(name, inverse):
    """One program for the tests in float64."""
    return with_gradients(partial(MAPS[name][0], inverse=inverse))


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("name", [name for name in MAPS if MAPS[name][1]])
def test_values_and_gradients_are_the_transformers(x64, name, inverse):
    args = columns_of(name, 3, 40, spread=2.0)
    plain = with_gradients(partial(reference, name, inverse))
    found, expected = (jax.device_get(f(*args)) for f in (differentiated(name, inverse), plain))
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
        assert np.any(b != 0)


@pytest.mark.parametrize("inverse", BOTH)
def test_spline_of_one_bin_is_the_identity(inverse):
    x, raw = columns_of("spline of one bin", 3, 10)
    y, log_det = rational_quadratic.transform(x, raw, inverse=inverse)
    np.testing.assert_allclose(y, x, atol=2e-6)  # two units of rounding of the box
    np.testing.assert_allclose(log_det, 0, atol=2e-6)


@pytest.mark.parametrize("inverse", BOTH)
def test_numbers_at_a_knot_lie_in_one_bin(inverse):
    """If two loops each search for the bin, rounding can give them different ones: the corner of
    one, the size of the other.

    What loops there are is up to the optimizer: tests/processes/test_as_users_compile.py runs this
    with it.
    """
    _, raw = columns_of("spline", 8, 500, jnp.float32)
    knots = rational_quadratic_knots(jnp.moveaxis(raw, 0, -1))[1 if inverse else 0]
    for j in range(1, 5):
        x = knots[..., j]
        found, _ = jax.jit(partial(rational_quadratic.transform, inverse=inverse))(x, raw)
        expected, _ = reference("spline", inverse, x, raw)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("name", ["spline", "spline of two bins", "affine", "mixture"])
def test_gradients_by_finite_differences(x64, name, inverse):
    args = jax.device_get(columns_of(name, 3, 40, spread=0.5, seed=4))
    run, rng = differentiated(name, inverse), np.random.default_rng(5)
    _, gradients = run(*args)
    for which, gradient in enumerate(gradients):  # of x, of raw: each number once
        along = rng.normal(size=gradient.shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = [a + step * along if i == which else a for i, a in enumerate(args)]
            y, log_det = jax.device_get(run(*moved)[0])
            ends.append(np.sin(y).sum() + (np.cos(log_det) * log_det).sum())
        slope = np.sum(gradient * along)
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("name", ["spline", "affine", "mixture"])
def test_float32_against_the_reference_in_float64(name, inverse):
    """Root mean square 1e-6 of the values, of a spline's but for one in fifty, where it is steep;
    those, too, are no further off than the reference's own float32 may be, which in other draws
    misses 1e-6 likewise."""
    kernel = jax.jit(partial(MAPS[name][0], inverse=inverse))
    plain = jax.jit(partial(reference, name, inverse))
    for d, n in [(1, 1), (7, 65)]:
        x, raw = columns_of(name, d, n, jnp.float32)
        with jax.enable_x64(True):
            exact = plain(
                jnp.asarray(np.asarray(x), jnp.float64), jnp.asarray(np.asarray(raw), jnp.float64)
            )
        for found, rounded, true in zip(kernel(x, raw), plain(x, raw), exact, strict=True):
            scale = np.sqrt(np.mean(np.square(true)))
            squares = np.sort(np.square(found - true), axis=None)
            steep = len(squares) // 50 if name == "spline" else 0
            assert np.sqrt(np.mean(squares[: len(squares) - steep])) <= 1e-6 * max(1, scale)
            assert np.max(np.abs(found - true)) <= 2 * np.max(np.abs(rounded - true)) + 1e-5 * max(
                1, scale
            )


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("affine", (1, 1)),
        ("affine", (9, 128)),
        *((name, (3, 130)) for name in ("spline of two bins", "affine", "mixture")),
    ],
    ids=str,
)
def test_pallas_is_xla_block_by_block(monkeypatch, name, inverse, shape):
    kernel = partial(MAPS[name][0], inverse=inverse)
    args = columns_of(name, *shape, jnp.float32, spread=0.5)
    both = with_gradients(kernel)(*args)
    # one row of x in each block; of one kernel also all rows in one
    for rows in (2**20, 1) if shape == (9, 128) else (1,):
        monkeypatch.setattr(columns, "_BLOCK", rows)
        found = with_gradients(partial(kernel, implementation="pallas"))(*args)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(both), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("inverse", BOTH)
def test_pallas_spline_of_five_bins(inverse):
    args = columns_of("spline", 2, 140, jnp.float32)
    found = rational_quadratic.transform(*args, inverse=inverse, implementation="pallas")
    for a, b in zip(found, rational_quadratic.transform(*args, inverse=inverse), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_pallas_computes_in_float32(dtype):
    x, raw = columns_of("affine", 2, 20, dtype)
    y, _ = affine.transform(x, raw, log_scale=scales.bounded(), implementation="pallas")
    exact, _ = affine.transform(
        x.astype(jnp.float32), raw.astype(jnp.float32), log_scale=scales.bounded()
    )
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, exact.astype(dtype))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("name", ["spline", "affine", "mixture"])
def test_pallas_lowers_for_accelerators(name, inverse, platform):
    blocked = partial(MAPS[name][0], implementation="pallas", inverse=inverse)
    args = columns_of(name, 3, 130, jnp.float32)
    gpu = jax.sharding.AbstractDevice(
        "NVIDIA H100 80GB HBM3", None, "gpu"
    )  # what it is lowered for, where none is
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu if platform == "cuda" else None)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = with_gradients(blocked).trace(*args)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("tpu_custom_call" if platform == "tpu" else "triton") == 2  # there and back


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("name", ["spline", "affine", "mixture"])
def test_extreme_numbers_stay_finite(name, inverse):
    kernel = partial(MAPS[name][0], inverse=inverse)
    x = jnp.asarray([[0.0, 5.0, -5.0, 4.9999995, 1e6, -1e6, 3.0, -3.0]])
    rng = np.random.default_rng(0)
    size = MAPS[name][1].size
    run = with_gradients(kernel)
    for spread in (20.0, 1e3):
        raw = jnp.asarray(spread * rng.normal(size=(size, 1, 8)), jnp.float32)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(run(x, raw)))


def test_bad_input_is_refused():
    x, raw = columns_of("affine", 2, 3, jnp.float32)
    transform = partial(affine.transform, log_scale=scales.bounded())
    with pytest.raises(
        ValueError, match=r"x \[d, n\] and raw \[2, d, n\], got \[2, 3\] and \[2, 3, 2\]"
    ):
        transform(x, raw.swapaxes(1, 2))
    with pytest.raises(
        ValueError, match="expected implementation None, 'xla' or 'pallas', got 'triton'"
    ):
        transform(x, raw, implementation="triton")
    with pytest.raises(TypeError, match="one floating type, got float32 and bfloat16"):
        transform(x, raw.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"3\*bins - 1, d, n\], got \[3, 2, 3\]"):
        rational_quadratic.transform(x, jnp.zeros((3, 2, 3)))
    with pytest.raises(ValueError, match=r"3\*components \+ 2, d, n\], got \[3, 2, 3\]"):
        logistic_mixture.transform(x, jnp.zeros((3, 2, 3)))
    with pytest.raises(ValueError, match="'pallas' or 'plain', got 'fast'"):
        univariate.rational_quadratic(implementation="fast")
    with (
        jax.enable_x64(True),
        pytest.raises(TypeError, match="float32, bfloat16 and float16, not float64"),
    ):
        transform(x.astype(jnp.float64), raw.astype(jnp.float64), implementation="pallas")


def test_explain_names_the_choice_and_the_reason(monkeypatch):
    assert "nobody has timed the Pallas kernel on tpu" in kernels.explain(
        affine, (2, 8, 16), platform="tpu"
    )
    monkeypatch.setattr(columns, "_MEASURED", frozenset({"cuda"}))
    assert kernels.explain(affine, (2, 8, 16), platform="cuda").endswith(
        "cuda: pallas (faster than XLA on cuda)"
    )
    assert kernels.explain(rational_quadratic, (23, 8, 4096), platform="cpu").startswith(
        "rational_quadratic of float32[23, 8, 4096] on cpu: xla (Pallas is only interpreted"
    )
    assert "not float64" in kernels.explain(affine, (2, 8, 16), jnp.float64, "cuda")
    with pytest.raises(ValueError, match=r"\[size, d, n\], got \[2, 8\]"):
        kernels.explain(affine, (2, 8))


@pytest.mark.parametrize(
    "event, axis, net",
    [((5,), -1, nets.MLP((8,))), ((4, 3, 5), -1, nets.GlowNet(8, 8))],
    ids=["vector", "image"],
)
def test_couplings_give_their_kernel_what_they_give_the_transformer(x64, event, axis, net):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, *event)) * 2)
    layers = [
        coupling(univariate.rational_quadratic(4, implementation=i), net, split=2, axis=axis)
        for i in (None, "plain")
    ]
    params = layers[0].init(jax.random.key(0), x)
    params["head"] = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(1), p.shape) / 4, params["head"]
    )
    for direction in ("forward", "inverse"):
        found, expected = (jax.jit(getattr(layer, direction))(params, x) for layer in layers)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-10, atol=1e-10)
