"""Paths of tokens and the rates of their jumps, against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.random import clone
from keys import KEYS, keys_consumed_twice

from jflow import oracles, paths
from jflow.paths import Schedule, schedules
from jflow.types import Field

SCHEDULES = {
    "linear": paths.LINEAR,
    "t^2": schedules.polynomial(2.0),
    "sine": schedules.cosine(),
    "own": Schedule(lambda t: t**3 * (2 - t), lambda t: 1 - t**3 * (2 - t)),
}
SOURCES = {
    "mask": ([[0], [1]], [0.3, 0.7], [0.0, 0.0, 1.0]),
    "uniform": ([[0], [1], [2]], [0.2, 0.5, 0.3], [1 / 3] * 3),
    "any": ([[0], [2]], [0.4, 0.6], [0.1, 0.6, 0.3]),
}


def correctors(source):
    made = [paths.resampling(2.0, SOURCES[source][2])]
    if source == "mask":
        made.append(paths.remasking(3.0, mask=2))
    if source == "uniform":
        made.append(paths.renoising(1.5))
    return made


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("source", SOURCES)
def test_rates_satisfy_the_kolmogorov_equation(source, schedule, x64):
    """On three states: p_t = kappa p1 + (1 - kappa) p0 has dp_t/dt = p_t R, correctors leave it,
    and rows sum to zero."""
    sequences, weights, prior = SOURCES[source]
    prior = np.array(prior)
    data = np.zeros(3)
    data[np.ravel(sequences)] = weights
    kappa = SCHEDULES[schedule].alpha
    oracle = oracles.tokens(sequences, weights, source=prior, schedule=SCHEDULES[schedule])
    fields = [
        paths.jump_rates(oracle.field, SCHEDULES[schedule], corrector)
        for corrector in (None, *correctors(source))
    ]
    states, t = jnp.tile(jnp.arange(3)[:, None], (4, 1)), np.repeat([0.0, 0.2, 0.5, 0.9], 3)
    found = jax.jit(lambda x, t: [field.apply({}, x, t) for field in fields])(states, t)
    found = [np.asarray(r).reshape(4, 3, 3) for r in found]
    share, slope = map(np.asarray, jax.jvp(kappa, (t[::3],), (np.ones(4),)))
    p = np.outer(share, data) + np.outer(1 - share, prior)
    for r in found:
        np.testing.assert_allclose(r.sum(-1), 0, atol=1e-12)
        off = r[:, ~np.eye(3, dtype=bool)]
        assert np.all(off >= 0) and np.all(np.isfinite(off))
        change = np.einsum("tx,txy->ty", p, r)
        np.testing.assert_allclose(change, slope[:, None] * (data - prior), atol=1e-9)
    for r in found[1:]:
        assert np.abs(r - found[0])[1:].max() > 0.1  # a corrector does something


def test_campbell_rates_have_the_factor_t():
    """Unmasking at rate (1 + N t) / (1 - t) and masking at N; for a uniform source (1 + N + N (S -
    1) t) / (1 - t) p1(y) + N p1(x)."""
    p = jnp.array([[[0.2, 0.3, 0.5]], [[0.0, 1.0, 0.0]]])
    law = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: jnp.log(p))
    x, t, noise = jnp.array([[2], [1]]), jnp.array([0.25, 0.25]), 4.0
    masked = paths.jump_rates(law, corrector=paths.remasking(noise, mask=2)).apply({}, x, t)
    fill = (1 + noise * 0.25) / 0.75
    np.testing.assert_allclose(masked[0, 0, :2], fill * p[0, 0, :2], rtol=1e-6)
    np.testing.assert_allclose(masked[1, 0], [0, -noise, noise], rtol=1e-6)
    noisy = paths.jump_rates(law, corrector=paths.renoising(noise)).apply({}, x, t)
    factor = (1 + noise + noise * 2 * 0.25) / 0.75
    np.testing.assert_allclose(noisy[0, 0, :2], factor * p[0, 0, :2] + noise * 0.5, rtol=1e-6)


def test_points_are_of_data_with_probability_kappa():
    """At a time of each row, of each token, and at a pace of each token; ends are exact; the same
    key, the same point; the target is the data."""
    b, n = 4000, 3
    x0, x1 = jnp.full((b, n), 7), jnp.tile(jnp.arange(n), (b, 1))
    paced = Schedule(lambda t: t ** jnp.array([[1.0, 2.0, 3.0]]), lambda t: 1 - t)
    path = paths.discrete(schedules.polynomial(2.0))

    @jax.jit
    def run(key):
        point = lambda path, t: path.point(x0, x1, t, key=clone(key))  # noqa: E731
        each = jnp.broadcast_to(jnp.array([0.2, 0.5, 0.9]), (b, n))
        return (
            point(path, jnp.full(b, 0.5)),
            point(path, each),
            point(paths.discrete(paced), jnp.full(b, 0.5)),
            point(path, jnp.zeros(b)),
            point(path, jnp.ones(b)),
        )

    found = jax.device_get(run(KEYS[0]))
    expected = ([0.25] * 3, [0.04, 0.25, 0.81], [0.5, 0.25, 0.125], [0.0] * 3, [1.0] * 3)
    for x_t, share in zip(found, expected, strict=True):
        kept = x_t == np.asarray(x1)
        assert np.all(kept | (x_t == 7)) and x_t.dtype == x1.dtype
        error = 4 * np.sqrt(np.array(share) * (1 - np.array(share)) / b)
        assert np.all(np.abs(kept.mean(0) - share) <= error)
    np.testing.assert_array_equal(run(KEYS[0])[0], found[0])
    assert np.any(np.asarray(run(KEYS[1])[0]) != found[0])
    np.testing.assert_array_equal(path.target(x0, x1, jnp.zeros(b)), x1)
    assert not keys_consumed_twice(lambda key: path.point(x0, x1, jnp.zeros(b), key=key), KEYS[0])


def test_from_masks_the_law_of_data_does_not_depend_on_time():
    """So that implicit timesteps lose nothing; from a uniform source it does."""
    sequences, weights = [[0, 0], [0, 1], [1, 0]], [0.5, 0.2, 0.3]
    x, early, late = jnp.array([[2, 2], [0, 2], [2, 1]]), jnp.full(3, 0.1), jnp.full(3, 0.9)
    masked = oracles.tokens(sequences, weights, source=[0.0, 0.0, 1.0]).field
    np.testing.assert_allclose(masked.apply({}, x, early), masked.apply({}, x, late), atol=1e-6)
    blind = paths.without_time(masked)
    np.testing.assert_array_equal(blind.apply({}, x, early), blind.apply({}, x, late))
    law = np.exp(masked.apply({}, x, early))
    np.testing.assert_allclose(law[0, 0], [0.7, 0.3, 0], atol=1e-6)  # of the first token
    np.testing.assert_allclose(law[1, 1], [5 / 7, 2 / 7, 0], atol=1e-6)
    np.testing.assert_allclose(law[2, 0], [1, 0, 0], atol=1e-6)
    noisy = oracles.tokens(sequences, weights, source=[0.5, 0.5]).field
    x = jnp.array([[1, 1]])
    differ = noisy.apply({}, x, early[:1]) - noisy.apply({}, x, late[:1])
    assert np.abs(differ).max() > 0.1


def test_unmasking_has_no_mask_and_keeps_known_tokens():
    """Whatever the logits are, that of the mask too, of any extent; its gradient is finite, and 0
    for the mask and for known tokens."""
    x = jnp.array([[[3, 0], [3, 2]]])  # a grid

    def run(logits):
        field = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: logits)
        return paths.unmasking(field, 3).apply({}, x, jnp.zeros(1))

    logits = jnp.arange(16.0).reshape(1, 2, 2, 4)
    log_p, pull = jax.vjp(run, logits)
    other = run(logits.at[..., 3].set(50.0))
    np.testing.assert_array_equal(log_p, other)
    p = np.exp(log_p)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(p[..., 3], 0)
    np.testing.assert_array_equal(p[0, 0, 1], [1, 0, 0, 0])
    np.testing.assert_allclose(p[0, 0, 0, :3], np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum())
    slope = pull(jnp.where(log_p > -jnp.inf, 1.0, 0.0).at[..., 0].set(3.0))[0]
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(slope[..., 3], 0)
    np.testing.assert_array_equal(slope[0, :, 1], 0)
    assert np.all(slope[0, :, 0, :3] != 0)


def test_bad_options_and_shapes():
    law = Field(lambda *_: {}, lambda params, x, *_, key=None: jnp.zeros((x.shape[0], 3)))
    fair = Field(lambda *_: {}, lambda params, x, *_, key=None: jnp.zeros((*x.shape, 3)))
    x, t = jnp.array([[0, 1]]), jnp.zeros(1)
    halfway = Schedule(lambda t: t / 2, lambda t: 1 - t / 2)
    for call, said in [
        (lambda: paths.discrete(halfway), r"paths.discrete: .*kappa\(t\), runs from 0 .*got 0.0"),
        (lambda: paths.jump_rates(law, halfway), "jump_rates: expected a schedule"),
        (lambda: paths.discrete().point(x * 1.0, x, t, key=KEYS[0]), "expected x0 to hold tokens"),
        (lambda: paths.discrete().point(x, x, t), "paths.discrete is stochastic: it needs a key"),
        (lambda: paths.jump_rates(law).apply({}, x, t), r"logits of shape \[1, 2, 'V'\]"),
        (lambda: paths.unmasking(law, 1).apply({}, x, t), r"logits of shape \[1, 2, 'V'\]"),
        (lambda: paths.unmasking(fair, 3).apply({}, x, t), "unmasking: .*for the mask, 3, got"),
        (lambda: paths.unmasking(law, -1), "unmasking: expected mask to be a whole number"),
        (lambda: paths.resampling(-1.0, [1.0]), "resampling: expected a finite rate >= 0, got -1"),
        (lambda: paths.resampling(1.0, [0.5, 0.4]), "resampling: .*, got .*with sum 0.9"),
        (lambda: paths.remasking(-1.0, 2), "remasking: expected a finite noise >= 0"),
        (lambda: paths.renoising(-1.0), "renoising: expected a finite noise >= 0"),
        (
            lambda: oracles.tokens([[0, 2]], [1.0], source=[0.5, 0.5]),
            r"oracles.tokens: expected different sequences of tokens in 0 ... 1",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
