"""Glow and Flow++: what the contract tables don't show."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import distributions, flows, nets
from jflow.types import Condition


def drawn(init, *args):
    """Params away from their initial values, whose programs are not compiled."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda p: (0.2 * rng.normal(size=p.shape)).astype(p.dtype), shapes)


def images(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape) * 3 + 2, dtype)


def test_multi_scale_glow_has_the_log_det_of_its_jacobian(x64):
    flow = flows.glow((4, 8, 2), scales=2, depth=2, hidden=6, embed=nn.Embed(3, 2))
    x, labels = images(2, 4, 8, 2, dtype=np.float64), jnp.arange(2)

    params = drawn(flow.init, x, labels)

    @jax.jit
    def run(params, x):
        z, log_det = flow.inverse(params, x, labels)
        one = lambda row, c: flow.inverse(params, row[None], c[None])[0].reshape(-1)  # noqa: E731
        jacobian = jax.vmap(jax.jacrev(one))(x, labels)
        return z, log_det, jacobian.reshape(2, 64, 64), *flow.forward(params, z, labels)

    z, log_det, jacobian, again, back = run(params, x)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-9)
    np.testing.assert_allclose(back, -log_det, atol=1e-9)
    np.testing.assert_allclose(again, x, atol=1e-9)
    # the channels that the second scale does not see stay what the split's prior made of them: no
    # pixel is left alone
    assert np.all(np.abs(z - x) > 0) and z.shape == x.shape


def test_actnorms_see_the_data_and_layers_differ_at_init():
    """At init every step hands on channels of zero mean and unit deviation, so that the latents
    have them too."""
    flow = flows.glow((8, 8, 1), scales=2, depth=3, hidden=6, standardize=False)
    x = images(64, 8, 8, 1)

    @jax.jit
    def run(x):
        params = flow.init(jax.random.key(0), x)
        return params, flow.inverse(params, x)[0]

    params, z = run(x)
    squeezed, _ = bj.squeeze().forward({}, z)
    np.testing.assert_allclose(jnp.mean(squeezed, axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(jnp.std(squeezed, axis=(0, 1, 2)), 1, atol=1e-3)
    actnorm, _, coupling = (params["bijector"]["1"]["stacked"]["1"][i] for i in "012")
    assert actnorm["log_scale"].shape == (3, 4) and np.all(
        np.abs(actnorm["log_scale"][-1]) < 1e-3
    )  # the rest is done
    assert np.allclose(actnorm["log_scale"][0], -np.log(3), atol=0.1)
    for kernel in (coupling["net"][name]["kernel"] for name in ("near", "pixel", "far")):
        assert np.all(np.std(kernel, axis=0) > 0)


def test_actnorm_log_det_is_its_log_scale_times_the_pixels():
    layer = bj.actnorm(3)
    x = images(5, 4, 6, 3)
    params = drawn(layer.init, x)
    _, log_det = layer.forward(params, x)
    np.testing.assert_allclose(log_det, np.full(5, np.sum(params["log_scale"]) * 4 * 6), rtol=1e-5)


def test_temperature_scales_the_latents_and_keeps_the_params():
    shape = (4, 4, 1)
    options = {"scales": 1, "depth": 1, "hidden": 4}
    flow = flows.glow(shape, **options)
    cool = flows.glow(shape, **options, base=distributions.scaled(distributions.normal(shape), 0.5))
    key = jax.random.key(1)

    params = drawn(flow.init, images(8, *shape))

    @jax.jit
    def run(params):
        hot, cold = (
            flow.sample(params, key, 6),
            cool.sample_and_log_prob(params, jax.random.clone(key), 6),
        )
        return flow.inverse(params, hot), flow.inverse(params, cold[0]), cold[1]

    (z, _), (z_cold, log_det), log_prob = run(params)
    np.testing.assert_allclose(z_cold, 0.5 * z, atol=1e-5)
    latent = jax.scipy.stats.norm.logpdf(z_cold, scale=0.5).reshape(6, -1).sum(1)
    np.testing.assert_allclose(log_prob, latent + log_det, atol=1e-3)


def test_images_and_vectors_condition_glow():
    flow = flows.glow((4, 4, 1), scales=2, depth=1, hidden=4)
    x = images(4, 4, 4, 1)
    cond = {"image": images(4, 8, 8, 2), "vector": images(4, 3)}

    params = drawn(flow.init, x, cond)

    @jax.jit
    def run(params, cond):
        log_prob, pullback = jax.vjp(lambda c: flow.log_prob(params, x, c), cond)
        return log_prob, pullback(jnp.ones_like(log_prob))[0]

    given, grads = run(params, cond)
    zeroed, _ = run(params, jax.tree.map(jnp.zeros_like, cond))
    assert np.all(given != zeroed)
    assert all(np.all(np.any(g.reshape(4, -1) != 0, axis=1)) for g in jax.tree.leaves(grads))


def test_an_aligned_image_conditions_glow_at_every_scale():
    """Density and samples follow it; at another resolution it is named, with the shape of x."""
    flow = flows.glow((8, 8, 1), scales=2, depth=1, hidden=4)
    x, cond = images(3, 8, 8, 1), Condition(aligned=images(3, 8, 8, 2), vector=images(3, 2))

    params = drawn(flow.init, x, cond)

    @jax.jit
    def run(params, x, cond):
        log_prob, pullback = jax.vjp(lambda c: flow.log_prob(params, x, c), cond)
        return log_prob, pullback(jnp.ones_like(log_prob))[0]

    given, grads = run(params, x, cond)
    made, log_p = flow.sample_and_log_prob(params, jax.random.key(1), 3, cond)
    again, _ = run(params, made, cond)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    kernels = [name for name in names if name.endswith("['aligned']['kernel']")]
    assert len(kernels) == 3  # a step of each scale, and the prior of the split
    moved, _ = run(params, x, cond._replace(aligned=cond.aligned + 1))
    assert np.all(np.abs(moved - given) > 1e-2)
    assert np.all(np.any(grads.aligned != 0, axis=(1, 2))) and np.all(grads.vector != 0)
    np.testing.assert_allclose(again, log_p, rtol=1e-4, atol=1e-3)
    small = cond._replace(aligned=images(3, 4, 4, 2))
    said = r"flow: .*aligned of shape \[b, 8, 8, k\], .* is \[3, 8, 8, 1\], got \[3, 4, 4, 2\]"
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(flow.log_prob, params, x, small)


def test_an_aligned_image_reaches_the_dequantization_of_flow_plus_plus():
    flow = flows.flow_plus_plus((4, 4, 1), levels=4, depth=(1, 0, 0), width=4, num_blocks=1)
    x, cond = jnp.ones((2, 4, 4, 1)), Condition(aligned=images(2, 4, 4, 2))
    shapes = jax.eval_shape(flow.init, jax.random.key(0), x, cond)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    assert sum(name.endswith("['aligned']['kernel']") for name in names) == 2
    small = Condition(aligned=images(2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"elbo_flow: .* got \[2, 2, 2, 2\]: resize it to x first"):
        jax.eval_shape(flow.init, jax.random.key(0), x, small)


def test_a_zeroed_condition_is_the_unconditional_model():
    flow = flows.glow((4, 4, 1), scales=1, depth=2, hidden=4)
    x = images(4, 4, 4, 1)

    params = drawn(flow.init, x, jnp.ones((4, 3)))
    unconditional = jax.tree.map(lambda p: p, params)
    del unconditional["bijector"]["0"]["1"]["stacked"]["1"]["2"]["net"]["cond"]
    zeroed, given = (flow.log_prob(params, x, c) for c in (jnp.zeros((4, 3)), x[:, :3, 0, 0]))
    plain = flow.log_prob(unconditional, x)
    np.testing.assert_allclose(zeroed, plain, rtol=1e-6)
    assert np.all(given != plain)


def test_compile_size_is_flat_in_depth():
    def equations(depth):
        flow = flows.glow((4, 4, 1), scales=2, depth=depth, hidden=4)
        x = jnp.ones((2, 4, 4, 1))
        params = jax.eval_shape(flow.init, jax.random.key(0), x)
        return str(jax.make_jaxpr(flow.log_prob)(params, x)).count("\n")

    assert equations(2) == equations(9)


def test_dequantization_noise_lies_inside_and_has_its_density():
    noise = flows.dequantization_noise((4, 4, 1), net=nets.GlowNet(4))
    cond = images(6, 4, 4, 1)

    params = drawn(noise.init, cond / 100, cond)
    u, log_q = noise.sample_and_log_prob(params, jax.random.key(2), 6, cond)
    again, other = noise.log_prob(params, u, cond), noise.log_prob(params, u, cond[::-1])
    assert np.all((u > 0) & (u < 1))
    np.testing.assert_allclose(log_q, again, atol=1e-3)
    assert np.all(again != other)


def test_the_noise_runs_its_networks_once():
    """Draw and density come from one pass through the one scanned stack; so does a level of
    Glow."""
    x = jnp.ones((2, 4, 4, 1))

    def scans(flow, name):
        params = jax.eval_shape(flow.init, jax.random.key(0), x)
        return str(
            jax.make_jaxpr(lambda p: getattr(flow, name)(p, x, key=jax.random.key(1)))(params)
        ).count("scan[")

    noise = flows.dequantization_noise((4, 4, 1), net=nets.GlowNet(4))
    dequantized = flows.elbo_flow(
        bj.variational_dequantization(noise), distributions.uniform((4, 4, 1))
    )
    assert scans(dequantized, "elbo") == 1
    assert scans(flows.glow((4, 4, 1), scales=2, depth=3, hidden=4), "log_prob") == 2


def test_flow_plus_plus_with_mixtures_of_logistics_returns_to_its_levels():
    """The default transformer, whose inverse is numerical, between the noise and the levels."""
    sizes = {
        "depth": (1, 1, 0),
        "width": 4,
        "num_blocks": 1,
        "num_heads": 2,
        "dequantizer_depth": 1,
    }
    flow = flows.flow_plus_plus(
        (2, 2, 1), levels=5, **sizes, univariate=bj.univariate.logistic_mixture(2)
    )
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, size=(8, 2, 2, 1)), jnp.float32)

    params = drawn(flow.init, x)

    @jax.jit
    def run(params, x):
        z, contribution = flow.inverse(params, x, key=jax.random.key(1))
        return contribution, *flow.forward(params, z)

    contribution, again, back = run(params, x)
    np.testing.assert_array_equal(again, x)
    np.testing.assert_allclose(
        back, -contribution, atol=5e-3
    )  # the noise is recovered by two numerical inverses


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: flows.glow((6, 8, 1), scales=2), r"divisible by 4 and W by 4, got \[6, 8, 1\]"),
        (lambda: flows.glow((8, 8)), r"event_shape \[H, W, C\]"),
        (lambda: flows.glow((8, 8, 1), scales=0), "scales to be a whole number of at least 1"),
        (lambda: flows.glow((8, 8, 1), depth=0), "depth to be a whole number of at least 1"),
        (lambda: flows.flow_plus_plus((7, 8, 1)), r"divisible by 2 and W by 2, got \[7, 8, 1\]"),
        (
            lambda: flows.flow_plus_plus((8, 8, 1), depth=(1, 2)),
            r"three depths >= 0 .* got depth=\(1, 2\)",
        ),
        (lambda: flows.dequantization_noise((8, 7, 1)), r"W by 2, got \[8, 7, 1\]"),
        (
            lambda: flows.dequantization_noise((8, 8, 1), depth=0),
            "depth to be a whole number of at least 1, got 0",
        ),
        (lambda: distributions.scaled(distributions.normal((2,)), 0), "scale > 0, got 0"),
    ],
)
def test_bad_options_fail_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()
