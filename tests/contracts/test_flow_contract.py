"""Every flow constructor against every promise of `types.Flow`."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiling import called_twice, compiled_again
from jax.random import clone
from keys import KEYS, keys_consumed_twice

import jflow
from jflow import bijectors as bj
from jflow import distributions, flows, guidance, nets
from jflow.types import Flow

B = 6


class Row(NamedTuple):
    make: Any  # event_shape -> Flow
    cond: Any = None  # b -> cond
    base: Any = distributions.normal  # event_shape -> Distribution
    precision: float = 1e-4  # of a log-density by two routes, in nats
    support: tuple[float, float] = (-np.inf, np.inf)
    base_shift: float = 0.0  # added to the base's parameters
    points: int = 200  # a side of the grid on which the density is integrated
    samples: int = 10_000  # for the test of what is sampled, where events are of two numbers
    event: tuple[int, ...] = (
        2,
    )  # of most tests; the density is integrated in two dimensions alone


def labels(b):
    return np.arange(b) % 3


def vector(b):
    return np.random.default_rng(5).normal(size=(b, 3)).astype(np.float32)


def real_nvp(event, **options):
    return flows.real_nvp(event, depth=4, hidden=(16,), activation=nn.tanh, **options)


def neural_spline(event, **options):
    return flows.neural_spline(
        event, depth=3, hidden=(16,), bins=4, bound=4.0, activation=nn.tanh, **options
    )


def tail_adaptive(event, index):
    return flows.tail_adaptive(
        event, index, depth=2, hidden=(8,), bins=4, bound=4.0, activation=nn.tanh
    )


def nanoflow(event, **options):
    return flows.nanoflow(event, depth=4, hidden=(16,), indicator=4, activation=nn.tanh, **options)


def squashed(event):
    return flows.flow(bj.chain(bj.affine(event), bj.sigmoid()), distributions.normal(event))


def on_vectors(flow, image):
    """A flow of images [b, *image] as one of vectors."""
    size = int(np.prod(image))

    def shaped(x):
        if x.shape[1:] != (size,):
            raise ValueError(f"expected vectors of {size}, got {list(x.shape)}")
        return x.reshape(-1, *image)

    def flat(pair):
        return pair[0].reshape(-1, size), pair[1]

    return Flow(
        lambda key, x, cond=None: flow.init(key, shaped(x), cond),
        lambda params, x, cond=None, *, key=None: flow.log_prob(params, shaped(x), cond, key=key),
        lambda params, key, n, cond=None: flow.sample(params, key, n, cond).reshape(n, size),
        lambda params, key, n, cond=None: flat(flow.sample_and_log_prob(params, key, n, cond)),
        lambda params, z, cond=None, *, key=None: flat(
            flow.forward(params, shaped(z), cond, key=key)
        ),
        lambda params, x, cond=None, *, key=None: flat(
            flow.inverse(params, shaped(x), cond, key=key)
        ),
    )


def autoregressive(recipe, event, **options):
    return recipe(event, depth=3, hidden=(16, 16), activation=nn.tanh, **options)


def residual_flow(event, **options):
    return flows.residual_flow(event, depth=2, hidden=(8, 8), coeff=0.7, **options)


def tarflow(event, **options):
    image = (1, *event, 1)
    return on_vectors(
        flows.tarflow(image, patch_size=1, width=8, depth=2, num_layers=2, num_heads=2, **options),
        image,
    )


def starflow(event, **options):
    image = (1, *event, 1)
    sizes = {
        "width": 8,
        "num_layers": 2,
        "shallow_depth": 2,
        "num_shallow_layers": 1,
        "num_heads": 2,
    }
    return on_vectors(flows.starflow(image, **sizes, **options), image)


def jet(event, **options):
    image = (1, 1, *event)
    return on_vectors(
        flows.jet(image, patch_size=1, width=8, depth=4, num_layers=1, num_heads=2, **options),
        image,
    )


def glow(event, **options):
    return on_vectors(flows.glow((2, 2, 1), scales=1, depth=2, hidden=4, **options), (2, 2, 1))


def cnf(event):
    return flows.cnf(
        jflow.velocity(nets.TimeMLP((16,), nn.tanh, time_scale=1.0)),
        distributions.normal(event),
        method=24,
    )


TABLE = {
    "bnaf": Row(lambda event: flows.bnaf(event, hidden=3), cond=vector, samples=4000),
    "cnf": Row(cnf, precision=1e-3, points=120, samples=4000),  # two solves of 24 steps
    "dequantization_noise": Row(
        lambda event: on_vectors(
            flows.dequantization_noise((1, *event, 1), net=nets.GlowNet(4)), (1, *event, 1)
        ),
        support=(0.0, 1.0),
    ),
    "flow": Row(
        lambda event: flows.flow(
            bj.chain(bj.actnorm(event[-1]), bj.lu(event[-1])), distributions.diagonal_normal(event)
        ),
        base=distributions.diagonal_normal,
    ),
    "flow onto (0, 1)": Row(squashed, support=(0.0, 1.0)),
    "glow": Row(glow, event=(4,)),  # squeezes 2 x 2 pixels
    "heavy_tailed": Row(
        lambda event: flows.heavy_tailed(
            flows.real_nvp, event, depth=4, hidden=(16,), activation=nn.tanh
        ),
        base=distributions.student_t,
        base_shift=1.6,
    ),
    "inverse_flow": Row(
        lambda event: on_vectors(
            flows.inverse_flow((2, 2, 1), scales=1, depth=2, hidden=4), (2, 2, 1)
        ),
        event=(4,),
    ),
    "glow of labels": Row(
        lambda event: glow(event, embed=nn.Embed(3, 4), reversible=2), event=(4,), cond=labels
    ),
    "jet": Row(jet),
    "jet of labels": Row(lambda event: jet(event, num_classes=3, reversible=2), cond=labels),
    "iaf": Row(lambda event: autoregressive(flows.iaf, event, remat=True)),
    "kernelized": Row(
        lambda event: flows.kernelized(event, depth=3, points=4, embed=nn.Embed(3, 4)), cond=labels
    ),
    "kernelized splines": Row(
        lambda event: flows.kernelized(
            event, depth=3, points=4, univariate=bj.univariate.rational_quadratic(4, 4.0)
        )
    ),
    "maf": Row(lambda event: autoregressive(flows.maf, event)),
    "maf of labels": Row(
        lambda event: autoregressive(flows.maf, event, embed=nn.Embed(3, 4)), cond=labels
    ),
    "neural_spline_autoregressive": Row(
        lambda event: autoregressive(
            flows.neural_spline_autoregressive, event, bins=4, bound=4.0, residual=True
        ),
        points=400,  # its peaks are narrow
    ),
    "nanoflow": Row(nanoflow),
    "nanoflow of labels": Row(lambda event: nanoflow(event, embed=nn.Embed(3, 4)), cond=labels),
    "neural_spline": Row(neural_spline),
    "neural_spline without linear maps": Row(lambda event: neural_spline(event, linear=False)),
    "planar": Row(lambda event: flows.planar(event, depth=3)),
    "planar of labels": Row(
        lambda event: flows.planar(event, depth=2, hidden=(8,), embed=nn.Embed(3, 4)), cond=labels
    ),
    "radial": Row(lambda event: flows.radial(event, depth=3)),
    "nice": Row(lambda event: flows.nice(event, depth=4, hidden=(16,), activation=nn.tanh)),
    "real_nvp": Row(real_nvp),
    "real_nvp of labels": Row(lambda event: real_nvp(event, embed=nn.Embed(3, 4)), cond=labels),
    "real_nvp of a vector": Row(lambda event: real_nvp(event, reversible=2), cond=vector),
    "residual_flow": Row(residual_flow),
    "residual_flow of labels": Row(
        lambda event: residual_flow(event, embed=nn.Embed(3, 4)), cond=labels
    ),
    "starflow": Row(starflow),
    "starflow guided": Row(
        lambda event: starflow(event, num_classes=3, guide=guidance.score_sum(1.0, null=3)),
        cond=labels,
    ),
    "sylvester": Row(lambda event: flows.sylvester(event, depth=2)),
    "sylvester of a vector": Row(
        lambda event: flows.sylvester(event, depth=2, hidden=(8,)), cond=vector
    ),
    "tail_adaptive": Row(
        lambda event: tail_adaptive(event, (2.0, 3.0)),
        base=distributions.student_t,
        base_shift=1.6,
    ),
    "tail_adaptive of two light and two heavy columns": Row(
        lambda event: tail_adaptive(event, (np.inf, 2.0, np.inf, 3.0)),
        base=lambda event: distributions.split(
            distributions.normal((2,)), distributions.student_t((2,)), 2
        ),
        base_shift=1.6,
        event=(4,),
    ),
    "tarflow": Row(tarflow),
    "transformed": Row(
        lambda event: flows.transformed(real_nvp(event), bj.supports.interval(0, 1)),
        support=(0.0, 1.0),
    ),
    "tarflow of a vector by Jacobi": Row(
        lambda event: tarflow(event, sampler=bj.decoding.jacobi(2), remat=True),
        cond=vector,
    ),
}


EXCUSED = {
    "jetformer": "its base is a causal law of tokens, tests/flows/test_jetformer.py",
    **dict.fromkeys(
        ("elbo_flow", "flow_plus_plus", "importance_weighted"),
        "ElboFlows, tests/contracts/test_transport_contract.py",
    ),
    **dict.fromkeys(
        ("AnyOrder", "MixedRows", "Within", "any_order"),
        "of rows of codes and numbers, tests/flows/test_any_order.py",
    ),
    "alternating_permutations": "numpy arrays, tests/flows/test_flows.py",
    "path_sampler": "a function, tests/bijectors/test_markov.py",
    **dict.fromkeys(("MixFlow", "mix_flow"), "no map of its own, tests/flows/test_mix_flow.py"),
    **dict.fromkeys(("rigid_body", "rotations"), "on spheres, tests/flows/test_rotations.py"),
    **dict.fromkeys(
        ("InjectiveFlow", "injective"), "of fewer dimensions, tests/losses/test_free_form.py"
    ),
    **dict.fromkeys(
        ("SoftPolicy", "soft_policy"), "with values of control, tests/losses/test_control.py"
    ),
    "lagrangian_velocity": "a Velocity, tests/flows/test_lagrangian.py",
    **dict.fromkeys(
        ("StepChain", "StepTrace", "step_chain", "updated_log_prob"),
        "of several steps, tests/flows/test_step_chain.py",
    ),
    "haar_cascade": "a Distribution, tests/flows/test_cascade.py",
    "with_dequantization": "an ElboFlow, tests/flows/test_levels.py",
}


def test_every_public_name_is_in_the_table():
    assert set(flows.__all__) == {name.split()[0] for name in TABLE} | set(EXCUSED)


@functools.cache
def setup(name, event=None, dtype=np.float32, scale=0.3):
    """(flow, params away from their initial values, x, cond)"""
    row, rng = TABLE[name], np.random.default_rng(1)
    event = row.event if event is None else event
    flow = row.make(event)
    assert isinstance(flow, Flow)
    cond = None if row.cond is None else row.cond(B)
    x = rng.normal(size=(B, *event))
    x = (x if np.isinf(row.support[0]) else scipy.special.expit(x)).astype(dtype)
    shapes = jax.eval_shape(flow.init, jax.random.key(0), x, cond)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(shapes))
    assert set(shapes) == ({"velocity", "base"} if name == "cnf" else {"bijector", "base"})
    params = jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(dtype), shapes)
    params["base"] = jax.tree.map(lambda p: p + np.asarray(row.base_shift, dtype), params["base"])
    return flow, params, x, cond


@functools.cache
def measured(name):
    """What most tests look at, under strict promotion of types. What is called outside jit is
    compiled once for all of them; jit has the density and its gradient. Events of two numbers come
    with the grid on which the density is integrated, and with many samples: after the first B rows
    all have one cond."""
    flow, params, x, cond = setup(name)
    key = jax.random.key(3)
    traces = []
    plane = TABLE[name].event == (2,)
    points = grid_points(name, TABLE[name].points, 2)[0].astype(np.float32) if plane else x[:0]
    n = TABLE[name].samples if plane else B
    more = lambda rows: jax.tree.map(  # noqa: E731
        lambda c, one: np.concatenate([c, one]), cond, one_cond(name, rows)
    )

    @jax.jit
    def run(params, x, cond):
        traces.append(1)
        log_prob, pullback = jax.vjp(lambda p: flow.log_prob(p, x, cond), params)
        return log_prob, *pullback(jnp.cos(log_prob))

    with jax.numpy_dtype_promotion("strict"):
        r = {}
        r["log_prob"], r["grads"] = run(params, x, cond)
        r["without jit"], r["compiled again"] = called_twice(
            init=lambda: flow.init(key, x, cond),
            log_prob=lambda: flow.log_prob(params, np.concatenate([x, points]), more(len(points))),
            sample=lambda: flow.sample(params, key, n, more(n - B)),
            sample_and_log_prob=lambda: flow.sample_and_log_prob(params, key, n, more(n - B)),
            inverse=lambda: flow.inverse(params, x, cond),
        )
        r["z"], r["inverse_log_det"] = r["without jit"]["inverse"]
        found, r["compiled by forward"] = called_twice(
            forward=lambda: flow.forward(params, r["z"], cond)
        )
        r["x_again"], r["forward_log_det"] = found["forward"]
        missing = np.array(x)
        missing[2, 0] = np.nan
        r["missing"], _ = run(params, missing, cond)
        r["pair_log_prob"], _ = run(params, r["without jit"]["sample_and_log_prob"][0][:B], cond)
        if cond is not None:
            other = jax.tree.map(lambda c: c[::-1], cond)
            r["other cond"], _ = run(params, x, other)
    assert len(traces) == 1  # of all the calls
    return jax.device_get(r)


@pytest.mark.parametrize("name", TABLE)
def test_log_prob_is_the_bases_plus_the_log_det(name):
    r, row = measured(name), TABLE[name]
    _, params, x, _ = setup(name)
    expected = row.base(row.event).log_prob(params["base"], r["z"]) + r["inverse_log_det"]
    np.testing.assert_allclose(r["log_prob"], expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(r["forward_log_det"], -r["inverse_log_det"], atol=row.precision)
    np.testing.assert_allclose(r["x_again"], x, atol=row.precision)
    assert r["log_prob"].shape == (B,) and r["log_prob"].dtype == jnp.float32


@pytest.mark.parametrize("name", TABLE)
def test_log_prob_of_a_missing_number_is_nan_and_of_the_other_rows_what_it_was(name):
    r = measured(name)
    expected = np.where(np.arange(B) == 2, np.nan, r["log_prob"])
    np.testing.assert_array_equal(r["missing"], expected)


@pytest.mark.parametrize("name", TABLE)
def test_sample_and_log_prob_agree_with_sample_and_with_log_prob(name):
    r, row = measured(name), TABLE[name]
    sample = r["without jit"]["sample"]
    x, log_prob = r["without jit"]["sample_and_log_prob"]
    n = row.samples if row.event == (2,) else B
    assert x.shape == sample.shape == (n, *row.event)
    assert x.dtype == jnp.float32 and log_prob.shape == (n,)
    if name != "cnf":  # whose one key also has probes to draw
        np.testing.assert_allclose(x, sample, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        log_prob[:B], r["pair_log_prob"], atol=row.precision, rtol=row.precision
    )


@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_finite_and_reach_every_parameter(name):
    for path, g in jax.tree_util.tree_leaves_with_path(measured(name)["grads"]):
        keys = [part.key for part in path]
        held = "bijector" in keys and keys[-1] == "log_std"  # the recipes' standardization
        assert np.all(np.isfinite(g)) and np.any(g != 0) != held, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "name", [name for name in TABLE if name in flows.__all__ and name != "cnf"]
)
def test_no_derivative_is_ruled_out(name):
    """jax.jvp, jacfwd and hessian take every function but one with a custom_vjp.
    tests/flows/test_derivatives.py has values, and the argument that a CNF needs."""
    flow, params, x, cond = setup(name)

    def run(params, x, cond, key):
        return flow.log_prob(params, x, cond, key=key), flow.sample_and_log_prob(
            params, clone(key), B, cond
        )

    assert "custom_vjp" not in str(jax.make_jaxpr(run)(params, x, cond, jax.random.key(0)))


@pytest.mark.parametrize("name", TABLE)
def test_without_jit_the_density_is_the_same_and_a_second_call_compiles_nothing(name):
    r = measured(name)
    plain = r["without jit"]["log_prob"][:B]
    np.testing.assert_allclose(plain, r["log_prob"], atol=1e-5, rtol=1e-5)
    assert not r["compiled again"] | r["compiled by forward"]


@pytest.mark.parametrize("name", TABLE)
def test_keys_are_consumed_once(name):
    flow, params, x, cond = setup(name)
    calls = lambda a, b, c: (  # noqa: E731
        flow.init(a, x, cond),
        flow.log_prob(params, x, cond, key=b),
        flow.sample_and_log_prob(params, c, B, cond),
    )
    assert not keys_consumed_twice(calls, *KEYS[:3])


def test_without_jit_a_second_gradient_compiles_nothing():
    flow, params, x, _ = setup("maf")
    assert not compiled_again(
        gradient=lambda: jax.grad(lambda p: jnp.sum(flow.log_prob(p, x)))(params)
    )


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.cond])
def test_cond_changes_the_density_and_has_to_fit(name):
    flow, params, x, cond = setup(name)
    r = measured(name)
    changed = np.any(
        [np.reshape(c != c[::-1], (B, -1)).any(1) for c in jax.tree.leaves(cond)], axis=0
    )
    assert np.all((r["log_prob"] != r["other cond"]) == changed) and changed.sum() >= 4
    short = jax.tree.map(lambda c: c[:-1], cond)
    for call in (
        lambda: flow.init(jax.random.key(0), x, short),
        lambda: flow.log_prob(params, x, short),
        lambda: flow.forward(params, x, short),
        lambda: flow.sample(params, jax.random.key(0), B, short),
        lambda: flow.sample_and_log_prob(params, jax.random.key(0), B, short),
    ):
        with pytest.raises(ValueError, match=r"cond.* to lead with 6 rows, got shape \[5"):
            call()


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_event_or_count_is_an_error(name):
    flow, params, x, cond = setup(name)
    for wrong in (jnp.ones((B, 3)), jnp.ones((B, 2, 1)), jnp.ones((B,))):
        # a velocity may flatten its input, so that of a CNF only the density knows the event
        for call in (
            (flow.log_prob,) if name == "cnf" else (flow.log_prob, flow.inverse, flow.forward)
        ):
            with pytest.raises(ValueError, match="expected|do not fit"):
                jax.eval_shape(lambda x, call=call: call(params, x, cond), wrong)
    for call in (flow.sample, flow.sample_and_log_prob):
        for n in (0, -1):
            with pytest.raises(ValueError, match=f"n >= 1, got {n}"):
                call(params, jax.random.key(0), n)
        with pytest.raises(TypeError, match="static int, got 2.5"):
            call(params, jax.random.key(0), 2.5)


@pytest.mark.parametrize("name", ["cnf", "flow", "neural_spline", "real_nvp"])
def test_float64_all_the_way(name, x64):
    flow, params, x, _ = setup(name, dtype=np.float64)
    z, log_det = jax.jit(flow.inverse)(params, x)
    again, _ = jax.jit(flow.forward)(params, z)
    sample, log_prob = jax.jit(flow.sample_and_log_prob, static_argnums=2)(
        params, jax.random.key(0), 3
    )
    assert z.dtype == log_det.dtype == again.dtype == sample.dtype == log_prob.dtype == jnp.float64
    np.testing.assert_allclose(again, x, atol=1e-5 if name == "cnf" else 1e-10)


def grid_points(name, points, dimensions):
    """Points [n, d] and the volume of each one's cell: uniform on a box, sinh-spaced where the
    support has no end."""
    low, high = TABLE[name].support
    if np.isinf(low):
        u = np.linspace(-1, 1, points) * np.arcsinh(60.0)
        axis, size = np.sinh(u), np.cosh(u) * (u[1] - u[0])
    else:
        axis, size = (
            (np.arange(points) + 0.5) / points * (high - low) + low,
            np.full(points, (high - low) / points),
        )
    volume = functools.reduce(np.multiply.outer, [size] * dimensions)
    return np.stack(np.meshgrid(*[axis] * dimensions, indexing="ij"), -1).reshape(
        -1, dimensions
    ), volume


def masses(log_prob, volume):
    """The probability of each cell of a grid."""
    return np.exp(np.asarray(log_prob, np.float64)).reshape(volume.shape) * volume


def one_cond(name, n):
    """The cond of one row, n times."""
    make = TABLE[name].cond
    return None if make is None else jax.tree.map(lambda c: np.repeat(c[1:2], n, 0), make(B))


@pytest.mark.parametrize(
    "name",
    ["cnf", "flow onto (0, 1)", "neural_spline", "neural_spline without linear maps", "real_nvp"],
)
def test_the_density_of_one_dimension_integrates_to_one_and_is_what_is_sampled(name):
    """400,001 points, 1e-3; then Kolmogorov-Smirnov of 10,000 samples, false alarm 1 in 1000, fixed
    seed."""
    flow, params, _, _ = setup(name, (1,), scale=0.5)
    points = 4001 if name == "cnf" else 400_001  # a spline of a spline of a spline has narrow peaks
    x, volume = grid_points(name, points, 1)
    mass = masses(jax.jit(flow.log_prob)(params, x.astype(np.float32)), volume)
    assert abs(mass.sum() - 1) < 1e-3
    n = 10_000
    sample = np.sort(jax.jit(lambda key: flow.sample(params, key, n))(jax.random.key(7))[:, 0])
    axis = x[:, 0]
    cdf = np.interp(sample, axis, np.cumsum(mass) - mass / 2)
    distance = np.max(np.abs(cdf - (np.arange(n) + 0.5) / n)) + 0.5 / n
    assert distance < scipy.stats.kstwo.isf(1e-3, n)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.event == (2,)])
def test_the_density_of_two_dimensions_integrates_to_one_and_is_what_is_sampled(name):
    """40,000 points as a rule, 2e-3; then a chi-squared test of 10,000 samples, false alarm 1 in
    1000, fixed seed. Of what is called without jit."""
    r, points = measured(name)["without jit"], TABLE[name].points
    mass = masses(r["log_prob"][B:], grid_points(name, points, 2)[1])
    assert abs(mass.sum() - 1) < 2e-3
    sample = r["sample"][B:]
    n = len(sample)
    assert np.all(np.isfinite(sample))

    axis = grid_points(name, points, 1)[0][:, 0]
    edges = (axis[1:] + axis[:-1]) / 2
    cell = points // 40  # grid points to a side of a cell of the test
    index = np.searchsorted(edges, np.asarray(sample)) // cell
    seen = np.bincount(index[:, 0] * 40 + index[:, 1], minlength=1600)
    expected = n * mass.reshape(40, cell, 40, cell).sum((1, 3)).reshape(-1) / mass.sum()
    common = expected > 8
    seen = np.append(seen[common], seen[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    statistic = np.sum((seen - expected) ** 2 / expected)
    assert common.sum() > 30 and statistic < scipy.stats.chi2.isf(1e-3, len(seen) - 1)


@pytest.mark.parametrize("event", [(3, 2), (2, 2, 1), ()], ids=str)
@pytest.mark.parametrize("name", ["maf", "neural_spline", "real_nvp"])
def test_recipes_take_any_event_shape(name, event):
    """Others are (1,) and (2,), above. Sampling and its density, then back to the base by the
    inverse."""
    flow, params, _, _ = setup(name, event, scale=0.1)

    @jax.jit
    def run(params):
        x, log_prob = flow.sample_and_log_prob(params, jax.random.key(0), 3)
        return x, log_prob, *flow.inverse(params, x)

    x, log_prob, z, log_det = run(params)
    assert x.shape == z.shape == (3, *event) and log_det.shape == (3,)
    np.testing.assert_allclose(
        log_prob, distributions.normal(event).log_prob({}, z) + log_det, atol=1e-3
    )
    np.testing.assert_allclose(z, jax.random.normal(jax.random.key(0), z.shape), atol=1e-4)
    assert np.all(np.any(np.reshape(z != x, (3, -1)), axis=1))


@pytest.mark.parametrize("name", ["neural_spline", "real_nvp", "real_nvp of labels"])
def test_recipes_start_at_the_base_density(name):
    """Every layer starts at the identity up to a permutation, which a standard normal does not
    feel."""
    flow, _, x, cond = setup(name, (5,))
    x = (x - x.mean(0)) / x.std(0)  # which is what their standardization would make of it

    @jax.jit
    def run(x):
        params = flow.init(jax.random.key(0), x, cond)
        return *flow.inverse(params, x, cond), flow.log_prob(params, x, cond)

    z, log_det, log_prob = run(x)
    np.testing.assert_allclose(
        log_prob, distributions.normal((5,)).log_prob({}, x), atol=1e-5, rtol=1e-5
    )
    np.testing.assert_allclose(np.sort(z), np.sort(x), atol=1e-5)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)
