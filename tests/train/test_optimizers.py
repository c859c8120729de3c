"""AdamP, GradNorm, model soups and the step law."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import train

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# --- AdamP ---


def adamp_by_hand(p, grads, lr, decay, delta=0.1, ratio=0.1, b1=0.9, b2=0.999, eps=1e-8):
    """In float64, a loop over outputs and steps, as the paper has it."""
    p = np.float64(p)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for i, g in enumerate(np.float64(grads), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = (m / (1 - b1**i)) / (np.sqrt(v / (1 - b2**i)) + eps)
        factor = 1.0
        if p.ndim > 1:
            outputs, whole = [np.s_[..., j] for j in range(p.shape[-1])], [np.s_[:]]
            for parts in (outputs, whole):
                cosines = [
                    abs(np.vdot(g[s], p[s])) / (np.linalg.norm(g[s]) * np.linalg.norm(p[s]))
                    for s in parts
                ]
                if max(cosines) < delta / np.sqrt(p[parts[0]].size):
                    for s in parts:
                        u[s] -= p[s] * np.vdot(p[s], u[s]) / np.vdot(p[s], p[s])
                    factor = ratio
                    break
        p = (1 - lr * decay * factor) * p - lr * u
    return p


def orthogonal(g, p, axis):
    return g - p * np.sum(g * p, axis, keepdims=True) / np.sum(p * p, axis, keepdims=True)


def test_adamp_follows_its_formula():
    """Three steps of kernels whose gradients are across each output, across the whole, and
    neither; a bias; and a scanned stack of two kernels, of which one is projected."""
    w, scanned = normal(6, 3), normal(2, 6, 3)
    params = {
        "outputs": w,
        "whole": w + 1,
        "free": w,
        "bias": normal(3),
        "blocks": {"kernel": scanned},
    }
    # Gradients that would still be across weights which have moved a little.
    whole = normal(6, 3)
    mixed = np.stack([orthogonal(normal(6, 3), scanned[0], 0), scanned[1] + normal(6, 3)])
    first = {
        "outputs": orthogonal(normal(6, 3), w, 0),
        "whole": orthogonal(whole, w + 1, (0, 1)),
        "free": w + 0.3 * normal(6, 3),
        "bias": normal(3),
        "blocks": {"kernel": mixed},
    }
    grads = [first, jax.tree.map(lambda g: 0.7 * g, first), jax.tree.map(lambda g: -g, first)]
    optimizer = train.adamp(1e-3, weight_decay=0.2)

    def run(params, grads):
        def step(carry, g):
            update, state = optimizer.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], update), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), grads)[0][0]

    stacked = jax.tree.map(lambda *g: np.stack(g), *grads)
    found = jax.device_get(jax.jit(run)(params, stacked))
    for name in ("outputs", "whole", "free", "bias"):
        expected = adamp_by_hand(params[name], stacked[name], 1e-3, 0.2)
        np.testing.assert_allclose(found[name] - params[name], expected - params[name], atol=1e-6)
    for i in range(2):  # each layer decides for itself
        expected = adamp_by_hand(scanned[i], stacked["blocks"]["kernel"][:, i], 1e-3, 0.2)
        np.testing.assert_allclose(found["blocks"]["kernel"][i], expected, atol=1e-6)
    # and the three cases are three cases
    adam = adamp_by_hand(w, stacked["outputs"], 1e-3, 0.2, delta=0.0)
    assert np.abs(adam - found["outputs"]).max() > 1e-4
    adam = adamp_by_hand(params["whole"], stacked["whole"], 1e-3, 0.2, delta=0.0)
    assert np.abs(adam - found["whole"]).max() > 1e-4


def test_scale_invariant_weights_grow_less_than_by_adam():
    """A loss of w / |w|: AdamP steps across w, so that its length grows by the square of the step
    alone; where the loss is not scale-invariant, both are the same."""
    x = normal(16, 4)

    def invariant(w):
        return jnp.mean((x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)) - x[:, :3]) ** 2)

    def ridge(w):
        return jnp.mean((x @ w) ** 2) + jnp.sum(w**2)

    @jax.jit
    def run(w):
        def train_on(loss, optimizer):
            def step(carry, _):
                w, state = carry
                update, state = optimizer.update(jax.grad(loss)(w), state, w)
                return (optax.apply_updates(w, update), state), jnp.sum(update * w)

            (end, _), along = jax.lax.scan(step, (w, optimizer.init(w)), length=30)
            return end, along

        pair = train.adamp(0.02), optax.adam(0.02)
        return [[train_on(loss, optimizer) for optimizer in pair] for loss in (invariant, ridge)]

    w = normal(4, 3)
    ((own, along), (adam, other)), ((same, _), (plain, _)) = jax.device_get(run(w))
    size = np.linalg.norm
    assert np.abs(along).max() < 1e-5 < np.abs(other).max()  # sums of 12 products in float32
    assert size(w) < size(own) < size(w) + 0.5 * (size(adam) - size(w))
    np.testing.assert_allclose(same, plain, rtol=1e-6)


def test_bad_input_of_adamp():
    with pytest.raises(ValueError, match="delta and decay_ratio >= 0, got -1.0"):
        train.adamp(0.1, delta=-1.0)
    optimizer = train.adamp(0.1)
    with pytest.raises(ValueError, match="got no params"):
        optimizer.update({"w": np.ones(2)}, optimizer.init({"w": np.ones(2)}))


# --- GradNorm ---


def toward(m, scale=1.0, part="shared"):
    def loss(params, key, batch, frozen=None):
        square = scale * jnp.sum((params[part] - m) ** 2)
        return square, {"distance": square / scale}

    return loss


def test_gradnorm_makes_gradients_equally_long():
    """Two losses at the same distance, one 100 times the other: weights 200 / 101 and 2 / 101."""
    m = np.float32([3.0, 4.0])
    balance = train.gradnorm(
        {"small": toward(m), "large": toward(-m, 100.0)}, alpha=0.0, optimizer=optax.adam(0.01)
    )
    step = train.make_step(balance.loss, optax.sgd(0.0), refresh=balance.refresh)
    state = train.init_state(
        {"shared": np.zeros(2, np.float32)},
        optax.sgd(0.0),
        jax.random.key(0),
        frozen={"gradnorm": balance.init()},
    )
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s, {}), state, length=400))
    state, metrics = jax.device_get(run(state))
    held = state.frozen["gradnorm"]
    # The slopes have a constant size, so that Adam stays within its step of 0.01.
    np.testing.assert_allclose(held["weights"], [200 / 101, 2 / 101], atol=0.012)
    np.testing.assert_allclose(held["first"], [25.0, 2500.0])
    assert metrics["loss"][0] == 2525.0 and metrics["small/weight"][0] == 1.0
    assert metrics["large/distance"][-1] == 25.0


def test_gradnorm_favors_what_falls_slowly():
    """One step by hand: the target of a loss is the mean length times its rate to the alpha."""
    losses = {"a": toward(np.float32([1.0])), "b": toward(np.float32([2.0]))}
    balance = train.gradnorm(losses, alpha=2.0, optimizer=optax.sgd(0.01))
    entry = balance.init() | {"first": np.float32([1.0, 16.0])}
    params = {"shared": np.zeros(1, np.float32), "other": np.ones(3, np.float32)}
    run = jax.jit(lambda p, f: balance.refresh(p, f, jax.random.key(0), {}))
    found = jax.device_get(run(params, {"gradnorm": entry, "teacher": np.ones(1)}))
    ratio = np.array([1 / 1, 4 / 16])
    lengths, rate = np.array([2.0, 4.0]), ratio / ratio.mean()
    weights = 1 - 0.01 * lengths * np.sign(lengths - 3.0 * rate**2)
    np.testing.assert_allclose(found["gradnorm"]["weights"], 2 * weights / weights.sum(), rtol=1e-6)
    assert set(found) == {"gradnorm", "teacher"}


def test_bad_input_of_gradnorm():
    with pytest.raises(ValueError, match=r"two or more losses, got \['a'\]"):
        train.gradnorm({"a": toward(0.0)})
    both = {"a": toward(0.0), "b": toward(1.0)}
    with pytest.raises(ValueError, match="alpha >= 0, got -1"):
        train.gradnorm(both, alpha=-1)
    with pytest.raises(ValueError, match=r"expected 'gradnorm' in frozen, got the entries \[\]"):
        train.gradnorm(both).loss({"shared": np.zeros(1)}, None, {}, None)
    balance = train.gradnorm(both, where="head")
    with pytest.raises(ValueError, match=r"'head' matches no param; there are \['shared'\]"):
        frozen = {"gradnorm": balance.init()}
        balance.refresh({"shared": np.zeros(1, np.float32)}, frozen, jax.random.key(0), {})


# --- soups ---


def test_a_linear_soup_is_the_ensemble_of_checkpoints(tmp_path):
    """For a linear model the mean of params predicts the mean of predictions."""
    candidates = [{"kernel": normal(3, 2), "bias": normal(2)} for _ in range(3)]
    for i, params in enumerate(candidates):
        state = train.init_state(params, optax.sgd(0.1), jax.random.key(i), ema=0.9)
        train.checkpoint.save(tmp_path / str(i), 1, state)
    x = normal(5, 3)
    predict = lambda params: x @ params["kernel"] + params["bias"][None]  # noqa: E731
    soup = train.uniform_soup([tmp_path / str(i) for i in range(3)])
    np.testing.assert_allclose(
        predict(soup), np.mean([predict(p) for p in candidates], axis=0), atol=1e-6
    )
    error = lambda params: float(np.mean((predict(params) - predict(candidates[1])) ** 2))  # noqa: E731
    greedy = train.greedy_soup([str(tmp_path / str(i)) for i in range(3)], error)
    assert greedy.members == [1] and greedy.error == greedy.errors[1] < 1e-12  # of float32 products


def test_a_greedy_soup_takes_what_helps():
    """Errors |w - 0.4|: 0.5 and -0.1 have the mean 0.2, which is worse than 0.5 alone; with 0.2
    it is 0.35, and better."""
    weights = (-0.1, 0.5, 0.2, np.nan)
    error = lambda params: abs(params["w"] - 0.4)  # noqa: E731
    soup = train.greedy_soup([{"w": jnp.float32(w)} for w in weights], error)
    assert soup.members == [1, 2]
    np.testing.assert_allclose([soup.params["w"], soup.error], [0.35, 0.05], atol=1e-6)
    np.testing.assert_allclose(soup.errors, [0.5, 0.1, 0.2, np.nan], atol=1e-6)


def test_a_soup_keeps_types_and_sums_in_float32():
    """In bfloat16 the sum of 1 and 255 ones would stop at 256, and of many more before 512."""
    soup = train.uniform_soup([{"w": jnp.ones(2, jnp.bfloat16)}] * 600)
    assert soup["w"].dtype == jnp.bfloat16 and soup["w"].tolist() == [1.0, 1.0]


def test_bad_soups():
    with pytest.raises(ValueError, match="one candidate or more, got none"):
        train.uniform_soup([])
    with pytest.raises(ValueError, match=r"expected 'a' of shape \(2,\) in candidate 1, got \(3,"):
        train.uniform_soup([{"a": np.zeros(2)}, {"a": np.zeros(3)}])
    with pytest.raises(ValueError, match="expected 'b' of shape None in candidate 1"):
        train.uniform_soup([{"a": np.zeros(2)}, {"a": np.zeros(2), "b": np.zeros(1)}])
    with pytest.raises(ValueError, match=r"a finite error of some candidate, got \[nan\]"):
        train.greedy_soup([{"a": np.zeros(2)}], lambda params: np.nan)


# --- the step law ---


def test_the_step_law_and_its_range():
    """Its exponents, and the point of the paper's largest runs, 1.07e9 params on 1e11 tokens."""
    law = train.step_law(1.07e9, 1e11)
    np.testing.assert_allclose(law.learning_rate, 1.5556e-3, rtol=1e-3)
    np.testing.assert_allclose(law.batch_tokens, 1.1077e6, rtol=1e-3)
    assert law.in_range
    twice = train.step_law(2.14e9, 2e11)
    np.testing.assert_allclose(twice.learning_rate / law.learning_rate, 2 ** (0.307 - 0.713), 1e-6)
    np.testing.assert_allclose(twice.batch_tokens / law.batch_tokens, 2**0.571, 1e-6)
    for params, tokens in ((1e8, 1e10), (1e10, 1e10), (5e8, 1e9), (5e8, 1e12)):
        assert not train.step_law(params, tokens).in_range
    for params, tokens in ((0, 1e10), (1e9, np.inf), (1e9, -1)):
        with pytest.raises(ValueError, match="step_law: expected positive finite"):
            train.step_law(params, tokens)
