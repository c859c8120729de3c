"""Block neural autoregressive maps: the triangle, FlowJAX's network, onto the reals, mass one, the
inverse's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def with_noise(bijector, x, cond=None, scale=0.5):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(bijector.init, jax.random.key(0), x, cond)
    return jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(x.dtype), shapes)


def test_the_jacobian_is_triangular_with_a_positive_diagonal():
    bijector = bj.block_autoregressive(4, 3, 2)
    params = with_noise(bijector, X)
    jacobian = np.asarray(
        jax.jit(jax.jacrev(lambda x: bijector.forward(params, x[None])[0][0]))(X[0])
    )
    np.testing.assert_array_equal(jacobian != 0, np.tri(4))
    assert np.all(np.diag(jacobian) > 0)


def test_it_is_flowjaxs_network(x64):
    """Its weights, with softplus and weight normalization worked in, and an open gate."""
    import paramax
    from flowjax.bijections import BlockAutoregressiveNetwork

    d, h, c, depth = 3, 4, 2, 2
    x, cond = (np.random.default_rng(i).normal(size=(6, n)) for i, n in enumerate((d, c)))
    with jax.numpy_rank_promotion("allow"):
        theirs = paramax.unwrap(
            BlockAutoregressiveNetwork(
                jax.random.key(0), dim=d, cond_dim=c, depth=depth, block_dim=h, activation=leaky()
            )
        )
        expected = jax.vmap(theirs.transform_and_log_det)(jnp.asarray(x), jnp.asarray(cond))
    widths, layers = [1, h, h, 1], {}
    for i, (linear, _) in enumerate(theirs.layers):
        weight = np.asarray(linear.weight).reshape(d, widths[i + 1], d, widths[i])
        own = np.stack([np.log(weight[j, :, j].T) for j in range(d)]) + np.log(widths[i])
        layers[str(i)] = {
            "own": own,
            "others": weight.transpose(2, 3, 0, 1),
            "bias": linear.bias.reshape(d, -1),
        }
    layers["0"]["cond"] = np.asarray(theirs.cond_linear.weight).T.reshape(c, d, h)
    params = {"layers": layers, "gate": np.full(d, 800.0)}
    bijector = bj.block_autoregressive(d, h, depth, leak=0.2)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, jax.eval_shape(bijector.init, jax.random.key(0), x, cond)
    )
    y, log_det = jax.jit(bijector.forward)(params, x, cond)
    np.testing.assert_allclose(y, expected[0], atol=1e-12)
    np.testing.assert_allclose(log_det, expected[1], atol=1e-12)


def leaky():
    """FlowJAX takes any scalar function and differentiates it."""
    return lambda x: jnp.tanh(x) + 0.2 * x


def test_starts_near_the_identity():
    bijector = bj.block_autoregressive(4)
    params = bijector.init(jax.random.key(0), X)
    y, log_det = jax.jit(bijector.forward)(params, X)
    assert np.max(np.abs(y - X)) < 0.5 and np.max(np.abs(log_det)) < 1
    assert np.corrcoef(y.reshape(-1), X.reshape(-1))[0, 1] > 0.98


@pytest.mark.parametrize("gate", [0.0, 40.0])
def test_every_number_has_a_preimage_and_the_mass_is_one(gate):
    """Large weights, with the gate open too, where the published tanh would lose mass: y from -30
    to 30 comes back; then the density of the map's preimage under a normal, over the plane."""
    bijector = bj.block_autoregressive(2, 3, 2)
    params = with_noise(bijector, X[:, :2], scale=1.0)
    params["gate"] = np.full(2, gate, np.float32)

    # sinh-spaced: the leak is 0.1, so that with the gate open the tails are up to 100 times the
    # body's width
    u = np.linspace(-1, 1, 1201) * np.arcsinh(3000.0)
    axis, size = np.sinh(u), np.cosh(u) * (u[1] - u[0])
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    y = (
        np.stack(np.meshgrid(*[np.linspace(-30, 30, 7)] * 2, indexing="ij"), -1)
        .reshape(-1, 2)
        .astype(np.float32)
    )

    @jax.jit
    def run(params):
        z, log_det = bijector.forward(params, grid)
        x, _ = bijector.inverse(params, y)
        return log_det - jnp.sum(z**2, axis=1) / 2 - jnp.log(2 * jnp.pi), bijector.forward(
            params, x
        )[0]

    log_prob, again = run(params)
    np.testing.assert_allclose(again, y, atol=2e-4)  # of 30, in float32
    mass = np.sum(
        np.exp(np.asarray(log_prob, np.float64)) * np.multiply.outer(size, size).reshape(-1)
    )
    assert abs(mass - 1) < 2e-3


def test_gradients_of_the_inverse_undo_those_of_forward(x64):
    """d x / d params at fixed y = -(dy/dx)^-1 dy/dparams, against central differences of the
    inverse itself too."""
    bijector = bj.block_autoregressive(4, 3, 1)
    x, cond = X.astype(float), X[:, :2].astype(float)
    params = with_noise(bijector, x, cond)

    def loss(params, y, cond):
        x, log_det = bijector.inverse(params, y, cond)
        return jnp.sum(jnp.sin(x)) + jnp.sum(log_det**2)

    args = (params, x, cond)
    step = jax.tree.map(lambda p: np.random.default_rng(p.size).normal(size=p.shape), args)
    grads, values = jax.jit(
        lambda: (
            jax.grad(loss, argnums=(0, 1, 2))(*args),
            [loss(*jax.tree.map(lambda p, d, e=e: p + e * d, args, step)) for e in (1e-5, -1e-5)],
        )
    )()
    along = sum(
        jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True)
    )
    np.testing.assert_allclose(along, (values[0] - values[1]) / 2e-5, rtol=1e-6)


def test_bad_configurations_are_errors():
    for options, said in (
        ({"features": 0}, "features to be a whole number of at least 1, got 0"),
        ({"features": 2, "num_layers": 0}, "num_layers to be a whole number of at least 1, got 0"),
        ({"features": 2, "leak": 0.0}, "leak > 0"),
    ):
        with pytest.raises(ValueError, match=said):
            bj.block_autoregressive(**options)
    bijector = bj.block_autoregressive(4)
    with pytest.raises(ValueError, match=r"\[b, 4\], got \[5, 2\]"):
        bijector.init(jax.random.key(0), X[:, :2])
    with pytest.raises(ValueError, match="expected no cond, since init had none"):
        bijector.forward(bijector.init(jax.random.key(0), X), X, X)
    params = bijector.init(jax.random.key(0), X, X[:, :2])
    with pytest.raises(ValueError, match="cond of 2 numbers a row, as at init, got 3"):
        bijector.forward(params, X, X[:, :3])
