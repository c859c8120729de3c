"""Every public bijector constructor against every promise of `types.Bijector`."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import called_twice
from keys import KEYS, keys_consumed_twice

from jflow import bijectors as bj
from jflow import guidance, nets
from jflow.types import Bijector

B = 6


class Row(NamedTuple):
    make: Any  # () -> Bijector
    event: tuple[int, ...] = (4,)
    cond: Any = None  # (b) -> cond
    support: Any = staticmethod(lambda z: z)  # reals -> the data side's support
    extreme: bool = True  # finite at +-1e6 both ways
    precision: float = 2e-5  # float32 round trip, in units of x
    wide: bool = True  # both sides are all of the reals
    outside: tuple[float, float] = (-1e6, -1.5)  # of the support, where it is not wide
    any_channels: bool = (
        False  # takes twice the channels too; what it refuses is in tests/bijectors/test_image.py
    )


def mlp():
    return nets.MLP((16,), nn.tanh)


affine, spline = bj.univariate.affine(), bj.univariate.rational_quadratic(4, 3.0)
swaps = np.stack([np.array([1, 2, 3, 0]), np.array([3, 1, 0, 2]), np.array([0, 1, 2, 3])])
vector = lambda b: jax.random.normal(jax.random.key(11), (b, 3))  # noqa: E731
labels = lambda b: jnp.arange(b) % 3  # noqa: E731
tree = lambda b: {"a": vector(b), "b": vector(b)[:, 0]}  # noqa: E731


def stack(**options):
    return bj.scan(
        lambda p: bj.chain(bj.permute(p), bj.lu(4), bj.coupling(affine, mlp(), split=2)),
        3,
        xs=swaps,
        **options,
    )


class PixelNet(nn.Module):
    @nn.compact
    def __call__(self, x, cond=None):
        return nn.tanh(nn.Conv(8, (3, 3))(x))


def causal(**options):
    """A causal block of 3 tokens, sampled in the order 2, 0, 1."""
    net = nets.CausalTransformer(
        width=8, num_layers=2, num_heads=2, num_classes=options.pop("num_classes", None)
    )
    return bj.causal_block(net, order=[2, 0, 1], **options)


def published(order):
    """A block that leaves its first token as it is, whatever cond."""
    net = nets.TarFlowTransformer(2, 8, 2, 2, num_classes=3)
    return bj.causal_block(net, order=order, max_log_scale=1.0)  # two unbounded ones lose digits


def made(transformer, **options):
    return bj.autoregressive(
        transformer, nets.MADE(transformer.size, (16,), activation=nn.tanh, **options)
    )


checker = (np.indices((4, 4)).sum(0) % 2 == 0)[..., None]

POSITIVE = bj.supports.positive()

TABLE = {
    "actnorm": Row(lambda: bj.actnorm(4)),
    "actnorm image": Row(lambda: bj.actnorm(2), event=(4, 4, 2)),
    "affine": Row(lambda: bj.affine((4,))),
    "amortized": Row(
        lambda: bj.amortized(bj.chain(bj.affine((4,)), bj.planar(4)), mlp()), cond=vector
    ),
    "amortized of nothing": Row(lambda: bj.amortized(bj.radial(4), mlp())),
    # the transformers that are missing here are under a coupling, and in the elementwise contract
    "autoregressive affine": Row(lambda: made(affine)),
    "autoregressive mixture": Row(
        lambda: made(bj.univariate.logistic_mixture(2)), event=(3,), precision=1e-4
    ),
    "autoregressive spline": Row(lambda: made(spline, order=(2, 0, 3, 1)), precision=1e-4),
    "autoregressive on cond": Row(lambda: bj.invert(made(affine, order=(3, 2, 1, 0))), cond=vector),
    "autoregressive on a pytree": Row(
        lambda: bj.autoregressive(
            affine,
            nets.MADE(2, (12, 12), adjacency=np.eye(4, k=-2, dtype=bool), residual=True),
            passes=2,
        ),
        cond=tree,
    ),
    "block_autoregressive on cond": Row(
        lambda: bj.invert(bj.block_autoregressive(4, 3, 2)), cond=vector
    ),
    "causal_block on cond": Row(causal, event=(3, 2), cond=vector),
    "causal_block of TarFlowTransformer": Row(
        lambda: bj.scan(published, 2, xs=np.array([[2, 0, 1], [1, 0, 2]])),
        event=(3, 2),
        cond=labels,
    ),
    "causal_block by Jacobi": Row(
        lambda: causal(num_classes=3, sampler=bj.decoding.jacobi(2, tol=1e-11)),
        event=(3, 2),
        cond=labels,
    ),
    "causal_block guided": Row(
        lambda: causal(
            num_classes=3,
            guide=guidance.extrapolate(guidance.linear_ramp(0.5), null=3, temperature=1.5),
        ),
        event=(3, 2),
        cond=labels,
    ),
    "chain": Row(lambda: bj.chain(bj.affine((4,)), bj.reverse(), bj.lu(4))),
    "chain of none": Row(lambda: bj.chain()),
    "checkerboard": Row(lambda: bj.checkerboard(), event=(2, 4, 3), any_channels=True),
    "conditioned": Row(
        lambda: bj.conditioned(bj.coupling(affine, mlp(), split=2), nn.Embed(3, 5)), cond=labels
    ),
    "coupling affine": Row(lambda: bj.coupling(affine, mlp(), split=2)),
    "coupling shift": Row(lambda: bj.coupling(bj.univariate.shift(), mlp(), split=1)),
    "coupling spline": Row(lambda: bj.coupling(spline, mlp(), split=2), precision=1e-4),
    "coupling free spline": Row(
        lambda: bj.coupling(bj.univariate.free_rational_quadratic(4, 3.0), mlp(), split=2),
        precision=1e-4,
    ),
    "coupling circular spline": Row(
        lambda: bj.coupling(
            bj.univariate.circular_rational_quadratic(4), nets.Periodic(mlp()), split=2
        ),
        precision=1e-4,
    ),
    "coupling circular shift": Row(
        lambda: bj.coupling(bj.univariate.circular_shift(), nets.Periodic(mlp()), split=2)
    ),
    "coupling mixed": Row(
        lambda: bj.coupling(bj.univariate.mixed(spline, affine, [True, False]), mlp(), split=2),
        precision=1e-4,
    ),
    "coupling logistic mixture": Row(
        lambda: bj.coupling(bj.univariate.logistic_mixture(3), mlp(), split=2), precision=1e-4
    ),
    "coupling deep sigmoidal": Row(
        lambda: bj.coupling(bj.univariate.deep_sigmoidal(3), mlp(), split=2), precision=1e-4
    ),
    "coupling unconstrained monotone": Row(
        lambda: bj.coupling(bj.univariate.unconstrained_monotone(2), mlp(), split=2), precision=1e-4
    ),
    "coupling sinh arcsinh": Row(lambda: bj.coupling(bj.univariate.sinh_arcsinh(), mlp(), split=2)),
    "coupling on cond": Row(lambda: bj.coupling(affine, mlp(), split=2), cond=vector),
    "coupling on a pytree": Row(lambda: bj.coupling(affine, mlp(), split=2), cond=tree),
    "coupling of everything": Row(lambda: bj.coupling(affine, mlp(), split=0), cond=vector),
    "coupling of channels": Row(lambda: bj.coupling(affine, PixelNet(), split=1), event=(4, 4, 3)),
    "coupling of rows": Row(
        lambda: bj.coupling(affine, PixelNet(), split=2, axis=1), event=(4, 4, 2)
    ),
    "elementwise spline": Row(lambda: bj.elementwise(spline, (4,)), precision=1e-4),
    "given_rest": Row(
        lambda: bj.chain(
            bj.given_rest(bj.amortized(bj.projective(2), mlp()), slice(0, 2), bj.pair_products),
            bj.given_rest(bj.amortized(bj.affine((2,)), mlp()), slice(2, 4)),
        ),
        cond=vector,
    ),
    "haar": Row(lambda: bj.haar(), event=(2, 4, 2), any_channels=True),
    "householder": Row(lambda: bj.householder(4)),
    "householder image": Row(lambda: bj.householder(3, 2), event=(2, 2, 3)),
    "indicated": Row(lambda: bj.indicated(bj.coupling(affine, mlp(), split=2), 3)),
    "indicated on cond": Row(
        lambda: bj.indicated(bj.coupling(affine, mlp(), split=2), 3), cond=vector
    ),
    "invert": Row(lambda: bj.invert(bj.chain(bj.actnorm(4), bj.lu(4)))),
    "invertible_conv_1x1": Row(lambda: bj.invertible_conv_1x1(2), event=(4, 4, 2)),
    "linear": Row(lambda: bj.linear(4), precision=1e-4),  # a random matrix may be badly conditioned
    "linear image": Row(lambda: bj.linear(2), event=(4, 4, 2), precision=1e-4),
    "logit": Row(
        lambda: bj.invert(bj.logit()),
        support=jax.nn.sigmoid,
        extreme=False,
        wide=False,
        precision=1e-4,
    ),
    "lu": Row(lambda: bj.lu(4)),
    "lu image": Row(lambda: bj.lu(2), event=(4, 4, 2)),
    "masked_conv": Row(lambda: bj.masked_conv(2), event=(3, 4, 2)),
    "masked_conv for densities": Row(
        lambda: bj.invert(bj.masked_conv(3, 2, corner=(1, 0))), event=(3, 2, 3)
    ),
    "masked_coupling": Row(
        lambda: bj.masked_coupling(affine, mlp(), np.array([True, False, True, False]))
    ),
    "masked_coupling checkerboard": Row(
        lambda: bj.masked_coupling(affine, PixelNet(), checker), event=(4, 4, 2)
    ),
    "on_part": Row(
        lambda: bj.on_part(bj.chain(bj.actnorm(2), bj.lu(2)), slice(1, 3)), any_channels=True
    ),
    "on_part of a scale": Row(
        lambda: bj.on_part(bj.chain(bj.squeeze(), bj.lu(8), bj.invert(bj.squeeze())), slice(0, 2)),
        event=(2, 2, 3),
        any_channels=True,
    ),
    "permute": Row(lambda: bj.permute([2, 0, 3, 1])),
    "planar": Row(lambda: bj.planar(4)),
    "projective": Row(lambda: bj.projective(4)),
    "projective of several": Row(lambda: bj.projective(4), event=(2, 4)),
    "qr": Row(lambda: bj.qr(4)),
    "qr image": Row(lambda: bj.qr(3, 2), event=(2, 2, 3)),
    "radial": Row(lambda: bj.radial(4)),
    "reshape": Row(lambda: bj.reshape((2, 2), (4,)), event=(2, 2)),
    "residual": Row(lambda: bj.residual(nets.LipschitzMLP((8, 8), coeff=0.7))),
    "residual of images": Row(
        lambda: bj.residual(nets.LipschitzConv((3,), (3, 1), coeff=0.7, activation=nn.elu)),
        event=(3, 2, 2),
    ),
    "residual on cond": Row(
        lambda: bj.residual(
            nets.LipschitzMLP((8,), coeff=0.7, orders=(1, 2, 1), activation=nn.tanh)
        ),
        cond=vector,
    ),
    "reverse": Row(lambda: bj.reverse()),
    "robust_standardize": Row(lambda: bj.robust_standardize((4,))),
    "scan": Row(stack),
    "scan shared": Row(
        lambda: bj.scan(bj.coupling(affine, mlp(), split=2), 3, shared=("net",)), cond=vector
    ),
    "scan shared and indicated": Row(
        lambda: bj.scan(bj.indicated(bj.coupling(affine, mlp(), split=2), 3), 3, shared=("net",))
    ),
    "scan reversible": Row(lambda: stack(reversible=True), cond=None),
    "scan reversible=3": Row(lambda: stack(reversible=3), cond=vector),
    "sigmoid": Row(
        lambda: bj.sigmoid(), support=jax.nn.sigmoid, extreme=False, wide=False, precision=1e-4
    ),
    "sigmoid margin": Row(
        lambda: bj.sigmoid(0.05), support=jax.nn.sigmoid, extreme=False, wide=False, precision=1e-4
    ),
    "softplus": Row(
        lambda: bj.softplus(), support=jax.nn.softplus, wide=False, extreme=False, precision=1e-4
    ),
    "tokens": Row(lambda: bj.tokens((4, 2, 1), 2), event=(2, 4)),
    "supports.columns": Row(
        lambda: bj.supports.columns(POSITIVE, None, bj.supports.interval(0, 1), POSITIVE),
        support=lambda z: jnp.stack(
            [jnp.exp(z[:, 0]), z[:, 1], jax.nn.sigmoid(z[:, 2]), jnp.exp(z[:, 3])], axis=1
        ),
        extreme=False,
        wide=False,
        precision=1e-4,
    ),
    "supports.greater_than": Row(
        lambda: bj.supports.greater_than(-1.0),
        support=lambda z: jnp.exp(z) - 1,
        extreme=False,
        wide=False,
        precision=1e-4,
    ),
    "supports.interval": Row(
        lambda: bj.supports.interval(-1.0, 3.0),
        support=lambda z: 4 * jax.nn.sigmoid(z) - 1,
        extreme=False,
        wide=False,
        precision=1e-4,
    ),
    "supports.less_than": Row(
        lambda: bj.supports.less_than(1.0),
        support=lambda z: 1 - jnp.exp(-z),
        extreme=False,
        wide=False,
        outside=(1e6, 1.5),
        precision=1e-4,
    ),
    "supports.positive": Row(
        lambda: POSITIVE, support=jnp.exp, extreme=False, wide=False, precision=1e-4
    ),
    "sylvester": Row(lambda: bj.sylvester(4)),
    "sylvester of rank 2": Row(lambda: bj.sylvester(4, 2, reflections=0)),
    "squeeze": Row(lambda: bj.squeeze(), event=(2, 4, 2), any_channels=True),
    "squeeze undone": Row(lambda: bj.invert(bj.squeeze(3)), event=(1, 2, 9), any_channels=True),
    "standardize": Row(lambda: bj.standardize((4,))),
    "standardize image": Row(lambda: bj.standardize((4, 4, 2)), event=(4, 4, 2)),
    "tanh": Row(lambda: bj.tanh(), support=jnp.tanh, wide=False, extreme=False, precision=1e-4),
    "whiten": Row(lambda: bj.whiten((4,))),
    "whiten image": Row(lambda: bj.whiten((2, 2, 1)), event=(2, 2, 1)),
}
EXCUSED = {
    "InverseInfo": "what autoregressive_inverse reports",
    "TokenGuide": "what guides causal_block, tests/flows/test_transformer_flows.py",
    "autoregressive_inverse": "the inverse with its report, tests/bijectors/test_autoregressive.py",
    "check": "a test of bijectors, tests/bijectors/test_checking.py",
    "jacobi": "a solver, tests/bijectors/test_autoregressive.py",
    "sequential": "a solver, tests/bijectors/test_autoregressive.py",
    "masks": "numpy arrays, tests/bijectors/test_masks.py",
    "scales": "plain functions, tests/bijectors/test_univariate.py",
    "log_dets": "estimators, tests/bijectors/test_residual.py",
    "indexed": "a Transport, tests/contracts/test_transport_contract.py",
    "pair_products": "a plain function, tests/flows/test_rotations.py",
    "rotation_matrix": "not square, tests/flows/test_rotations.py",
    "vae": "a Transport, tests/contracts/test_transport_contract.py",
    "decoding": "samplers of causal blocks, tests/bijectors/test_tarflow.py",
    "supports": "a module, whose names are in the table",
    "supports.integers": "a Transport, tests/contracts/test_transport_contract.py",
    "supports.simplex": "not square, tests/bijectors/test_supports.py",
    "splines": "plain functions, tests/bijectors/test_splines.py",
    "univariate": "Elementwise, tests/contracts/test_elementwise_contract.py",
    "rebuild_error": "not a bijector, tests/bijectors/test_combinators.py",
    **dict.fromkeys(
        (
            "augment",
            "drop",
            "hamiltonian",
            "langevin",
            "metropolis",
            "truncated_normal_dequantization",
            "uniform_dequantization",
            "variational_dequantization",
        ),
        "Transports, tests/contracts/test_transport_contract.py",
    ),
}


HELD = {  # never trained
    "robust_standardize": ["log_std"],
    "standardize": ["log_std"],
    "whiten": ["mean", "lower", "log_diagonal"],
}


def test_every_public_name_is_in_the_table():
    public = set(bj.__all__) | {f"supports.{name}" for name in bj.supports.__all__}
    assert public == {name.split()[0] for name in TABLE} | set(EXCUSED)


@functools.cache
def setup(name, dtype=jnp.float32):
    """(row, bijector, params away from their initial values, z, x, cond)"""
    row, rng = TABLE[name], np.random.default_rng(1)
    bijector = row.make()
    assert isinstance(bijector, Bijector)
    cond = None if row.cond is None else row.cond(B)
    draw = lambda shape, scale: jnp.asarray(scale * rng.normal(size=shape), dtype)  # noqa: E731
    z = draw((B, *row.event), 1.0)
    key = jax.random.key(0)
    there = jax.eval_shape(
        lambda: bijector.forward(bijector.init(key, z, cond, side="source"), z, cond)[0]
    )
    x = row.support(draw(there.shape, 1.0))
    initial = jax.eval_shape(lambda: bijector.init(key, x, cond))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(initial))
    return row, bijector, jax.tree.map(lambda leaf: draw(leaf.shape, 0.3), initial), z, x, cond


@functools.cache
def measured(name):
    """What the float32 tests look at, under strict promotion of types: in one compilation for each
    row that takes every input, and called outside jit, which compiles once for all of them."""
    row, bijector, params, z, x, cond = setup(name)
    traces = []

    def at(apply, along_out, *args):
        """Outputs, and the gradients of along_out . out + sum(log_det)."""
        (out, log_det), pullback = jax.vjp(apply, *args)
        grad = pullback((along_out, jnp.ones_like(log_det)))
        return {"out": out, "log_det": log_det, "grad": grad}

    @jax.jit
    def both(params, z, x, cond, along_x, along_z):
        traces.append(1)
        forward = at(lambda z: bijector.forward(params, z, cond), along_x, z)
        return forward, at(lambda p, x: bijector.inverse(p, x, cond), along_z, params, x)

    def run(z, x, cond=cond, along_z=None):
        return both(
            params, z, x, cond, jnp.ones_like(x), jnp.ones_like(z) if along_z is None else along_z
        )

    def there_and_back(z, x):
        forward, inverse = run(z, x)
        again, back = run(inverse["out"], forward["out"], along_z=forward["grad"][0])
        return {
            "x_of_z": forward["out"],
            "z_of_x": inverse["out"],
            "forward_log_det": forward["log_det"],
            "z_again": back["out"],
            "inverse_log_det": back["log_det"],
            "x_again": again["out"],
            "grad_there_and_back": back["grad"][1],
        }

    with jax.numpy_dtype_promotion("strict"):
        calls = {
            "init": lambda: bijector.init(jax.random.key(0), x, cond),
            "init from the source": lambda: bijector.init(
                jax.random.key(0), z, cond, side="source"
            ),
            "forward": lambda: bijector.forward(params, z, cond),
            "inverse": lambda: bijector.inverse(params, x, cond),
        }
        r = there_and_back(z, x)
        with jax.numpy_dtype_promotion("standard"):
            r["bfloat16"] = jax.jit(bijector.forward)(params, z.astype(jnp.bfloat16), cond)
        r["without jit"], r["compiled again"] = called_twice(**calls)
        r["grads"] = run(z, x, along_z=jnp.cos(r["z_of_x"]))[1]["grad"][0]  # of the sum of sin(z)
        r["missing"] = there_and_back(missing(z), missing(x))
        if row.extreme:
            r["extreme"] = run(1e6 * jnp.sign(z), 1e6 * jnp.sign(x))
        if not row.wide:
            r["outside"] = [run(z, jnp.full_like(x, outside))[1] for outside in row.outside]
        if cond is not None:
            other = jax.tree.map(
                lambda c: c[::-1] + 1 if jnp.issubdtype(c.dtype, jnp.floating) else (c + 1) % 3,
                cond,
            )
            r["other cond"] = run(z, x, other)[0]["out"]
    r["traces"] = len(traces)
    return jax.device_get((z, x, r))


def missing(x):
    """x with a NaN in row 2."""
    return x.at[(2, *[0] * (x.ndim - 1))].set(jnp.nan)


@pytest.mark.parametrize("name", TABLE)
def test_a_missing_number_is_missing_in_its_row_alone(name):
    """Neither outside of a support nor a reason for a mapping to invent a number."""
    _, _, r = measured(name)
    others = np.arange(B) != 2
    for what in ("x_of_z", "z_again", "x_again", "forward_log_det", "inverse_log_det"):
        value = np.asarray(r["missing"][what])
        np.testing.assert_array_equal(value[others], r[what][others], what)
        assert not np.any(np.isinf(value[2])) and (
            np.any(np.isnan(value[2])) or "log_det" in what
        ), what


@pytest.mark.parametrize("name", TABLE)
def test_round_trips_and_log_dets(name):
    z, x, r = measured(name)
    precision = TABLE[name].precision
    np.testing.assert_allclose(r["z_again"], z, atol=10 * precision, rtol=10 * precision)
    np.testing.assert_allclose(r["x_again"], x, atol=10 * precision)
    np.testing.assert_allclose(r["forward_log_det"], -r["inverse_log_det"], atol=1e-3)
    assert r["forward_log_det"].shape == r["inverse_log_det"].shape == (B,)
    assert r["forward_log_det"].dtype == jnp.float32 and r["x_of_z"].dtype == z.dtype


@pytest.mark.parametrize("name", TABLE)
def test_init_is_finite_from_both_sides_and_alike_in_shape(name):
    _, bijector, params, _, x, cond = setup(name)
    for call in ("init", "init from the source"):
        initial = measured(name)[2]["without jit"][call]
        assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, params)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(initial))
    with pytest.raises(ValueError, match="'data' or 'source'"):
        jax.eval_shape(lambda: bijector.init(jax.random.key(0), x, cond, side="left"))


@pytest.mark.parametrize("name", TABLE)
def test_log_det_is_the_jacobians_in_float64(name, x64):
    _, bijector, params, z, x, cond = setup(name, jnp.float64)

    def one(row, c):
        out, log_det = bijector.forward(params, row[None], jax.tree.map(lambda leaf: leaf[None], c))
        return out.reshape(-1), (out[0], log_det[0])

    @jax.jit
    def run(z, x):
        rows = jax.vmap(jax.jacrev(one, has_aux=True), in_axes=(0, None if cond is None else 0))
        jacobian, forward = rows(z, cond)
        inverse = bijector.inverse(params, x, cond)
        return forward, inverse, jnp.linalg.slogdet(jacobian.reshape(B, z[0].size, z[0].size))[1]

    (x_of_z, log_det), (z_of_x, inverse_log_det), exact = run(z, x)
    np.testing.assert_allclose(log_det, exact, atol=1e-9)
    (x_again, back), (z_again, there), exact = run(z_of_x, x_of_z)
    np.testing.assert_allclose(back, exact, atol=1e-9)
    for found, expected, precision in (
        (z_again, z, 1e-7),
        (x_again, x, 1e-7),
        (there, -log_det, 1e-7),
        (inverse_log_det, -back, 1e-7),
    ):
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, atol=precision)


@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_finite_and_reach_every_parameter(name):
    for path, g in jax.tree_util.tree_leaves_with_path(measured(name)[2]["grads"]):
        assert np.all(np.isfinite(g)), jax.tree_util.keystr(path)
        held = path[-1].key in HELD.get(name.split()[0], ())
        assert np.any(g != 0) != held, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", TABLE)
def test_the_gradient_of_the_inverse_takes_back_the_one_of_the_map(name):
    """What was 1 . x + log_det along the map is 1 . x again: the log-dets cancel."""
    _, _, r = measured(name)
    np.testing.assert_allclose(r["grad_there_and_back"], np.ones_like(r["x_of_z"]), atol=2e-3)


@pytest.mark.parametrize("name", TABLE)
def test_jit_changes_nothing_and_traces_once(name):
    """vmap is in the Jacobians above: what it gives, row by row, the inverse takes back."""
    _, _, r = measured(name)
    assert r["traces"] == 1
    eager = r["without jit"]["forward"]
    np.testing.assert_allclose(eager[0], r["x_of_z"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(eager[1], r["forward_log_det"], atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(
        r["without jit"]["inverse"][0], r["z_of_x"], atol=TABLE[name].precision, rtol=1e-5
    )


@pytest.mark.parametrize("name", TABLE)
def test_without_jit_a_second_call_compiles_nothing(name):
    assert not measured(name)[2]["compiled again"]


@pytest.mark.parametrize("name", TABLE)
def test_keys_are_consumed_once(name):
    _, bijector, params, z, x, cond = setup(name)
    calls = lambda a, b, c: (  # noqa: E731
        bijector.init(a, x, cond),
        bijector.init(b, z, cond, side="source"),
        bijector.inverse(params, x, cond, key=c),
    )
    assert not keys_consumed_twice(calls, *KEYS[:3])


@pytest.mark.parametrize("name", TABLE)
def test_bfloat16_is_kept_and_finite(name):
    x, log_det = measured(name)[2]["bfloat16"]
    assert x.dtype == jnp.bfloat16 and log_det.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(x)) and jnp.all(jnp.isfinite(log_det))


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.extreme])
def test_extreme_inputs_stay_finite(name):
    for values in measured(name)[2]["extreme"]:
        for what in ("out", "log_det"):
            assert np.all(np.isfinite(values[what])), what
        assert np.all(np.isfinite(values["grad"][-1]))  # along the input


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if not row.wide])
def test_outside_the_support_the_density_is_zero(name):
    if name == "logit":
        pytest.skip("its support is the source side; see sigmoid")
    for values in measured(name)[2]["outside"]:
        assert np.all(np.isneginf(values["log_det"]))
        assert np.all(np.isfinite(values["out"])) and np.all(np.isfinite(values["grad"][-1]))


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.cond])
def test_cond_changes_the_output(name):
    _, bijector, params, z, _, cond = setup(name)
    r = measured(name)[2]
    assert np.all(np.any(r["x_of_z"] != r["other cond"], axis=-1))
    with pytest.raises(ValueError, match="lead with 6 rows"):
        bijector.forward(params, z, jax.tree.map(lambda c: c[:-1], cond))


@pytest.mark.parametrize("name", TABLE)
def test_params_are_nested_dicts_of_floats(name):
    _, _, params, _, _, _ = setup(name)

    def walk(node):
        if isinstance(node, dict):
            assert all(isinstance(key, str) for key in node)
            return [leaf for value in node.values() for leaf in walk(value)]
        assert jnp.issubdtype(node.dtype, jnp.floating)
        return [node]

    assert len(walk(params)) == len(jax.tree.leaves(params))


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_shape_is_an_error(name):
    row, bijector, params, z, _, cond = setup(name)
    if name in ("reverse", "chain of none") or row.any_channels or not row.wide:
        pytest.skip("acts on any shape")
    with pytest.raises((ValueError, TypeError)):
        jax.eval_shape(
            lambda z: bijector.forward(params, z, cond), jnp.concatenate([z, z], axis=-1)
        )
