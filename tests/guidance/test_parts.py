"""Joint velocities of parts: given and absent ones against the laws of a joint Gaussian, and
guidance by pairs of parts against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jflow import guidance, oracles, solvers
from jflow.guidance import PartsCondition
from jflow.types import Velocity

MEAN = {"image": [1.0, -0.5], "text": [0.3], "sound": [0.0]}
ROOT = np.random.default_rng(0).normal(size=(4, 4))
COV = ROOT @ ROOT.T / 4 + 0.3 * np.eye(4)
ORACLE = oracles.joint_gaussian(MEAN, COV)
JOINT = oracles.as_velocity(ORACLE)
B = 5
SIZES = {"image": slice(0, 2), "text": slice(2, 3), "sound": slice(3, 4)}


def draws(seed=0, n=B):
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=(n, len(m))).astype(np.float32) for p, m in MEAN.items()}


def conditional(value):
    """The law of the image given the text, the sound averaged out."""
    mean, i, j = np.concatenate(list(MEAN.values())), SIZES["image"], SIZES["text"]
    gain = COV[i, j] @ np.linalg.inv(COV[j, j])
    return mean[i] + gain @ (value - mean[j]), COV[i, i] - gain @ COV[j, i]


def test_a_given_part_leaves_the_conditional_law_of_the_free_one():
    """The velocity is that of the conditional Gaussian, and so are samples and log-densities."""
    x, noise, value = draws()["image"], draws(1)["sound"], np.array([0.8], np.float32)
    mean, cov = conditional(value)
    exact = oracles.gaussian(mean, cov)
    v = guidance.single_part(guidance.given_parts(JOINT), "image")
    cond = PartsCondition({"text": value[None]}, {"sound": noise})
    t = jnp.linspace(0.0, 1.0, B)
    np.testing.assert_allclose(v.apply({}, x, t, cond), exact.velocity(x, t), rtol=1e-4, atol=1e-5)

    n = 4096
    x0 = jax.random.normal(jax.random.key(0), (n, 2))
    cond = PartsCondition({"text": value[None]}, {"sound": draws(2, n)["sound"]})
    x1 = np.asarray(solvers.sample(v, {}, x0, cond, method=50)[0], np.float64)
    # five standard deviations of means and variances, beside the error of 50 steps
    np.testing.assert_allclose(x1.mean(0), mean, atol=5 * np.sqrt(np.diag(cov).max() / n) + 1e-3)
    np.testing.assert_allclose(np.cov(x1.T), cov, atol=5 * cov.max() * np.sqrt(2 / n) + 5e-3)

    base = lambda x: jnp.sum(-0.5 * x**2 - 0.5 * np.log(2 * np.pi), axis=1)  # noqa: E731
    cond = PartsCondition({"text": value[None]}, {"sound": noise})
    found, _ = solvers.log_prob(v, {}, x, base, cond)
    np.testing.assert_allclose(found, stats.multivariate_normal(mean, cov).logpdf(x), atol=2e-3)


def test_parts_that_are_all_free_or_all_absent_beside_one():
    """Without a condition all flow together, with the joint law; alone a part has its own law."""
    x, t = draws(), jnp.linspace(0.0, 1.0, B)
    whole = oracles.gaussian(np.concatenate(list(MEAN.values())), COV)
    joined = whole.velocity(np.concatenate([x[p] for p in MEAN], axis=1), t)
    v = guidance.given_parts(JOINT).apply({}, x, t)
    for part, at in SIZES.items():
        np.testing.assert_allclose(v[part], joined[:, at], rtol=1e-3, atol=1e-4)
    alone = oracles.gaussian(MEAN["image"], COV[:2, :2]).velocity(x["image"], t)
    absent = {p: draws(1)[p] for p in ("text", "sound")}
    free = guidance.given_parts(JOINT).apply(
        {}, {"image": x["image"]}, {"image": t}, PartsCondition(absent=absent)
    )
    assert list(free) == ["image"]
    np.testing.assert_allclose(free["image"], alone, rtol=1e-4, atol=1e-5)
    times = {"image": t, "text": 1 - t, "sound": 0.5 * t}
    own = guidance.given_parts(JOINT).apply({}, x, times)
    jax.tree.map(np.testing.assert_array_equal, own, JOINT.apply({}, x, times))


def test_guidance_by_pairs_is_its_formula():
    """Two parts are free and one is given: of a free part, each pair with another that is there."""
    x, noise, t = draws(), draws(1), jnp.linspace(0.0, 0.9, B)
    given, free = {"text": x["text"]}, {p: x[p] for p in ("image", "sound")}
    weights = {
        ("image", "text"): 1.5,
        ("image", "sound"): lambda t: 0.5 + t,
        ("sound", "image"): -0.3,
        ("text", "image"): 9.0,  # the text is given: no say
    }
    seen = []

    def apply(params, x, t, cond=None, *, key=None):
        seen.append(x["image"].shape[0])
        return jax.tree.map(lambda v: v + cond[:, None], ORACLE.velocity(x, t))

    guided = guidance.parts(Velocity(None, apply), weights)
    label = jnp.arange(B, dtype=jnp.float32)
    found = guided.apply({}, free, t, PartsCondition(given, noise, label))
    # all; image and text; image; image and sound; sound
    assert seen == [5 * B]

    def by_hand(*there):
        state = {p: x[p] if p in there else noise[p] for p in MEAN}
        times = {p: (t if p in free else 1.0) if p in there else 0.0 for p in MEAN}
        return ORACLE.velocity(state, times)

    everything, image, sound = by_hand(*MEAN), by_hand("image"), by_hand("sound")
    both = by_hand("image", "sound")
    expected = {
        "image": everything["image"]
        + 1.5 * (by_hand("image", "text")["image"] - image["image"])
        + (0.5 + t)[:, None] * (both["image"] - image["image"])
        + label[:, None],
        "sound": everything["sound"] - 0.3 * (both["sound"] - sound["sound"]) + label[:, None],
    }
    for part in expected:
        np.testing.assert_allclose(found[part], expected[part], rtol=1e-4, atol=1e-4)


def test_guidance_of_a_joint_velocity_takes_times_of_parts():
    """Each part by itself, by its own time; one time for all is that of every part."""

    def apply(params, x, t, cond=None, *, key=None):
        t = t if isinstance(t, dict) else dict.fromkeys(x, t)
        return {p: x[p] + (cond + t[p])[:, None] for p in x}

    v = Velocity(lambda *_: {}, apply)
    x = {p: a for p, a in draws().items() if p != "sound"}
    t = {"image": jnp.linspace(0, 1, B), "text": jnp.linspace(1, 0.5, B)}
    cond = jnp.arange(B, dtype=jnp.float32)
    guided = guidance.cfg(v, lambda t: 1 + t, null=0.0)
    out = guided.apply({}, x, t, cond)
    for p in x:
        expected = x[p] + ((1 + t[p]) * cond + t[p])[:, None]
        np.testing.assert_allclose(out[p], expected, rtol=1e-5)
        stopped = guidance.zero_init(v, 0.6).apply({}, x, t, cond)[p]
        np.testing.assert_array_equal(np.any(stopped != 0, axis=1), t[p] >= 0.6)
    same = guided.apply({}, x, dict.fromkeys(x, t["text"]), cond)
    jax.tree.map(np.testing.assert_allclose, same, guided.apply({}, x, t["text"], cond))
    weak = guidance.autoguidance(v, v, guidance.scaled(2.0))
    both = {"velocity": {}, "weak": {}}
    jax.tree.map(np.testing.assert_allclose, weak.apply(both, x, t, cond), v.apply({}, x, t, cond))
    with pytest.raises(ValueError, match=r"t with the parts of x, \['image', 'text'\], got \['im"):
        guided.apply({}, x, {"image": t["image"]}, cond)
    with pytest.raises(ValueError, match=r"t\['text'\] of shape \[5\], .* got \[4\]"):
        guided.apply({}, x, {**t, "text": t["text"][:4]}, cond)


X = {"image": np.zeros((B, 2), np.float32)}
REST = {p: np.zeros((B, 1), np.float32) for p in ("text", "sound")}
PLAIN = guidance.given_parts(JOINT)
GUIDED = guidance.parts(JOINT, {("image", "text"): 1.0})
WRONG = {
    "array": (PLAIN, X["image"], 0.0, None, r"x to be a dict of the free parts, .*single_part"),
    "cond": (PLAIN, X, 0.0, {"given": REST}, "cond to be a guidance.PartsCondition or None, got"),
    "twice": (PLAIN, X, 0.0, PartsCondition(X | REST), r"one of x, .*, got \['image'\] twice"),
    "both": (PLAIN, X, 0.0, PartsCondition(REST, REST), r"got \['sound', 'text'\] twice"),
    "rows": (
        PLAIN,
        X,
        0.0,
        PartsCondition({p: a[:3] for p, a in REST.items()}),
        "to lead with 5 rows",
    ),
    "times": (PLAIN, X, jnp.zeros(4), PartsCondition(REST), r"t of shape \[5\], .*got \[4\]"),
    "missing": (PLAIN, X, 0.0, None, r"joint_gaussian: expected . with the parts of x, \['image'"),
    "noise": (
        GUIDED,
        X,
        0.0,
        PartsCondition(REST, {"sound": REST["sound"]}),
        r"guidance.parts: expected noise of \['text'\] in cond.absent, .* that of \['sound'\]",
    ),
    "nowhere": (
        guidance.parts(JOINT, {("image", "tex"): 1.0}),
        X,
        0.0,
        PartsCondition(REST, REST),
        r"weights of the parts \['image', 'sound', 'text'\], got \['tex'\]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what):
    v, x, t, cond, said = WRONG[what]
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda: v.apply({}, x, t, cond))


def test_weights_are_by_pairs():
    for bad in ("image", ("image",), ("image", "image")):
        with pytest.raises(ValueError, match="guidance.parts: expected weights by pairs of parts"):
            guidance.parts(JOINT, {bad: 1.0})
