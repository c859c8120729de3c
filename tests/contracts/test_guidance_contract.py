"""Every combinator from velocity to velocity against what each of them promises: its neutral value
is the conditional velocity, rows are rows, and what it is given wrong is named."""

import functools
import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import couplings, guidance, steering, types
from jflow.distributions.mixtures import GaussianMixture
from jflow.types import Field, Velocity

B, NULL = 6, 3
TWO = np.float64(2.0)  # options are numbers of numpy's as well


class Row(NamedTuple):
    make: Any  # (velocity, scale) -> the guided velocity
    neutral: float | None = 1.0  # the scale at which it is the velocity itself
    exactly: bool = False  # to the last digit; elsewhere u + (v - u) rounds
    scale: float = 3.0
    evaluations: tuple[int, ...] = (2 * B,)  # the rows of each
    in_time: bool = True  # whether the scale may be a function of t
    needs_cond: str | None = None  # who says so where there is none
    params: tuple[str, ...] = ()  # its parts, where they are not the velocity's own
    cond: Any = staticmethod(lambda labels: labels)
    tree: bool = False  # whether x may be a tree
    event: tuple[int, ...] = (2,)  # the shape of a row of x
    field: Any = None  # what it guides, where that is not a velocity


def network(traces=None, draws=False):
    """A velocity with params, of rows that do not interact, that notes the rows it is traced with;
    draws: it needs its key, as dropout does."""

    def apply(params, x, t, cond=None, *, key=None):
        leaves = jax.tree.leaves(x)
        t = jnp.broadcast_to(t, leaves[0].shape[:1])
        if traces is not None:
            traces.append(leaves[0].shape[0])
        told = jnp.full(t.shape, NULL) if cond is None else cond
        told = jnp.sin(1.0 + told)
        if draws:
            told = told + jax.random.normal(key, t.shape)

        def one(x):
            row = lambda a: a.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)  # noqa: E731
            return jnp.tanh(params["w"].astype(x.dtype) * x + row(t)) + params["b"].astype(
                x.dtype
            ) * row(told)

        return jax.tree.map(one, x)

    def init(key, x, t, cond=None):
        return {"w": jax.random.normal(key), "b": jnp.ones(())}

    return Velocity(init, apply)


def logits(velocity):
    """log p(label | x), by the velocity of x."""

    def apply(params, x, t, cond=None, *, key=None):
        v = velocity.apply(params, x, t, None, key=key)
        return jnp.stack([v[:, 0], v[:, 1], v[:, 0] * v[:, 1]], axis=1)

    return guidance.label_log_prob(Field(velocity.init, apply))


def value(velocity):
    """A reward of noisy data, by the velocity."""

    def apply(params, x, t, cond=None, *, key=None):
        return velocity.apply(params, x, t, cond, key=key)[:, 0] * x[:, 1]

    return Field(velocity.init, apply)


def mixture(velocity):
    """Two Gaussians beside the velocity."""

    def apply(params, x, t, cond=None, *, key=None):
        v = velocity.apply(params, x, t, cond, key=key)
        return GaussianMixture(v[:, :2], jnp.stack([v, v + 1], 1), jnp.zeros_like(v[:, 0]))

    return Field(velocity.init, apply)


def combined(make, **options):
    """The guided velocity of a combine of a scale."""
    return Row(
        lambda v, scale: guidance.guided(v, make(scale), null=NULL),
        needs_cond="guided",
        tree=True,
        **options,
    )


def joint(velocity):
    """The velocity on parts that see one another, where the other is not given in full."""

    def apply(params, x, t, cond=None, *, key=None):
        keys = dict(zip(x, jax.random.split(key) if key is not None else (None, None), strict=True))

        def one(part, other):
            v = velocity.apply(params, x[part], t[part], cond, key=keys[part])
            rest = (1 - t[other]).astype(v.dtype)
            return v + rest.reshape(-1, *(1,) * (v.ndim - 1)) * (1 + v * x[other])

        return {"a": one("a", "b"), "b": one("b", "a")}

    return Velocity(lambda key, x, t, cond=None: velocity.init(key, x["a"], t["a"], cond), apply)


def beside(labels):
    """Another part of the same shape, given, and its noise."""
    part = {"b": jnp.ones((labels.shape[0], 2))}
    return guidance.PartsCondition(part, jax.tree.map(lambda a: a / 2, part), labels)


FIRST = steering.measurements.mask([True, False])


def steered(make):
    """A velocity that a measurement of the first number steers, in a window that is everything."""
    return Row(
        lambda v, scale: make(v, scale),
        neutral=0.0,
        exactly=True,
        evaluations=(B,),
        cond=staticmethod(
            lambda labels: steering.SteeringCondition(jnp.ones((labels.shape[0], 2)), labels)
        ),
    )


def controlled(make, **options):
    """A velocity that is pulled to a point, given beside its labels."""
    return Row(
        make,
        neutral=0.0,
        exactly=True,
        scale=np.float64(0.6),
        evaluations=(B,),
        cond=staticmethod(
            lambda labels: steering.SteeringCondition(jnp.full((labels.shape[0], 2), 0.3), labels)
        ),
        **options,
    )


class Part(nn.Module):
    """A velocity as a module of a Linen network."""

    function: Any

    @nn.compact
    def __call__(self, x, t, cond=None):
        params = {name: self.param(name, nn.initializers.ones, ()) for name in "wb"}
        if self.is_initializing():
            return x
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return self.function(params, x, t, cond, key=key)


class Network(nn.Module):
    """A Linen network of one module."""

    function: Any

    @nn.compact
    def __call__(self, x, t, cond=None):
        return Part(self.function, name="velocity")(x, t, cond)


TABLE = {
    "autoguidance": Row(
        lambda v, scale: guidance.autoguidance(v, v, guidance.scaled(scale)),
        evaluations=(B, B),
        params=("velocity", "weak"),
        tree=True,
    ),
    "cfg": Row(lambda v, scale: guidance.cfg(v, scale, null=NULL), needs_cond="cfg", tree=True),
    "classifier_guidance": Row(
        lambda v, scale: guidance.classifier_guidance(v, logits(v), scale),
        neutral=0.0,
        exactly=True,
        evaluations=(B, B),
        needs_cond="classifier_guidance",
        params=("velocity", "classifier"),
    ),
    "reward_guidance": Row(
        lambda v, scale: guidance.reward_guidance(v, value(v), scale),
        neutral=0.0,
        exactly=True,
        evaluations=(B, B),
        params=("velocity", "reward"),
    ),
    "density": Row(
        lambda v, q: guidance.density(v, guidance.quantile(q)),
        neutral=0.5,
        exactly=True,
        scale=np.float64(0.8),
        evaluations=(B,),
        in_time=False,
    ),
    "density constant_rate": Row(
        lambda v, rate: guidance.density(v, guidance.constant_rate(rate)),
        neutral=None,
        evaluations=(B, B),
        in_time=False,  # its function is of x too
    ),
    "guided interval": combined(
        lambda w: guidance.interval(guidance.scaled(w), np.float64(0.2), np.float64(0.7))
    ),
    "guided projected": combined(
        lambda w: guidance.projected(w, parallel=np.float64(0.5), limit=TWO), exactly=True
    ),
    "guided rescaled": combined(lambda w: guidance.rescaled(guidance.scaled(w), np.float64(0.7))),
    "guided scaled": combined(guidance.scaled),
    "guided zero_star": combined(guidance.zero_star),
    "given_parts single_part": Row(
        lambda v, _: guidance.single_part(guidance.given_parts(joint(v)), "a"),
        neutral=0.0,
        exactly=True,
        evaluations=(B,),
        in_time=False,
        cond=staticmethod(lambda labels: beside(labels)._replace(absent=None)),
    ),
    "parts": Row(
        lambda v, w: guidance.single_part(guidance.parts(joint(v), {("a", "b"): w}), "a"),
        neutral=0.0,
        exactly=True,
        cond=staticmethod(beside),
    ),
    "hold_known": Row(
        lambda v, mask: couplings.hold_known(
            v._replace(apply=lambda p, x, t, c, *, key=None: v.apply(p, x, t, c.label, key=key))
        ),
        neutral=0.0,
        exactly=True,
        evaluations=(B,),
        in_time=False,
        cond=staticmethod(
            lambda labels: types.Condition(
                label=labels, aligned=jnp.zeros((labels.shape[0], 2), jnp.bfloat16)
            )
        ),
    ),
    "negative": Row(
        lambda v, scale: guidance.negative(v, guidance.scaled(scale)),
        cond=staticmethod(lambda labels: (labels, (labels + 1) % NULL)),
        tree=True,
    ),
    "probabilistic_guidance": Row(
        lambda field, scale: guidance.probabilistic_guidance(field, scale, null=NULL),
        neutral=0.0,
        scale=np.float64(0.6),
        needs_cond="probabilistic_guidance",
        field=mixture,
    ),
    "steering.data_consistency": steered(
        lambda v, w: steering.data_consistency(v, FIRST, np.float64(0.1), scale=w)
    ),
    "steering.flow_chef": steered(
        lambda v, w: steering.flow_chef(v, steering.squared_residual(FIRST), w)
    ),
    "steering.fluxspace": Row(
        lambda v, scale: steering.fluxspace(Network(v.apply), ["velocity"], scale),
        neutral=0.0,
        exactly=True,
        evaluations=(2 * B, B, B),  # the second one for its shapes alone
        params=("velocity",),
        cond=staticmethod(
            lambda labels: steering.EditCondition(
                labels, (labels + 1) % NULL, jnp.full_like(labels, NULL)
            )
        ),
    ),
    "steering.loss_guidance": steered(
        lambda v, w: steering.loss_guidance(v, steering.squared_residual(FIRST, TWO), w)
    ),
    "steering.projected_flow": Row(
        lambda v, weight: steering.projected_flow(v, 2, weight=weight),
        neutral=0.0,
        exactly=True,
        scale=np.float64(0.6),
        evaluations=(B,),
        cond=staticmethod(
            lambda labels: steering.SteeringCondition(
                jnp.full((labels.shape[0], 2, 2, 1), 0.3), labels
            )
        ),
        event=(2, 2, 1),
    ),
    "steering.pseudoinverse_guidance": steered(
        lambda v, w: steering.pseudoinverse_guidance(v, FIRST, np.float64(0.1), scale=w)
    ),
    "steering.toward_data": controlled(lambda v, eta: steering.toward_data(v, eta)),
    "steering.toward_noise": controlled(lambda v, gamma: steering.toward_noise(v, gamma)),
    "steering.transport_guided": controlled(
        lambda v, strength: steering.transport_guided(v, strength, phase=1.0), in_time=False
    ),
    "with_cond": Row(
        lambda v, scale: guidance.with_cond(v, NULL),
        neutral=None,
        evaluations=(B,),
        in_time=False,
        tree=True,
    ),
    "zero_init": Row(
        lambda v, until: guidance.zero_init(v, until),
        neutral=0.0,
        exactly=True,
        scale=np.float64(0.4),
        evaluations=(B,),
        in_time=False,
        tree=True,
    ),
}
EXCUSED = {
    **dict.fromkeys(("Combine", "Excess", "PartsCondition"), "a type"),
    "given_parts": "in the row of single_part",
    "denoised_reward": "a field of rewards, tests/losses/test_preferences.py",
    "denoise": "of a density, tests/guidance/test_denoise.py",
    "density_step": "a Step, tests/contracts/test_step_contract.py",
    "label_log_prob": "a field of classifiers, in classifier_guidance",
    "quantile": "an excess, in density",
    **dict.fromkeys(
        "discrete_cfg predictor_rates reweighted_jump taylor_rates tempered".split(),
        "of tokens, tests/guidance/test_discrete.py",
    ),
    **dict.fromkeys(
        ("simplex_cfg", "simplex_classifier_guidance"),
        "fields of logits, tests/paths/test_dirichlet.py",
    ),
    **dict.fromkeys(("score_alignment", "to_quantile"), "latents, tests/guidance/test_prior.py"),
    **dict.fromkeys(
        ("extrapolate", "linear_ramp", "score_sum"),
        "what causal blocks take, tests/flows/test_transformer_flows.py",
    ),
}


def test_every_public_name_is_in_the_table():
    rows = {name.split()[-1] for name in TABLE} | {"density", "guided"}
    elsewhere = {name for name in rows if name.startswith("steering.")} | {"hold_known"}
    assert set(guidance.__all__) == rows - elsewhere | set(EXCUSED)
    made = {name for name in steering.__all__ if returns_a_velocity(getattr(steering, name))}
    assert {f"steering.{name}" for name in made} == elsewhere - {"hold_known"}


def returns_a_velocity(member):
    return inspect.isfunction(member) and inspect.signature(member).return_annotation is Velocity


def plain(row, velocity):
    return velocity if row.field is None else row.field(velocity)


def made(row, velocity, scale):
    return row.make(plain(row, velocity), scale)


def given(row, dtype=np.float32):
    """x, t, labels and cond."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, *row.event)), dtype)
    t, labels = jnp.linspace(0.05, 0.9, B, dtype=np.float32), jnp.arange(B) % NULL
    return x, t, labels, row.cond(labels)


def params_of(row):
    one = {"w": jnp.asarray(0.7), "b": jnp.asarray(0.5)}
    other = {"w": jnp.asarray(-0.4), "b": jnp.asarray(0.8)}
    return dict(zip(row.params, (one, other), strict=False)) if row.params else one


def law(out):
    """Logits up to a constant."""
    if isinstance(out, GaussianMixture):
        return out._replace(logits=jax.nn.log_softmax(out.logits))
    return out


def own_params(row):
    """The params of the velocity itself."""
    return params_of(row)["velocity"] if row.params else params_of(row)


def upside_down(tree):
    return jax.tree.map(lambda a: a[::-1], tree)


@functools.cache
def measured(name):
    """What is looked at, in one program for each row and without it."""
    row, traces = TABLE[name], []
    x, t, labels, cond = given(row)
    bare, guide = network(), made(row, network(traces), row.scale)

    @jax.jit
    def run(params, x):
        traces.clear()
        out, pull = jax.vjp(lambda params, x: guide.apply(params, x, t, cond), params, x)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    params, r = params_of(row), {}
    r["out"], r["slopes"] = run(params, x)
    r["seen"] = tuple(traces)
    run(params, x + 1)
    assert len(traces) == len(r["seen"])
    if row.neutral is not None:
        r["neutral"] = made(row, bare, row.neutral).apply(params, x, t, cond)
        r["plain"] = plain(row, bare).apply(own_params(row), x, t, labels)
    r["rows"] = guide.apply(params, upside_down(x), t[::-1], upside_down(cond))
    r["scalar"] = guide.apply(params, x, 0.3, cond)
    r["each"] = guide.apply(params, x, jnp.full(B, 0.3), cond)
    one = jax.tree.map(lambda c: c[:1], cond)
    r["one"] = guide.apply(params, x, t, one)
    same = jax.tree.map(lambda c: jnp.broadcast_to(c, (B, *c.shape[1:])), one)
    r["same"] = guide.apply(params, x, t, same)
    if row.in_time:
        ramp = made(row, bare, lambda t: jnp.full_like(t, row.scale))
        r["in time"] = ramp.apply(params, x, t, cond)
    r["eager"] = guide.apply(params, x, t, cond)
    return r


def close(one, other, **tolerance):
    tolerance = tolerance or {"rtol": 2e-5, "atol": 2e-6}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


@pytest.mark.parametrize("name", TABLE)
def test_the_neutral_value_is_the_velocity(name):
    """And another one is not; the same numbers in time, under jit and without."""
    r, row = measured(name), TABLE[name]
    if row.neutral is not None:
        assert jax.tree.map(jnp.shape, r["out"]) == jax.tree.map(jnp.shape, r["plain"])
        close(law(r["neutral"]), law(r["plain"]), **({"rtol": 0, "atol": 0} if row.exactly else {}))
        if not name.startswith(("hold_known", "given_parts")):  # whose scale is in cond
            assert (
                max(
                    np.abs(a - b).max()
                    for a, b in zip(*map(jax.tree.leaves, (r["out"], r["plain"])), strict=True)
                )
                > 1e-3
            )
    close(r["eager"], r["out"])
    if row.in_time:
        close(r["in time"], r["out"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_rows_are_rows_and_evaluations_as_many_as_said(name):
    """One time is that of every row, and so is one row of cond."""
    r, row = measured(name), TABLE[name]
    assert r["seen"][: len(row.evaluations)] == row.evaluations
    close(r["rows"], upside_down(r["out"]))
    close(r["scalar"], r["each"])
    close(r["one"], r["same"])


@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_finite_and_reach_all_params(name):
    r = measured(name)
    for path, slope in jax.tree_util.tree_leaves_with_path(r["slopes"]):
        assert np.all(np.isfinite(slope)) and np.any(slope != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", TABLE)
def test_types_params_and_keys(name):
    """What comes out has the type of x, whatever the options are; init makes the params; the key
    goes to the network, and is consumed once."""
    row = TABLE[name]
    guide = made(row, network(), row.scale)
    for dtype, inner in ((np.float32,) * 2, (jnp.bfloat16, np.float32), (np.float64,) * 2):
        with jax.enable_x64(True):  # in which float32 stays float32
            x, t, labels, cond = given(row, dtype)
            t = t.astype(inner)
            inside = jax.tree.map(lambda p, t=t: p.astype(t.dtype), params_of(row))
            out = jax.eval_shape(guide.apply, inside, x, t, cond)
            expected = dtype if row.field is None else inner  # mixtures are in float32 or better
            assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {np.dtype(expected)}
            if row.tree:
                pair = {"a": x, "b": x[:, :, None]}
                assert jax.eval_shape(guide.apply, inside, pair, t, cond) == jax.eval_shape(
                    lambda pair=pair: pair
                )
    x, t, labels, cond = given(row)
    params = guide.init(KEYS[0], x, t, cond)
    assert jax.tree.structure(params) == jax.tree.structure(params_of(row))
    guide = made(row, network(draws=True), row.scale)
    both = lambda a, b: (guide.init(a, x, t, cond), guide.apply(params, x, t, cond, key=b))  # noqa: E731
    assert not keys_consumed_twice(both, *KEYS[:2])
    with pytest.raises(TypeError):  # no key is no key inside
        jax.eval_shape(lambda: guide.apply(params, x, t, cond))


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.needs_cond])
def test_conditions_that_do_not_fit_are_named(name):
    row = TABLE[name]
    x, t, _, cond = given(row)
    guide = made(row, network(), row.scale)
    with pytest.raises(ValueError, match=f"{row.needs_cond}: expected cond, what .*got None"):
        guide.apply(params_of(row), x, t)
    with pytest.raises(ValueError, match=f"{row.needs_cond}: expected cond to lead with 6 rows"):
        guide.apply(params_of(row), x, t, cond[:4])


def test_bad_options_fail_at_construction():
    v = network()
    for make, said in [
        (lambda: guidance.interval(guidance.scaled(2.0), 0.8, 0.2), "interval: .*low < high"),
        (lambda: guidance.rescaled(guidance.scaled(2.0), 1.5), "rescaled: expected mix in"),
        (lambda: guidance.projected(2.0, limit=0), "projected: expected limit > 0, got 0"),
        (lambda: guidance.zero_init(v, 2), "zero_init: expected until in"),
        (lambda: guidance.quantile(1.0), r"quantile: expected q in \(0, 1\), got 1"),
        (
            lambda: guidance.classifier_guidance(v, logits(v), 1.0, start=0.0),
            "classifier_guidance: expected start in",
        ),
        (
            lambda: guidance.probabilistic_guidance(mixture(v), 1.0, null=NULL),
            r"probabilistic_guidance: .*scale in \[0, 1\), got 1",
        ),
        (
            lambda: guidance.probabilistic_guidance(mixture(v), 0.5, null=NULL, orthogonal=2),
            r"orthogonal in \[0, 1\], got 2",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            make()
