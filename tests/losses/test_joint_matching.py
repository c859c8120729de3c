"""Losses of parts and of tokens: joint Gaussians in closed form, weights and times of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses, oracles, times
from jflow.types import Velocity

KEY = jax.random.key(0)
MEAN = {"image": [1.0, -0.5], "text": [0.3]}
COV = np.array([[1.0, 0.4, 0.6], [0.4, 0.8, -0.1], [0.6, -0.1, 1.2]])
ORACLE = oracles.joint_gaussian(MEAN, COV)
N = 8192


def fixed(**t):
    """All rows at these times."""
    return lambda key, n: {part: jnp.full(n, value) for part, value in t.items()}


def exact_plus(params, x, t, cond=None, *, key=None):
    """The exact velocity, and a constant beside it."""
    return jax.tree.map(lambda v, extra: v + extra, ORACLE.velocity(x, t), params)


V = Velocity(lambda *_: {}, exact_plus)


@pytest.mark.parametrize(
    "t", [{"image": 0.3, "text": 0.8}, {"image": 0.6, "text": 1.0}, {"image": 0.6, "text": 0.0}]
)
def test_the_exact_velocity_is_the_minimum_and_its_loss_the_residual(t):
    """What is beside it adds its square; given and absent parts count nothing, whatever is said of
    them."""
    x = ORACLE.sample(jax.random.key(1), N)
    loss = losses.joint_matching(V, time=fixed(**t), weights={"text": 2.0})
    run = jax.jit(jax.value_and_grad(lambda p: loss(p, KEY, {"x": x}), has_aux=True))
    (least, exact), slope = run({"image": 0.0, "text": 0.0})
    (more, moved), _ = run({"image": 0.5, "text": -0.5})
    residual = ORACLE.residual({part: jnp.full(1, value) for part, value in t.items()})
    for part, factor in (("image", 1.0), ("text", 2.0)):
        if not 0 < t[part] < 1:
            assert exact[part] == moved[part] == slope[part] == 0
            continue
        # five standard deviations of the mean of N squares, and of N errors
        deviation = 5 * np.sqrt(2 / N) * residual[part][0]
        np.testing.assert_allclose(exact[part], residual[part][0], atol=deviation)
        spread = 5 * np.sqrt(residual[part][0] / N)
        np.testing.assert_allclose(moved[part] - exact[part], 0.25, atol=2 * 0.5 * spread)
        assert abs(slope[part]) < factor * 2 * spread  # of the mean of N errors times 2
    np.testing.assert_allclose(least, exact["image"] + 2 * exact["text"], rtol=1e-6)
    assert more > least


def test_kinds_of_rows_are_means_of_their_own():
    """Rows in which a part is given or absent have no part in its mean, and no row at all is 0."""
    t = np.array([0.2, 1.0, 0.0, 0.7], np.float32)
    law = lambda key, n: {"image": jnp.asarray(t), "text": jnp.ones(n)}  # noqa: E731
    x = ORACLE.sample(jax.random.key(1), 4)
    batch = {"x": x, "x0": jax.tree.map(jnp.zeros_like, x), "weight": np.array([1, 2, 3, 4.0])}
    still = Velocity(None, lambda params, x, *_, key=None: jax.tree.map(lambda a: 0 * a, x))
    value, metrics = losses.joint_matching(still, time=law)({}, KEY, batch)
    error = np.mean(np.square(x["image"]), axis=1)
    np.testing.assert_allclose(value, (error[0] + 4 * error[3]) / 5, rtol=1e-5)
    assert metrics["text"] == 0 and metrics["image"] == value


def tokens(params, x, t, cond=None, *, key=None):
    """A velocity of tokens that read their own time and the mean of all."""
    t = jnp.broadcast_to(t.reshape(t.shape[0], -1), x.shape[:2])[..., None]
    return params * jnp.tanh(x) + t + 0.1 * jnp.mean(x, axis=1, keepdims=True)


TOKENS = Velocity(None, tokens)
RNG = np.random.default_rng(0)
SEQUENCES = RNG.normal(size=(3, 4, 2)).astype(np.float32)
PAIR = {"x": SEQUENCES, "x0": SEQUENCES[::-1] / 2}
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)


def test_weights_and_times_of_tokens():
    """Equal times are one time, weights of one are none; the mean is over tokens that count."""
    row = lambda key, n: jnp.linspace(0.1, 0.9, n)  # noqa: E731
    each = lambda key, n: jnp.broadcast_to(row(key, n)[:, None], (n, 4))  # noqa: E731
    value = lambda time, **more: losses.flow_matching(TOKENS, time=time)(  # noqa: E731
        jnp.float32(0.3), KEY, PAIR | more
    )[0]
    plain = value(row)
    np.testing.assert_allclose(value(each), plain, rtol=1e-5)
    np.testing.assert_allclose(value(row, weight=np.ones((3, 4), bool)), plain, rtol=1e-5)
    np.testing.assert_allclose(
        value(each, weight=np.array([1.0, 2.0, 0.0])),
        value(row, weight=np.array([1.0, 2.0, 0.0])),
        rtol=1e-5,
    )
    own = lambda key, n: jnp.linspace(0.0, 1.0, 4 * n).reshape(n, 4)  # noqa: E731
    t = np.asarray(own(None, 3))[..., None]
    x_t = (1 - t) * PAIR["x0"] + t * PAIR["x"]
    error = np.mean(
        (np.asarray(tokens(0.3, x_t, t[..., 0])) - (PAIR["x"] - PAIR["x0"])) ** 2, axis=2
    )
    np.testing.assert_allclose(value(own), error.mean(), rtol=1e-5)
    weight = MASK * np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    expected = np.sum(weight * error) / weight.sum()
    np.testing.assert_allclose(value(own, weight=weight), expected, rtol=1e-5)
    huber = losses.flow_matching(TOKENS, time=own, metric=losses.pseudo_huber(1e4))
    np.testing.assert_allclose(
        huber(jnp.float32(0.3), KEY, PAIR | {"weight": weight})[0] * 2e4, expected, rtol=1e-3
    )


def test_a_token_of_weight_zero_may_hold_anything():
    """NaN beside what a network masks, and a row of nothing else; the gradient is the same."""

    def masked(params, x, t, cond=None, *, key=None):
        return tokens(params, jnp.where(cond[..., None], x, 0), t)

    loss = losses.flow_matching(Velocity(None, masked), time=times.tokens(4))
    run = jax.jit(jax.value_and_grad(lambda p, batch: loss(p, KEY, batch), has_aux=True))
    batch = PAIR | {"weight": MASK, "cond": MASK}
    spoilt = batch | {"x": np.where(MASK[..., None], SEQUENCES, np.nan)}
    (value, _), slope = run(jnp.float32(0.3), batch)
    (again, _), same = run(jnp.float32(0.3), spoilt)
    assert np.isfinite(value) and slope != 0
    np.testing.assert_allclose([again, same], [value, slope], rtol=1e-5)
    # what is finite there is seen by the network, as what comes before in a sequence
    plain = losses.flow_matching(TOKENS)
    moved = {**PAIR, "x": np.where(MASK[..., None], SEQUENCES, 5.0), "weight": MASK}
    assert plain(0.3, KEY, moved)[0] != plain(0.3, KEY, PAIR | {"weight": MASK})[0]


def test_flow_matching_of_parts_is_the_mean_of_both():
    """One time for all; weights by part, of tokens too; the same pairs as alone."""
    x = {"a": SEQUENCES, "b": SEQUENCES[:, :, 0]}
    x0 = jax.tree.map(lambda a: a[::-1] / 2, x)
    law = lambda key, n: jnp.linspace(0.1, 0.9, n)  # noqa: E731

    def both(params, x, t, cond=None, *, key=None):
        return {"a": tokens(params, x["a"], t), "b": params * x["b"] + t[:, None]}

    run = losses.flow_matching(Velocity(None, both), time=law)
    alone = losses.flow_matching(TOKENS, time=law)
    other = losses.flow_matching(
        Velocity(None, lambda params, x, t, *_, key=None: params * x + t[:, None]), time=law
    )
    for weight in (None, {"a": MASK}, np.array([1.0, 0.0, 2.0])):
        of = weight if isinstance(weight, dict) else {"a": weight, "b": weight}
        single = [
            loss(
                0.3,
                KEY,
                {"x": x[p], "x0": x0[p]} | ({} if of.get(p) is None else {"weight": of[p]}),
            )[0]
            for p, loss in (("a", alone), ("b", other))
        ]
        batch = {"x": x, "x0": x0} | ({} if weight is None else {"weight": weight})
        np.testing.assert_allclose(run(0.3, KEY, batch)[0], np.mean(single), rtol=1e-5)
    drawn = losses.chain(losses.drop_cond(0.5, null=0), run)
    value = drawn(0.3, KEY, {"x": x, "cond": np.arange(3)})[0]
    assert (
        np.isfinite(value)
        and value != drawn(0.3, jax.random.key(1), {"x": x, "cond": np.arange(3)})[0]
    )


PARTS = {"image": np.zeros((3, 2), np.float32), "text": np.zeros((3, 1), np.float32)}
JOINT = losses.joint_matching(V, time=fixed(image=0.3, text=0.5))
WRONG = {
    "array": (
        JOINT,
        {"x": PARTS["image"]},
        r"an array as the times drawn, as x is one, got the parts",
    ),
    "part": (
        JOINT,
        {"x": {"image": PARTS["image"]}},
        r"the times drawn with the parts of x, \['image'\], got \['image', 'text'\]",
    ),
    "source": (
        JOINT,
        {"x": PARTS, "x0": {"image": PARTS["image"]}},
        r"'x0' with the parts of x, .* got \['image'\]",
    ),
    "no parts": (
        JOINT,
        {"x": PARTS, "x0": PARTS["image"]},
        "'x0' with the parts of x, got an array",
    ),
    "shape": (
        JOINT,
        {"x": PARTS, "x0": PARTS | {"text": PARTS["image"]}},
        r"'x0'\['text'\] of the shape of 'x'\['text'\], \[3, 1\], got \[3, 2\]",
    ),
    "rows": (
        JOINT,
        {"x": PARTS | {"text": np.zeros((2, 1), np.float32)}},
        r"x of shape \[b, \*event\], got \[3, 2\] and \[2, 1\]",
    ),
    "kind": (
        JOINT,
        {"x": PARTS | {"text": np.zeros((3, 1), int)}},
        r"'x'\['text'\] of a floating type",
    ),
    "weight": (
        JOINT,
        {"x": PARTS, "weight": {"text": np.ones((3, 2))}},
        r"'weight'\['text'\] of shape \[3\] or \[3, 1\], got \[3, 2\]",
    ),
    "weights": (
        JOINT,
        {"x": PARTS, "weight": {"txt": np.ones(3)}},
        r"'weight' of the parts of x, .*, got \['txt'\]",
    ),
    "one time": (
        losses.joint_matching(V, time=times.uniform()),
        {"x": PARTS},
        r"time to draw a dict .* got an array \[3\]",
    ),
    "names": (
        losses.joint_matching(V, time=fixed(image=0.3, text=0.5), weights={"txt": 1.0}),
        {"x": PARTS},
        r"weights of the parts of x, .* got \['txt'\]",
    ),
    "velocity": (
        losses.joint_matching(
            Velocity(None, lambda p, x, *_, key=None: x["image"]), time=fixed(image=0.3, text=0.5)
        ),
        {"x": PARTS},
        r"a velocity with the parts of x, .*, got \[\]",
    ),
    "its shape": (
        losses.joint_matching(
            Velocity(None, lambda p, x, *_, key=None: x | {"text": x["image"]}),
            time=fixed(image=0.3, text=0.5),
        ),
        {"x": PARTS},
        r"a velocity of the part 'text' of shape \[3, 1\], got \[3, 2\]",
    ),
    "times": (
        losses.flow_matching(TOKENS, time=times.tokens(5)),
        {"x": SEQUENCES},
        r"flow_matching: expected times of shape \[3\], or \[3, 4\], .* got \[3, 5\]",
    ),
    "times of a part": (
        losses.joint_matching(
            V, time=lambda key, n: {"image": jnp.ones(n), "text": jnp.ones(n + 1)}
        ),
        {"x": PARTS},
        r"times of the part 'text' of shape \[3\], or \[3, 1\], .* got \[4\]",
    ),
    "tokens": (
        losses.flow_matching(TOKENS),
        {"x": SEQUENCES, "weight": np.ones((3, 2))},
        r"'weight' of shape \[3\] or \[3, 4\], got \[3, 2\]",
    ),
    "others": (
        losses.consistency_flow_matching(V),
        {"x": PARTS},
        r"expected 'x' to be an array .* got the parts \['image', 'text'\]: losses.flow",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what):
    loss, batch, said = WRONG[what]
    params = {"image": 0.0, "text": 0.0}
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda: loss(params, KEY, batch))


def test_bad_options_fail_at_construction():
    with pytest.raises(
        ValueError, match=r"joint_matching: expected a finite weights\['text'\] >= 0"
    ):
        losses.joint_matching(V, time=times.parts(("image", "text")), weights={"text": -1.0})
    with pytest.raises(TypeError, match="joint_matching: expected"):
        losses.joint_matching(ORACLE, time=times.parts(("image", "text")))
