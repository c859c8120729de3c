"""The inverse of a masked convolution: every form of it against the definition and a dense
triangular solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.kernels import masked_conv as mc

# (b, h, w, c, k): odd sizes, one row, one column, one pixel, one image, windows larger than the
# image, h on either side of w
SHAPES = [
    (3, 4, 5, 3, 3),
    (2, 5, 3, 2, 2),
    (2, 1, 6, 2, 3),
    (2, 6, 1, 3, 3),
    (1, 3, 3, 1, 5),
    (3, 1, 1, 4, 3),
]
POINTWISE = (2, 4, 3, 3, 1)


def problem(b, h, w, c, k, dtype=np.float64, seed=0):
    """(y, kernel): the diagonal between 1/2 and 2, the other taps small enough for an inverse of
    order one."""
    rng = np.random.default_rng(seed)
    kernel = 0.5 * rng.normal(size=(k, k, c, c)) / (k * c**0.5)
    kernel[-1, -1] += np.diag(2 ** rng.uniform(-1, 1, c) - np.diag(kernel[-1, -1]))
    return jnp.asarray(rng.normal(size=(b, h, w, c)), dtype), jnp.asarray(kernel, dtype)


def matrix(h, w, kernel):
    """[h w c, h w c] with x.ravel() @ matrix = y.ravel(), straight from the definition."""
    k, _, c, _ = kernel.shape
    m = np.zeros((h, w, c, h, w, c))
    for i, j in np.ndindex(h, w):
        for a, b in np.ndindex(min(k, i + 1), min(k, j + 1)):
            tap = kernel[k - 1 - a, k - 1 - b]
            m[i - a, j - b, :, i, j] = tap if a or b else np.triu(tap)
    return m.reshape(h * w * c, h * w * c)


def dense(y, kernel):
    """The inverse by a dense triangular solve, to be differentiated by JAX."""
    size = y[0].size
    rows = mc.conv(jnp.eye(size, dtype=y.dtype).reshape(size, *y.shape[1:]), kernel).reshape(
        size, size
    )
    return jax.lax.linalg.triangular_solve(rows, y.reshape(-1, size), left_side=False).reshape(
        y.shape
    )


@pytest.mark.parametrize("shape", [*SHAPES, POINTWISE])
def test_convolution_and_inverse_are_a_triangular_matrix_and_its_solve(shape, x64):
    y, kernel = problem(*shape)
    b, h, w, _, _ = shape
    m = matrix(h, w, np.asarray(kernel))
    np.testing.assert_array_equal(m, np.triu(m))
    conv, inverse = jax.jit(lambda y, kernel: (mc.conv(y, kernel), mc.inverse(y, kernel)))(
        y, kernel
    )
    flat = np.asarray(y).reshape(b, -1)
    np.testing.assert_allclose(conv.reshape(b, -1), flat @ m, atol=1e-12)
    np.testing.assert_allclose(inverse.reshape(b, -1), np.linalg.solve(m.T, flat.T).T, atol=1e-10)


def test_convolution_is_xlas(x64):
    y, kernel = problem(2, 4, 5, 3, 3)
    masked = kernel.at[-1, -1].set(jnp.triu(kernel[-1, -1]))
    layout = ("NHWC", "HWIO", "NHWC")
    want = jax.lax.conv_general_dilated(
        y, masked, (1, 1), ((2, 0), (2, 0)), dimension_numbers=layout
    )
    np.testing.assert_allclose(mc.conv(y, kernel), want, atol=1e-12)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], POINTWISE])
def test_gradients_are_those_through_a_dense_triangular_solve(shape, x64):
    y, kernel = problem(*shape)
    grads = [
        jax.jit(jax.grad(lambda y, k, f=f: jnp.sum(jnp.sin(f(y, k))), (0, 1)))(y, kernel)
        for f in (mc.inverse, dense)
    ]
    for got, want in zip(*grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-10)
    lower = np.tril_indices(shape[3], -1)
    assert not np.any(grads[0][1][-1, -1][lower]) and np.all(
        grads[0][1][-1, -1][np.triu_indices(shape[3])]
    )


def test_forward_mode_and_second_derivatives_too(x64):
    y, kernel = problem(1, 2, 3, 2, 2)
    hessians = [
        jax.jit(jax.jacfwd(jax.grad(lambda k, y, f=f: jnp.sum(jnp.sin(f(y, k)))), (0, 1)))(
            kernel, y
        )
        for f in (mc.inverse, dense)
    ]
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-10), *hessians)


FORMS = {
    "xla": lambda u, taps: mc.wavefront(u, taps),
    "triton": lambda u, taps: mc._triton(u, taps, interpret=True),
    "mosaic": lambda u, taps: mc._mosaic(u, taps, interpret=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [*SHAPES, (2, 3, 4, 17, 2), (130, 2, 2, 1, 2)]
)  # 16 channels, 128 lanes and more
def test_forms_in_float32_are_the_reference_in_float64(form, shape):
    """1e-6 of the largest value: a few units of rounding of inverses of order one."""
    with jax.enable_x64(True):
        u, taps = problem(*shape)
        exact = np.asarray(jax.jit(mc.wavefront)(u, taps))
    got = jax.jit(FORMS[form])(*(jnp.asarray(np.asarray(a), jnp.float32) for a in (u, taps)))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, atol=1e-6 * np.abs(exact).max())


def test_pallas_has_the_gradients_and_batches_of_the_reference():
    y, kernel = problem(2, 4, 3, 2, 2, np.float32)
    ys, kernels = jnp.stack([y, 2 * y]), jnp.stack([kernel, 0.5 * kernel])

    def run(implementation):
        def loss(y, kernel):
            return jnp.sum(jnp.sin(mc.inverse(y, kernel, implementation=implementation)))

        both = jax.vmap(jax.grad(loss, (0, 1)))(ys, kernels)
        return (
            both,
            jax.vmap(jax.grad(loss), (None, 0))(y, kernels),
            jax.vmap(loss, (0, None))(ys, kernel),
        )

    got, want = (
        jax.jit(run, static_argnums=0)(implementation) for implementation in ("pallas", None)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), got, want)


def lowered(platform, implementation):
    """What the gradient of a batched inverse becomes on a platform: (Triton kernels, Mosaic
    kernels, loops)."""
    y, kernel = problem(2, 16, 16, 12, 3, np.float32)

    def loss(kernel):
        return jnp.sum(mc.inverse(y, kernel, implementation=implementation))

    gpu = jax.sharding.AbstractDevice(
        "NVIDIA H100 80GB HBM3", None, "gpu"
    )  # which GPU it is lowered for, where none is
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu if platform == "cuda" else None)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.vmap(jax.grad(loss))).trace(jnp.stack([kernel, kernel]))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    return tuple(
        text.count(word) for word in ("__gpu$xla.gpu.triton", "tpu_custom_call", "stablehlo.while")
    )


def test_each_platform_gets_its_own_kernel_and_no_other(monkeypatch):
    """A solve and a transposed one: two kernels, or two loops. On the CPU Pallas is interpreted, by
    loops."""
    assert [lowered(p, "pallas") for p in ("cuda", "tpu")] == [(2, 0, 0), (0, 2, 0)]
    assert lowered("cpu", "pallas")[:2] == (0, 0) and lowered("cpu", None) == lowered(
        "tpu", "xla"
    ) == (0, 0, 2)
    monkeypatch.setattr(mc, "_MEASURED", frozenset({"cuda"}))
    assert [lowered(p, None) for p in ("cpu", "cuda", "tpu")] == [(0, 0, 2), (2, 0, 0), (0, 0, 2)]


def test_choice_gives_its_reasons(monkeypatch):
    monkeypatch.setattr(mc, "_MEASURED", frozenset({"tpu"}))
    image = (64, 32, 32, 12)
    assert mc.choice("tpu", image, jnp.float32)[0] == "pallas"
    for args, reason in [
        (("cpu", image, jnp.float32), "only interpreted"),
        (("cuda", image, jnp.float32), "nobody has timed the Pallas kernel on cuda"),
        (("tpu", image, jnp.float64), "float32, got float64"),
        (("tpu", (1, 8, 8, 65), jnp.float32), "64 channels, got .* and 65"),
        (("tpu", (1, 64, 64, 24), jnp.float32, (5, 5)), "products a diagonal"),
        (("tpu", (1, 128, 128, 16), jnp.float32), "bytes of fast memory"),
    ]:
        implementation, why = mc.choice(*args)
        assert implementation == "xla"
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(why)


def test_types_extremes_and_bad_input():
    y, kernel = problem(2, 4, 5, 2, 3, np.float32)
    x = mc.inverse(y.astype(jnp.bfloat16), kernel)
    assert x.dtype == jnp.bfloat16 and mc.conv(x, kernel).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        x.astype(jnp.float32), mc.inverse(y, kernel), atol=0.05
    )  # inputs rounded to 8 bits
    # taps of 30 in a 4 x 5 image reach about 1e14, which a float32 still holds
    for hard in (
        30 * jnp.ones_like(kernel),
        kernel.at[-1, -1].set(jnp.diag(jnp.asarray([1e-2, 1e6]))),
    ):
        grads = jax.jit(jax.grad(lambda y, k: jnp.sum(mc.inverse(y, k)), (0, 1)))(y, hard)
        assert np.all(np.isfinite(mc.inverse(y, hard))) and all(
            np.all(np.isfinite(g)) for g in grads
        )
    for call, message in [
        (
            lambda: mc.inverse(y, kernel, implementation="cuda"),
            "None, 'xla' or 'pallas', got 'cuda'",
        ),
        (
            lambda: mc.inverse(
                jnp.ones((1, 9, 9, 65)), jnp.ones((2, 2, 65, 65)), implementation="pallas"
            ),
            "64 channels",
        ),
        (lambda: mc.inverse(y[0], kernel), r"got \[4, 5, 2\] and \[3, 3, 2, 2\]"),
        (lambda: mc.conv(y, kernel[..., :1]), r"got \[2, 4, 5, 2\] and \[3, 3, 2, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
