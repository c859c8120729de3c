import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import guidance, types

MEANS = np.asarray([[2.0, 0.0], [-1.0, 1.5], [0.5, -2.0]], np.float32)
STD, NULL = 0.5, 3


def component(x, t, mean):
    """Velocity and log-density (up to a constant) of the linear path to N(mean, STD^2)."""
    t = t[:, None]
    variance = (1 - t) ** 2 + (t * STD) ** 2
    centered = x - t * mean
    v = mean + (t * STD**2 - (1 - t)) / variance * centered
    return v, -0.5 * jnp.sum(centered**2 / variance, axis=1)


def closed_form(x, t, label):
    """The velocity of one component, or of the equal mixture of all where label is NULL."""
    vs, logs = zip(
        *(component(x, t, jnp.broadcast_to(mean, x.shape)) for mean in MEANS), strict=True
    )
    vs = jnp.stack(vs)
    mixed = jnp.sum(jax.nn.softmax(jnp.stack(logs), axis=0)[:, :, None] * vs, axis=0)
    single = vs[jnp.minimum(label, NULL - 1), jnp.arange(x.shape[0])]
    return jnp.where((label == NULL)[:, None], mixed, single)


def traced():
    calls = []

    def apply(params, x, t, cond=None, *, key=None):
        calls.append((x.shape, t.shape, cond.shape, key))
        return closed_form(x, t, cond)

    return types.Velocity(lambda key, x, t, cond=None: {"made": key}, apply), calls


def draw(n=64):
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    return (
        2 * jax.random.normal(k1, (n, 2)),
        jax.random.uniform(k2, (n,)),
        jax.random.randint(k3, (n,), 0, NULL),
    )


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guided_mixture(scale):
    x, t, label = draw()
    velocity, _ = traced()
    conditional, unconditional = (
        closed_form(x, t, label),
        closed_form(x, t, jnp.full_like(label, NULL)),
    )
    assert (
        float(jnp.max(jnp.abs(conditional - unconditional))) > 0.5
    )  # else guidance could be anything
    v = guidance.cfg(velocity, scale, null=NULL).apply({}, x, t, label)
    # float32 rounding of numbers of size 10
    np.testing.assert_allclose(
        v, unconditional + scale * (conditional - unconditional), rtol=1e-5, atol=1e-5
    )


def test_one_evaluation_of_twice_the_rows():
    x, t, label = draw()
    velocity, calls = traced()
    key = jax.random.key(1)
    guidance.cfg(velocity, 2.0, null=NULL).apply({}, x, t, label, key=key)
    assert calls == [((128, 2), (128,), (128,), key)]


def test_a_scale_in_time():
    x, t, label = draw()
    velocity, _ = traced()
    window = guidance.cfg(velocity, lambda t: jnp.where(t < 0.5, 1.0, 4.0), null=NULL).apply(
        {}, x, t, label
    )
    low = guidance.cfg(velocity, 1.0, null=NULL).apply({}, x, t, label)
    high = guidance.cfg(velocity, 4.0, null=NULL).apply({}, x, t, label)
    np.testing.assert_array_equal(window, jnp.where(t[:, None] < 0.5, low, high))


def test_trees_of_conditions_and_states():
    x = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 3, 1))}
    cond = {"label": jnp.arange(4), "vector": jnp.ones((4, 2))}
    null = {"label": 9, "vector": jnp.zeros(2)}
    apply = lambda params, x, t, cond=None, *, key=None: {  # noqa: E731
        "a": x["a"] * cond["vector"],
        "b": x["b"] * cond["label"][:, None, None],
    }
    out = guidance.cfg(types.Velocity(None, apply), 3.0, null=null).apply({}, x, 0.5, cond)
    np.testing.assert_array_equal(out["a"], 3.0 * x["a"])
    np.testing.assert_array_equal(out["b"][:, 0, 0], 9 + 3.0 * (jnp.arange(4) - 9))


def test_init_is_the_velocity_s_own():
    velocity, _ = traced()
    assert guidance.cfg(velocity, 2.0, null=NULL).init is velocity.init


def test_errors():
    x, t, label = draw(4)
    velocity, _ = traced()
    with pytest.raises(ValueError, match="got None"):
        guidance.cfg(velocity, 2.0, null=NULL).apply({}, x, t)
    with pytest.raises(ValueError, match="one row of cond"):
        guidance.cfg(velocity, 2.0, null={"label": 3}).apply({}, x, t, label)
    with pytest.raises(ValueError, match=r"null of shape \(3,\).*got \(2,\)"):
        guidance.cfg(velocity, 2.0, null=jnp.zeros(2)).apply({}, x, t, jnp.zeros((4, 3)))
