"""What people get wrong first, and words of the sentence that says so: wrong shapes are refused
where they would broadcast, wrong objects where they are given. Nothing here is computed: shapes are
traced."""

import diffrax
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jflow
from jflow import bijectors as bj
from jflow import data, distributions, flows, guidance, losses, nets, solvers, train
from jflow.types import Bijector, Velocity

KEY = jax.random.key(0)
D = 3
X = jnp.ones((D, D))  # as many rows as numbers in an event
MORE = jnp.ones((5, D))
T = jnp.zeros(D)
COND = jnp.ones((D, 2))
GRID = np.linspace(0, 1, 3)
EMPTY = {"bijector": {}, "base": {}}
NORMAL = distributions.normal((D,))
NET = nets.ResidualMLP(4, 1)
VELOCITY = jflow.velocity(NET)
MLP = nets.MLP((4,))
AFFINE = bj.univariate.affine()
FLOW = flows.real_nvp((D,), depth=2, hidden=(4,))
LABELLED = flows.real_nvp((D,), depth=2, hidden=(4,), embed=nn.Embed(3, 2))
IMAGES = flows.glow((4, 4, 1), scales=1, depth=1, hidden=4)
CNF = flows.cnf(VELOCITY, NORMAL, method=2)


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Shapes that differ in rank broadcast in silence by default."""
    with jax.numpy_rank_promotion("allow"):
        yield


def zeros_like(function, *args):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *args))


class Params:
    """Made when a test asks for them, without compiling."""

    def __getattr__(self, name):
        made = {
            "flow": lambda: zeros_like(FLOW.init, KEY, MORE),
            "conditional": lambda: zeros_like(FLOW.init, KEY, MORE, jnp.ones((5, 2))),
            "labeled": lambda: zeros_like(LABELLED.init, KEY, MORE, jnp.arange(5)),
            "velocity": lambda: zeros_like(VELOCITY.init, KEY, X, T),
            "conditioned": lambda: zeros_like(VELOCITY.init, KEY, X, T, COND),
            "cnf": lambda: zeros_like(CNF.init, KEY, X),
        }[name]()
        setattr(self, name, made)
        return made


P = Params()


def doubling(log_det):
    """x = 2 z with a log_det of some shape."""

    def there(params, z, cond=None, *, key=None):
        return 2 * z, log_det(z)

    def back(params, x, cond=None, *, key=None):
        return x / 2, log_det(x)

    return Bijector(lambda key, x, cond=None, *, side="data": {}, there, back)


def base(log_prob):
    return NORMAL._replace(log_prob=lambda params, x, cond=None, *, key=None: log_prob(x))


def shape(function, *args, **kwargs):
    return jax.eval_shape(lambda: function(*args, **kwargs))


LOG_DETS = {
    "scalar": lambda x: jnp.float32(1.0),
    "column": lambda x: jnp.ones((x.shape[0], 1)),
    "event": lambda x: jnp.ones(x.shape),
    "numbers": lambda x: jnp.ones(x.shape[1]),  # [d], which with d rows is the shape of a right one
}
CALLS = {  # what calls the map, on x
    "flow.init": lambda b, x: flows.flow(b, NORMAL).init(KEY, x),
    "flow.log_prob": lambda b, x: flows.flow(b, NORMAL).log_prob(EMPTY, x),
    "flow.forward": lambda b, x: flows.flow(b, NORMAL).forward(EMPTY, x),
    "flow.sample": lambda b, x: flows.flow(b, NORMAL).sample_and_log_prob(EMPTY, KEY, len(x)),
    "elbo_flow.elbo": lambda b, x: flows.elbo_flow(b, NORMAL).elbo(EMPTY, x),
    "nll": lambda b, x: losses.nll(flows.flow(b, NORMAL))(EMPTY, KEY, {"x": x}),
    "chain": lambda b, x: bj.chain(bj.reverse(), b).forward({"0": {}, "1": {}}, x),
    "scan": lambda b, x: bj.scan(b, 2).inverse({"stacked": {}, "shared": {}}, x),
    "invert": lambda b, x: bj.invert(b).forward({}, x),
    "on_part": lambda b, x: bj.on_part(b, slice(0, 2)).forward({}, x),
}


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("call", CALLS)
def test_a_log_det_is_one_number_a_row(call, log_det):
    for x in (MORE, X):
        if x is X and log_det == "numbers" and "flow" not in call and call != "nll":
            # a combinator alone cannot tell; `flow`, `bijectors.check` try other numbers of rows
            continue
        with pytest.raises(
            ValueError, match=r"expected log_det.* of shape \[\d\], got \[.*: a number for each row"
        ):
            shape(CALLS[call], doubling(LOG_DETS[log_det]), x)


def test_with_as_many_rows_as_numbers_a_right_log_det_passes():
    flow = flows.flow(doubling(lambda x: jnp.full(x.shape[0], D * np.log(2))), NORMAL)
    found = flow.log_prob(flow.init(KEY, X), 0 * X)
    np.testing.assert_allclose(found, [-D * np.log(2 * np.pi) / 2 + D * np.log(2)] * D, rtol=1e-6)


DENSITIES = {"scalar": lambda x: jnp.sum(x), "column": lambda x: x[:, :1], "event": lambda x: x}


@pytest.mark.parametrize("name", DENSITIES)
def test_a_log_prob_is_one_number_a_row(name):
    log_prob = DENSITIES[name]
    flow, elbo = (
        flows.flow(bj.reverse(), base(log_prob)),
        flows.elbo_flow(bj.reverse(), base(log_prob)),
    )
    for what, call in {
        "base's log_prob": lambda: flow.log_prob(EMPTY, X),
        "the base's": lambda: flow.sample_and_log_prob(EMPTY, KEY, 4),
        "elbo_flow: expected the base's": lambda: elbo.elbo(EMPTY, X),
        "cnf: expected the base's": (
            lambda: flows.cnf(VELOCITY, base(log_prob), method=2).log_prob(P.cnf, X)
        ),
        "nll: expected log_prob": lambda: losses.nll(base(log_prob))({}, KEY, {"x": X}),
        "expected base_log_prob": lambda: solvers.log_prob(
            VELOCITY, P.velocity, X, log_prob, method=2
        ),
        "expected log_density": lambda: losses.reverse_kl(FLOW, log_prob, draws=4)(P.flow, KEY, {}),
    }.items():
        with pytest.raises(ValueError, match=f"{what}.* of shape .*: a number for each row"):
            shape(call)


@pytest.mark.parametrize("v", [lambda x: x[:, :1], lambda x: x[:, 0]], ids=["column", "row"])
def test_a_velocity_is_shaped_like_x(v):
    velocity = Velocity(lambda *a: {}, lambda params, x, t, cond=None, *, key=None: v(x))
    for call in (
        lambda: solvers.sample(velocity, {}, X, method=2),
        lambda: solvers.sample_sde(solvers.euler_maruyama(velocity, 1.0), {}, X, KEY, GRID),
        lambda: solvers.sample_sde(solvers.ancestral(velocity), {}, X, KEY, GRID),
        lambda: losses.flow_matching(velocity)({}, KEY, {"x": X}),
        lambda: flows.cnf(velocity, NORMAL, method=2).log_prob({"velocity": {}, "base": {}}, X),
    ):
        with pytest.raises(ValueError, match=r"a velocity (shaped like x|of shape).*, got \[3"):
            shape(call)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, t, cond=None):
        return nn.Dense(x.shape[-1])(x)


class Nnx(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(D, D, rngs=nnx.Rngs(0))

    def __call__(self, x, t=None, cond=None):
        return self.layer(x)


MODULES = {
    "nnx": (Nnx(), "it is a flax.nnx module"),
    "nnx class": (Nnx, "it is a flax.nnx module"),
    "class": (Linen, r"make an instance, Linen\(\.\.\.\)"),
    "function": (lambda x, t: x, "got the function"),
    "equinox": (eqx.nn.MLP(D, D, 4, 1, key=KEY), "got a MLP"),
    "none": (None, "got None"),
}
LIFTS = {
    "velocity": jflow.velocity,
    "field": jflow.field,
    "flow_map": jflow.flow_map,
    "coupling": lambda net: bj.coupling(AFFINE, net, split=1),
    "masked_coupling": lambda net: bj.masked_coupling(AFFINE, net, np.array([True, False, True])),
    "autoregressive": lambda net: bj.autoregressive(AFFINE, net),
    "residual": bj.residual,
    "causal_block": bj.causal_block,
    "conditioned": lambda net: bj.conditioned(bj.lu(D), net),
    "TimeMLP": lambda net: net is not None and nets.TimeMLP((4,), embed=net),
}


@pytest.mark.parametrize("lift", LIFTS)
def test_networks_are_linen_modules(lift):
    for module, message in MODULES.values():
        if lift == "TimeMLP" and module is None:
            continue  # no embedding
        with pytest.raises(
            TypeError, match=f"{lift}: expected .* an instance of flax.linen.Module.*{message}"
        ):
            LIFTS[lift](module)


OBJECTS = {
    "flow: expected a Bijector, got a Flow: give the map": lambda: flows.flow(FLOW, NORMAL),
    "flow: expected a Bijector, got a Distribution": lambda: flows.flow(NORMAL, bj.lu(D)),
    "flow: expected a Bijector, got a Transport: elbo_flow": lambda: flows.flow(
        bj.uniform_dequantization(4), NORMAL
    ),
    "flow: expected a Distribution or a Flow, got the function normal: give what": lambda: (
        flows.real_nvp((D,), base=distributions.normal)
    ),
    "got a Bijector: flows.flow": lambda: losses.nll(bj.lu(D)),
    "elbo_flow: expected a Transport or a Bijector, got a Flow": lambda: flows.elbo_flow(
        FLOW, NORMAL
    ),
    "chain: expected .* got a Flow": lambda: bj.chain(FLOW, bj.reverse()),
    "chain: expected .* got the function reverse: give what": lambda: bj.chain(
        bj.reverse, bj.lu(D)
    ),
    "chain: expected .* got a list: give them one by one": lambda: bj.chain([bj.reverse()]),
    "scan: expected .* got a Flow": lambda: bj.scan(FLOW, 2),
    "invert: expected .* got a Flow": lambda: bj.invert(FLOW),
    "on_part: expected .* got a Flow": lambda: bj.on_part(FLOW, slice(0, 2)),
    "conditioned: expected .* got a Flow": lambda: bj.conditioned(FLOW, nn.Embed(3, 2)),
    "indicated: expected .* got a Flow": lambda: bj.indicated(FLOW, 2),
    "coupling: expected an Elementwise, got the function affine": lambda: bj.coupling(
        bj.univariate.affine, MLP, split=1
    ),
    "coupling: expected an Elementwise, got a Bijector": lambda: bj.coupling(
        bj.lu(D), MLP, split=1
    ),
    "nll: expected a Flow or a Distribution, got a Velocity": lambda: losses.nll(VELOCITY),
    "flow_matching: .* got a ResidualMLP: jflow.velocity": lambda: losses.flow_matching(NET),
    "flow_matching: .* got a Flow": lambda: losses.flow_matching(FLOW),
    "cnf: expected a Velocity, got a ResidualMLP: jflow.velocity": lambda: flows.cnf(NET, NORMAL),
    "cnf: expected a Distribution": lambda: flows.cnf(VELOCITY, distributions.normal),
    "solvers.sample: .* got a ResidualMLP": lambda: solvers.sample(NET, {}, X, method=2),
    "solvers.log_prob: .* got a ResidualMLP": lambda: solvers.log_prob(
        NET, {}, X, NORMAL.log_prob, method=2
    ),
    "cfg: expected .* got a ResidualMLP": lambda: guidance.cfg(NET, 2.0, null=0),
    "make_step: expected a loss .* got a Flow; losses.nll": lambda: train.make_step(
        FLOW, optax.sgd(0.1)
    ),
    "make_step: expected an optax.*, got the function adam": lambda: train.make_step(
        losses.nll(FLOW), optax.adam
    ),
    "fit: expected batches .* got an array": lambda: train.fit(
        train.init_state({}, optax.sgd(0.1), KEY), lambda s, b: s, X, steps=1
    ),
    "expected rows to be a dict .* got an array": lambda: data.batches(np.ones((4, 2)), 2),
    "expected x to be an array .* a dict of .'x'.": lambda: FLOW.log_prob(P.flow, {"x": X}),
    "init: expected key to be one jax.random.key.seed., got 0": lambda: FLOW.init(0, X),
    "init: expected key .* got an array float32": lambda: FLOW.init(X, KEY),
    "expected x to be an array .* got a key": lambda: FLOW.log_prob(P.flow, KEY),
    "sample: expected key .* got 0": lambda: FLOW.sample(P.flow, 0, 3),
    "sample: expected key .* got a key of shape .2.": lambda: FLOW.sample(
        P.flow, jax.random.split(KEY), 3
    ),
    "expected params, a dict with .*, got a key": lambda: FLOW.sample(KEY, P.flow, 3),
    "flows.cnf.sample: expected key .* got 0": lambda: CNF.sample(P.cnf, 0, 3),
    "flows.cnf.sample: expected params, a dict with .*, got a key": lambda: CNF.sample(
        KEY, P.cnf, 3
    ),
    "init of ResidualMLP: expected key": lambda: VELOCITY.init(0, X, T),
    "solvers.sample_sde: expected key .* got 0": lambda: solvers.sample_sde(
        solvers.ancestral(VELOCITY), {}, X, 0, GRID
    ),
    "flow_matching: expected key .* got a dict": lambda: losses.flow_matching(VELOCITY)(
        KEY, P.velocity, {"x": X}
    ),
}


@pytest.mark.parametrize("message", OBJECTS)
def test_a_wrong_object_is_named(message):
    with pytest.raises(TypeError, match=message):
        OBJECTS[message]()


VALUES = {  # (what is wrong, words of the message): ValueError
    "flow: expected params with .*bijector.*, got .* without": lambda: FLOW.log_prob(
        P.flow["bijector"], X
    ),
    "flows.cnf.inverse: expected params with .*velocity.* without": lambda: CNF.log_prob(
        P.velocity, X
    ),
    "ResidualMLP: .* under 'params': give what is inside": lambda: VELOCITY.apply(
        {"params": P.velocity}, X, T
    ),
    # a batch axis
    "flow: expected x of shape .b, 3., got .3.: one x wants a batch axis too": lambda: (
        FLOW.log_prob(P.flow, X[0])
    ),
    "flow: expected x of shape .b, 3., got .3.: .*x.None": lambda: FLOW.init(KEY, X[0]),
    "flow: expected x of shape .b, 3., got .3.:": lambda: FLOW.forward(P.flow, X[0]),
    "flow: expected x of shape .b, 1., got .5.\n": (
        lambda: flows.real_nvp((1,), depth=2).init(KEY, jnp.ones(5))
    ),
    "flow: expected x of shape .b, 4, 4, 1., got .4, 4, 1.:": lambda: IMAGES.init(
        KEY, jnp.ones((4, 4, 1))
    ),
    "normal: expected x of shape .b, 3., got .3.: one x": lambda: NORMAL.init(KEY, X[0]),
    "normal: expected x of shape .b., got ..: one x": (
        lambda: distributions.normal(()).log_prob({}, jnp.float32(0))
    ),
    "normal: expected x of shape .b, 4., got .3, 3.": (
        lambda: flows.flow(bj.lu(D), distributions.normal((4,))).init(KEY, X)
    ),
    "lu: expected x of shape .b, ..., 3., got .3.: one x": lambda: bj.lu(D).init(KEY, X[0]),
    "normal: expected x of shape .b, 3., got .3.:": lambda: CNF.init(KEY, X[0]),
    "ResidualMLP: .*is x .b, .event. as at `init`": lambda: solvers.sample(
        VELOCITY, P.velocity, X[0], method=2
    ),
    "ResidualMLP: expected x of shape .b, .event., got ..\n": lambda: VELOCITY.apply(
        P.velocity, 1.0, 0.0
    ),
    "ResidualMLP: expected x .* got .3, 3. and .2, 3.": lambda: VELOCITY.init(KEY, (X, X[:2]), T),
    "nll: expected 'x' of shape .b, .event., got a scalar": lambda: losses.nll(FLOW)(
        P.flow, KEY, {"x": 1.0}
    ),
    # cond
    "MLP: .* do not fit its params.*should there be a cond": lambda: FLOW.log_prob(
        P.conditional, X
    ),
    "MLP: .* do not fit .*should there be a cond": lambda: FLOW.sample(P.conditional, KEY, 4),
    "MLP: .* do not fit its params.*had that such a cond": lambda: FLOW.log_prob(P.flow, X, COND),
    "flow.init: neither the map nor the base looks at cond": (
        lambda: flows.flow(bj.lu(D), NORMAL).init(KEY, X, COND)
    ),
    "elbo_flow.init: neither the map": lambda: flows.elbo_flow(bj.lu(D), NORMAL).init(KEY, X, COND),
    "conditioned: expected cond for Embed, got None": lambda: LABELLED.log_prob(P.labeled, X),
    "ResidualMLP: expected cond, since its params were made with one": lambda: VELOCITY.apply(
        P.conditioned, X, T
    ),
    "ResidualMLP: expected cond": lambda: solvers.sample(VELOCITY, P.conditioned, X, method=2),
    "ResidualMLP: expected cond,": lambda: solvers.sample_sde(
        solvers.ancestral(VELOCITY), P.conditioned, X, KEY, GRID
    ),
    "ResidualMLP: .*had that such a cond": lambda: VELOCITY.apply(P.velocity, X, T, COND),
    "flow: expected cond to lead with 3 rows, got shape .2, 2.: a row for each x, or a single": (
        lambda: FLOW.log_prob(P.conditional, X, COND[:2])
    ),
    "sample: expected cond to lead with 4 rows, got shape ..: one label .* jnp.full..4,., label": (
        lambda: LABELLED.sample(P.labeled, KEY, 4, 1)
    ),
    # batches
    "noised: expected the data under 'x'": lambda: losses.noised(0.1)(KEY, {}),
    "nll: unknown keys in batch: .'X'.": lambda: losses.nll(FLOW)(P.flow, KEY, {"X": X}),
}


@pytest.mark.parametrize("message", VALUES)
def test_a_wrong_value_is_named(message):
    with pytest.raises(ValueError, match=message):
        shape(VALUES[message])


MATCHING = losses.flow_matching(VELOCITY)
LOSSES = {
    "nll": losses.nll(FLOW),
    "flow_matching": MATCHING,
    "noised": losses.chain(losses.noised(0.1), losses.nll(FLOW)),
    "drop_cond": losses.chain(losses.drop_cond(0.1, null=0), MATCHING),
    "fresh_source": losses.chain(losses.fresh_source(), MATCHING),
    "pair": losses.chain(jflow.couplings.pair(jflow.couplings.independent()), MATCHING),
    "with_source": losses.chain(
        jflow.couplings.with_source(lambda key, x, cond: (x, cond)), MATCHING
    ),
    "reverse_kl": losses.reverse_kl(FLOW, lambda x: x[:, 0]),
    "mean_flow": losses.mean_flow(jflow.flow_map(NET)),
    "annealed_source": losses.chain(losses.annealed_source(lambda step: 0.5), MATCHING),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_is_a_dict(name):
    for batch in (X, (X, COND)):
        with pytest.raises(
            TypeError, match=f"{name}: expected the batch to be a dict such as .*'x'.*, got a"
        ):
            LOSSES[name]({}, KEY, batch)


ONE = jnp.asarray([[0.3, -1.0]])  # a single row of cond


@pytest.mark.parametrize(
    "name",
    ["init", "log_prob", "sample", "label", "inverse", "solve", "adaptive", "walk", "cfg", "loss"],
)
def test_a_single_row_of_cond_is_for_all_rows(name):
    params, conditioned = P.conditional, P.conditioned
    run = {
        "init": lambda c: FLOW.init(KEY, X, c),
        "log_prob": lambda c: FLOW.log_prob(params, X, c),
        "sample": lambda c: FLOW.sample_and_log_prob(params, KEY, 3, c),
        "label": lambda c: LABELLED.sample(P.labeled, KEY, 3, jnp.argmax(c, axis=1)),
        "inverse": (
            lambda c: bj.coupling(AFFINE, MLP, split=1).inverse(
                bj.coupling(AFFINE, MLP, split=1).init(KEY, X, COND), X, c
            )
        ),
        "solve": lambda c: solvers.sample(VELOCITY, conditioned, X, c, method=1)[0],
        "adaptive": lambda c: solvers.log_prob(
            VELOCITY,
            conditioned,
            X,
            lambda z: z[:, 0],
            c,
            method=solvers.adaptive(diffrax.Bosh3(), rtol=0.1, atol=0.1),
        )[0],
        "walk": lambda c: solvers.sample_sde(
            solvers.ancestral(VELOCITY), conditioned, X, KEY, GRID, c
        )[0],
        "cfg": lambda c: guidance.cfg(VELOCITY, 2.0, null=jnp.zeros(2)).apply(conditioned, X, T, c),
        "loss": lambda c: losses.chain(losses.drop_cond(0.5, null=jnp.zeros(2)), MATCHING)(
            conditioned, KEY, {"x": X, "cond": c}
        )[0],
    }[name]
    many = jnp.repeat(ONE, 3, axis=0)
    given, expected = (jax.make_jaxpr(run)(c) for c in (ONE, many))
    assert given.out_avals == expected.out_avals


def test_a_single_row_has_the_values_of_many():
    """With params that are not 0, of a flow and of a guided velocity."""
    rng = np.random.default_rng(0)
    away = lambda params: jax.tree.map(  # noqa: E731
        lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), params
    )
    params, conditioned = away(P.conditional), away(P.conditioned)
    guided = guidance.cfg(VELOCITY, 2.0, null=jnp.zeros(2))
    run = jax.jit(lambda c: (FLOW.log_prob(params, X, c), guided.apply(conditioned, X, T, c)))
    one, many, other = run(ONE), run(jnp.repeat(ONE, 3, axis=0)), run(-ONE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, many)
    assert all(np.all(a != b) for a, b in zip(one, other, strict=True))


def test_a_legacy_key_will_do():
    old = jax.random.PRNGKey(0)
    assert shape(FLOW.sample, P.flow, old, 3).shape == (3, D)
    (
        shape(FLOW.init, old, X),
        shape(VELOCITY.init, old, X, T),
        shape(MATCHING, P.velocity, old, {"x": X}),
    )
