"""Every stochastic step, and every law of its noise, against every promise of `types.Step` and of
`solvers.sample_sde`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.random import clone
from keys import KEYS, keys_consumed_twice

from jflow import domains, guidance, oracles, solvers, steering
from jflow.distributions import mixtures
from jflow.paths import schedules
from jflow.solvers import noises
from jflow.types import Field, Velocity

HALF = np.float64(0.5)  # options are numbers of numpy's as well
B, ALARM = 64, 1e-3  # rows; the false-alarm rate of each law, were the seed not fixed
ORACLE = oracles.mixture([0.3, 0.7], [[-2.0, 0.0], [2.0, 0.5]], 0.1)
EXACT = mixtures.exact([0.3, 0.7], [[-2.0, 0.0], [2.0, 0.5]], 0.1)
COSINE = schedules.cosine()
BOX = domains.box((2,), -50.0, 50.0)
PARAMS = {"a": jnp.ones(()), "b": 0.1 * jnp.ones(())}


class Row(NamedTuple):
    make: Any  # velocity -> Step
    still: Any = None  # velocity -> the Step without noise
    name: str = "euler_maruyama"  # whose errors they are
    keyless: bool = True  # whether it is its mean without a key, and has a density
    normal: bool = True  # whether what is drawn, in std, is a standard normal of every dimension
    of_each: bool = False  # whether every dimension has a std of its own
    grid: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)


def with_noise(noise, **options):
    """Euler-Maruyama's step, its noise and the same noise none of it."""
    return Row(
        lambda v: solvers.euler_maruyama(v, noise(), **options),
        lambda v: solvers.euler_maruyama(v, noise(0.0), **options),
    )


def own_score(params, x, t, cond):
    return params["a"] * ORACLE.score(x, t) + params["b"] + cond[:, None]


def mixture_step(velocity):
    """The mixture whose means the velocity moves, which is what its params and cond do."""

    def apply(params, x, t, cond=None, *, key=None):
        made, v = EXACT.apply({}, x, t), velocity.apply(params, x, t, cond)
        return made._replace(means=made.means[..., : v.shape[1]] + v[:, None])

    return solvers.gm_sde(Field(velocity.init, apply))


def mapped_step(velocity, scale=2.0):
    """Overshooting of which the first dimension gets a part."""

    def apply(params, x, t, cond=None, *, key=None):
        return velocity.apply(params, x, t, cond), np.array([[0.4, 1.0]], np.float32)

    return steering.modulated_overshoot(Field(velocity.init, apply), scale)


TABLE = {
    "ancestral": Row(solvers.ancestral, lambda v: solvers.ancestral(v, 0.0), "ancestral"),
    "ancestral of half the noise, cosine": Row(
        lambda v: solvers.ancestral(v, HALF, COSINE),
        lambda v: solvers.ancestral(v, 0.0, COSINE),
        "ancestral",
    ),
    "density_step": Row(
        lambda v: guidance.density_step(v, guidance.constant_rate(HALF), 0.1),
        lambda v: guidance.density_step(v, guidance.quantile(0.6), 0.0),
        "density_step",
        keyless=False,
        normal=False,  # there is none across the level sets
        grid=(0.2, 0.4, 0.6, 0.7),
    ),
    "euler_maruyama": with_noise(lambda w=HALF: w),
    "euler_maruyama sbdm, cosine": with_noise(
        lambda scale=1.0: noises.sbdm(scale, COSINE), schedule=COSINE
    ),
    "euler_maruyama with a score": with_noise(lambda w=0.5: w, score=own_score),
    "gm_sde": Row(mixture_step, name="gm_sde", keyless=False),
    "overshoot": Row(solvers.overshoot, lambda v: solvers.overshoot(v, 0.0), "overshoot"),
    "reflected_step in a box that none leaves": Row(
        lambda v: solvers.reflected_step(solvers.euler_maruyama(v, HALF), BOX),
        lambda v: solvers.reflected_step(solvers.euler_maruyama(v, 0.0), BOX),
    ),
    "steering.modulated_overshoot": Row(
        mapped_step,
        lambda v: mapped_step(v, 0.0),
        "steering.modulated_overshoot",
        of_each=True,
    ),
}
EXCUSED = {
    "Trajectory": "what sample_sde keeps",
    "noises": "a module, all of whose names are below",
    "grids": "arrays, tests/solvers/test_grids.py",
    **dict.fromkeys(
        "sample_sde step_log_prob trajectory_log_prob".split(), "what is done with a step, here"
    ),
    **dict.fromkeys(
        "Method adaptive as_method fixed on_grid reverse".split(),
        "methods of ODEs, tests/solvers/test_method.py",
    ),
    **dict.fromkeys(
        "SolveInfo Status sample log_prob log_prob_with_energies sample_with_log_det Divergence "
        "check_divergence exact_divergence hutch_plus_plus hutchinson".split(),
        "solves of ODEs and divergences: test_sample, test_log_prob, test_divergence",
    ),
    **dict.fromkeys(
        "geodesic_euler geodesic_midpoint geodesic_rk4 projected riemannian_divergence".split(),
        "diffrax solvers and a divergence on manifolds, tests/solvers/test_manifold_solvers.py",
    ),
    **dict.fromkeys(
        "adams_bashforth ddim dpm_solver_2 dpm_solver_pp dpm_solver_pp_2s fireflow midpoint_time "
        "midpoint_in_log_snr pseudo_corrector unipc".split(),
        "diffrax solvers, tests/solvers/test_exponential_multistep.py",
    ),
    **dict.fromkeys(
        "control_log_ratio diffusion_sampler sample_controlled".split(),
        "paths under a control, tests/losses/test_diffusion_sampler.py",
    ),
    "noise_injection": "changes what is sampled, on purpose: tests/losses/test_policy.py",
    "reflected": "a diffrax solver, tests/solvers/test_reflected.py",
    **dict.fromkeys(
        "JVP apply_flow_map consistency_map expanded_time finite_difference instantaneous_velocity "
        "sample_flow_map total_derivative".split(),
        "flow maps, tests/solvers/test_flow_maps.py",
    ),
    **dict.fromkeys(
        "bellman bespoke_bound bespoke_error bespoke_params bespoke_sample step_costs".split(),
        "learned grids and solvers: test_bespoke, tests/losses/test_boss.py",
    ),
    **dict.fromkeys(
        "AccelerationCondition HierarchyCondition gm_ode refiner restore sample_acceleration "
        "sample_hierarchy sample_refined sample_variational".split(),
        "samplers of one method each, in tests/solvers and beside their losses",
    ),
    **dict.fromkeys(
        "DiscreteBound adaptive_jump confident_jump discrete_bound ending euler_jump "
        "exponential_jump jump".split(),
        "jumps of tokens, which are drawn from no normal: tests/solvers/test_jumps.py,"
        " tests/losses/test_discrete.py",
    ),
    **dict.fromkeys(
        "bayesian_update sample_bayesian".split(),
        "of parameters of distributions, tests/losses/test_bayesian.py",
    ),
    "bridge_step": "on the sphere, tests/paths/test_statistical.py",
    **dict.fromkeys(
        "TransitionInfo sample_kernels sample_transitions transition_condition".split(),
        "transition matching: test_transition, test_autoregressive_transitions of tests/losses",
    ),
}


def test_every_public_name_is_in_the_table():
    rows = {name.split()[0] for name in TABLE}
    elsewhere = {"density_step", "steering.modulated_overshoot"}
    assert set(solvers.__all__) == rows - elsewhere | set(EXCUSED)


def traced(traces, oracle=ORACLE):
    """A velocity with params and a cond, that notes when it is traced."""

    def apply(params, x, t, cond=None, *, key=None):
        traces.append(x.dtype)
        return params["a"] * oracle.velocity(x, t) + params["b"] * x + cond[:, None].astype(x.dtype)

    return Velocity(None, apply)


def given(dtype=np.float32):
    """x and cond of B rows."""
    x = np.random.default_rng(0).normal(size=(B, 2))
    return jnp.asarray(x, dtype), jnp.asarray(0.1 * np.sin(np.arange(B)), dtype)


@functools.cache
def measured(name):
    """What is looked at, in a program for the whole walk and one for a step, called with two
    keys."""
    row, traces = TABLE[name], []
    step = row.make(traced(traces))
    x0, cond = given()

    def walk(params, key, x0, cond):
        x, path = solvers.sample_sde(step, params, x0, key, row.grid, cond, return_trajectory=True)
        r, total = {"x": x, "path": path}, jnp.sum(x)
        if row.keyless:
            held = jax.lax.stop_gradient(path)
            r["replay"] = solvers.trajectory_log_prob(step, params, held, cond)
            total = total + jnp.sum(jnp.sin(r["replay"]))
        return total, r

    @jax.jit
    def run(*args):
        slopes, r = jax.grad(walk, argnums=(0, 3), has_aux=True)(*args)
        return r | {"slopes": slopes}

    first = run(PARAMS, KEYS[0], x0, cond)
    count = len(traces)
    other = run(PARAMS, KEYS[1], x0, cond)
    assert len(traces) == count

    @jax.jit
    def once(key, x0, cond):
        rows = jnp.full(B, 0.3), jnp.full(B, 0.4)
        r = {
            "scalar": step(PARAMS, x0, 0.3, 0.4, key, cond),
            "rows": step(PARAMS, x0, *rows, clone(key), cond),
        }
        return r | {"mean alone": step(PARAMS, x0, 0.3, 0.4, None, cond)} if row.keyless else r

    for r, key in ((first, KEYS[0]), (other, KEYS[1])):
        r |= once(key, x0, cond)
    return jax.tree.map(np.asarray, (first, other))


def wide(std):
    """std of each number of the state, [n, B, 2]."""
    return np.broadcast_to(std.reshape(*std.shape[:2], -1), (*std.shape[:2], 2))


@pytest.mark.parametrize("name", TABLE)
def test_mean_and_std_are_of_what_is_drawn(name):
    """x_next is mean + std e, e standard normal and new for every step, row, dimension and key; the
    trajectory is those steps. Shapes are those of x; std is a number for each row, or like x."""
    (r, other), row = measured(name), TABLE[name]
    path, n = r["path"], len(row.grid) - 1
    assert path.x.shape == (n + 1, B, 2) and path.mean.shape == (n, B, 2)
    assert path.std.shape == ((n, B, 2) if row.of_each else (n, B)) and np.all(path.std >= 0)
    np.testing.assert_allclose(path.t, row.grid)
    np.testing.assert_array_equal(path.x[-1], r["x"])
    std = wide(path.std)
    drawn = std > 0
    e = (path.x[1:] - path.mean)[drawn] / std[drawn]
    assert e.size >= 2 * B and np.unique(e).size > 0.99 * e.size
    if row.normal:
        assert scipy.stats.kstest(e, "norm").pvalue > ALARM
    np.testing.assert_allclose(path.x[1:][~drawn], path.mean[~drawn], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(path.x[0], other["path"].x[0])
    assert np.all(path.x[2] != other["path"].x[2])


@pytest.mark.parametrize("name", TABLE)
def test_the_key_is_in_the_draw_alone_and_times_are_of_rows_or_of_all(name):
    (r, other), row = measured(name), TABLE[name]
    for one, same in zip(r["scalar"], r["rows"], strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-5, atol=1e-6)
    if row.keyless:
        x_next, mean, std = r["mean alone"]
        np.testing.assert_array_equal(x_next, mean)
        for result in (r, other):
            np.testing.assert_allclose(result["scalar"][1], mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(result["scalar"][2], std, rtol=1e-6)
    else:
        x, cond = given()
        with pytest.raises(ValueError, match=f"{row.name} is stochastic: it needs a key"):
            row.make(traced([]))(PARAMS, x, 0.3, 0.4, None, cond)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.keyless])
def test_the_log_prob_of_a_trajectory_is_that_of_its_normals(name):
    """By scipy, and the same from a replay: a ratio of 1 to 1e-6 before any update. What has std 0
    counts nothing."""
    r, _ = measured(name)
    path, std = r["path"], wide(np.asarray(r["path"].std, np.float64))
    safe = np.where(std > 0, std, 1)
    expected = scipy.stats.norm.logpdf(np.asarray(path.x[1:], np.float64), path.mean, safe)
    expected = np.where(std > 0, expected, 0).sum(-1)
    np.testing.assert_allclose(r["replay"], expected, rtol=1e-5, atol=1e-5)
    plain = jax.vmap(solvers.step_log_prob)(path.x[1:], path.mean, path.std)
    np.testing.assert_allclose(np.exp(r["replay"] - plain), np.ones(std.shape[:2]), atol=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_params_and_cond_are_reached(name):
    """By gradients of the end and of the log-prob; cond has a row for each, or a single one."""
    r, _ = measured(name)
    for slope in jax.tree.leaves(r["slopes"]):
        assert np.all(np.isfinite(slope)) and np.any(slope != 0)
    x, cond = given()
    step = TABLE[name].make(traced([]))
    walk = lambda cond: solvers.sample_sde(step, PARAMS, x, KEYS[0], TABLE[name].grid, cond)[0]  # noqa: E731
    assert jax.eval_shape(walk, cond[:1]).shape == x.shape
    with pytest.raises(ValueError, match="solvers.sample_sde: expected cond to lead with 64 rows"):
        walk(cond[:3])


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.still])
def test_without_noise_it_is_the_mean(name):
    x, cond = given()
    step = TABLE[name].still(traced([]))
    x_next, mean, std = jax.jit(step)(PARAMS, x, 0.3, 0.4, KEYS[0], cond)
    np.testing.assert_array_equal(x_next, mean)
    np.testing.assert_array_equal(std, 0)
    assert np.all(x_next != x)


@pytest.mark.parametrize("name", TABLE)
def test_types_and_shapes(name):
    """A walk ends in the type of x0, its steps are in float32 or better; a velocity of another
    shape is an error in the step's name; keys are consumed once."""
    row = TABLE[name]
    for dtype, inner in ((np.float32,) * 2, (jnp.bfloat16, np.float32), (np.float64,) * 2):
        with jax.enable_x64(True):  # in which float32 stays float32
            step = row.make(traced([]))
            x, cond = given(dtype)
            params = jax.tree.map(lambda p, inner=inner: p.astype(inner), PARAMS)
            end, path = jax.eval_shape(
                lambda key, step=step, params=params, x=x, cond=cond: solvers.sample_sde(
                    step, params, x, key, row.grid, cond, return_trajectory=True
                ),
                KEYS[0],
            )
            assert end.dtype == dtype and {leaf.dtype for leaf in path} == {np.dtype(inner)}
            assert "callback" not in str(jax.make_jaxpr(step)(params, x, 0.3, 0.4, KEYS[0], cond))
    narrow = Velocity(None, lambda *args, **key: traced([]).apply(*args, **key)[:, :1])
    x, cond = given()
    with pytest.raises(ValueError, match=f"{row.name}: expected .*shape"):
        jax.eval_shape(row.make(narrow), PARAMS, x, 0.3, 0.4, KEYS[0], cond)
    step = row.make(traced([]))
    walk = lambda key: solvers.sample_sde(step, PARAMS, x, key, row.grid, cond)  # noqa: E731
    assert not keys_consumed_twice(walk, KEYS[0])


@pytest.mark.parametrize("name", noises.__all__)
def test_noises_are_a_number_for_each_time(name):
    for noise in (getattr(noises, name)(), getattr(noises, name)(HALF)):
        w = noise(jnp.linspace(0, 1, 9))
        assert w.shape == (9,) and np.all(w > -1e-6) and np.all(np.isfinite(w[1:]))
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            with jax.enable_x64(True):
                assert noise(jnp.full(2, 0.5, dtype)).dtype == dtype


def test_bad_options():
    v, x, key = traced([]), jnp.zeros((2, 2)), KEYS[0]
    step = solvers.euler_maruyama(v, 0.5)
    walk = lambda key, grid: solvers.sample_sde(step, PARAMS, x, key, grid, x[:, 0])  # noqa: E731
    for call, said in [
        (lambda: walk(None, [0.0, 1.0]), "solvers.sample_sde is stochastic: it needs a key"),
        (lambda: walk(key, [1.0, 0.0]), "solvers.sample_sde: expected a finite grid that rises"),
        (lambda: walk(key, [0.0, 1.2]), r"solvers.sample_sde: expected times in \[0, 1\]"),
        (lambda: solvers.euler_maruyama(v, -0.1), "euler_maruyama: .*got -0.1"),
        (lambda: solvers.euler_maruyama(v, 0.1, limit=0.0), "limit > 0 or None, got 0.0"),
        (lambda: solvers.ancestral(v, 1.5), "ancestral: expected 0 <= eta <= 1, got 1.5"),
        (lambda: solvers.overshoot(v, -1.0), "overshoot: expected scale >= 0, got -1.0"),
        (
            lambda: guidance.density_step(v, guidance.quantile(0.6), -1.0),
            "density_step: expected .*noise .*got -1",
        ),
        *(
            (lambda name=name: getattr(noises, name)(-1.0), f"noises.{name}: expected scale >= 0")
            for name in noises.__all__
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
