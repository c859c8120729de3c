"""gather_params: the same value and gradients, whatever the loss is made of, and what it keeps for
the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jflow import bijectors, distributions, flows, losses, nets, train

# One device: the constraints are all there, and hold. What they give on eight is seen in
# tests/processes/test_train_devices.py.
MESH = train.data_mesh(jax.devices()[:1])
RULES = ((".*", train.fsdp(min_size=1)),)
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
DEPTH, WIDTH = 5, 16
PARAMS = {
    "in": jax.random.normal(jax.random.key(0), (4, WIDTH)) / 2,
    "layers": {
        "w": jax.random.normal(jax.random.key(1), (DEPTH, WIDTH, WIDTH)) / 4,
        "b": jax.random.normal(jax.random.key(2), (DEPTH, WIDTH)),
    },
    "shared": jax.random.normal(jax.random.key(3), (WIDTH, WIDTH)) / 4,
}


def layer(h, p, shared):
    return h + jax.nn.gelu(
        jnp.sin(h @ p["w"] + p["b"][None]) @ shared
    )  # gelu has a rule of its own for derivatives


def plain(params, key, batch, frozen=None):
    h = batch["x"] @ params["in"]
    h, norms = jax.lax.scan(
        lambda h, p: ((h := layer(h, p, params["shared"])), jnp.mean(h**2)),
        h,
        params["layers"],
        reverse=True,
    )
    return jnp.mean(h**2), {"norms": norms, "noise": jax.random.normal(key)}


def remat(params, key, batch, frozen=None):
    body = jax.checkpoint(lambda h, p: layer(h, p, params["shared"]), prevent_cse=False)
    h, _ = jax.lax.scan(
        lambda h, p: (body(h, p), None), batch["x"] @ params["in"], params["layers"], unroll=2
    )
    return jnp.mean(h**2), {}


def nested(params, key, batch, frozen=None):
    """A scan over heads of each layer inside the scan over layers; the layers inside a jitted
    function."""

    @jax.jit
    def run(h, layers, scale):
        def one(h, p):
            h, _ = jax.lax.scan(lambda h, w: (h + jnp.sin(h @ w), None), h, p["w"][None] * scale)
            return h, None

        return jax.lax.scan(one, h, layers)[0]

    h = run(batch["x"] @ params["in"], params["layers"], frozen["scale"])
    return jnp.mean((h @ params["shared"]) ** 2) + jnp.sum(params["layers"]["b"] ** 2), {}


def carried(params, key, batch, frozen=None):
    """Weights as constants and carries of a scan, not slices; and one that is not used."""
    (h, _), _ = jax.lax.scan(
        lambda c, _: ((jnp.sin(c[0] @ c[1]), c[1]), None),
        (batch["x"] @ params["in"], params["shared"]),
        length=3,
    )
    return jnp.mean(h**2), {}


def as_loss(flow):
    return losses.nll(flow), flow.init(jax.random.key(0), X)


def coupling(**options):
    def one(order):
        net = nets.MLP((8,), jnp.tanh)
        return bijectors.chain(
            bijectors.permute(order),
            bijectors.coupling(bijectors.univariate.affine(), net, split=2),
        )

    orders = np.stack([np.roll(np.arange(4), 2)] * 4)
    return flows.flow(bijectors.scan(one, 4, xs=orders, **options), distributions.normal((4,)))


@pytest.mark.parametrize(
    ("loss", "params"),
    [
        (plain, PARAMS),
        (remat, PARAMS),
        (nested, PARAMS),
        (carried, PARAMS),
        as_loss(coupling()),
        as_loss(coupling(remat=True)),
        as_loss(coupling(reversible=True)),
    ],
    ids=["plain", "remat", "nested", "carried", "flow", "remat flow", "reversible flow"],
)
def test_value_metrics_and_gradients_are_those_of_the_loss(loss, params):
    args = (params, jax.random.key(7), {"x": X}, {"scale": jnp.float32(0.5)})
    one, other = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(*args)
        for f in (loss, train.gather_params(loss, MESH, RULES))
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=2e-5, atol=1e-6
        )  # float32: XLA may fuse one another way


def kept(loss):
    """Shapes of what is kept for the backward pass."""
    vjp = jax.eval_shape(
        lambda p: jax.vjp(lambda p: loss(p, jax.random.key(0), {"x": X})[0], p)[1], PARAMS
    )
    return sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "shape"))


def deep(params, key, batch, frozen=None):
    """A scan that forgets by jax.checkpoint inside another one."""
    body = jax.checkpoint(lambda h, p: layer(h, p, params["shared"]), prevent_cse=False)

    def outer(h, p):
        return jax.lax.scan(lambda h, _: (body(h, p), None), h, length=2)[0], None

    return jnp.mean(jax.lax.scan(outer, batch["x"] @ params["in"], params["layers"])[0] ** 2), {}


@pytest.mark.parametrize("loss", [plain, remat, deep])
def test_gathered_weights_are_not_kept(loss):
    """Once the stacked weights themselves, split; gathered ones beside them would be a second
    time."""
    shapes = kept(train.gather_params(loss, MESH, RULES))
    assert shapes.count((DEPTH, WIDTH, WIDTH)) == 1
    activations = lambda shapes: [s for s in shapes if s[:2] == (DEPTH, len(X))]  # noqa: E731
    assert len(activations(shapes)) == len(activations(kept(loss)))  # and activations as without


def constraints(jaxpr):
    """Specs of all sharding constraints, inner jaxprs included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            found.append(tuple(eqn.params["sharding"].spec))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            found += constraints(inner) if hasattr(inner, "eqns") else []
    return found


def test_other_axes_stay_split_and_whole_leaves_pass():
    mesh = train.make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    rules = [("layers/w", P(("data", "model"), None)), ("in", P("model", None))]
    program = jax.make_jaxpr(train.gather_params(plain, mesh, rules))(
        PARAMS, jax.random.key(0), {"x": X}
    )
    assert constraints(program.jaxpr) == [(("data", "model"), None), ("model", None)]
