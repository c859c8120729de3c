"""JetFormer: Jet under a causal prior that reads a text, and the text in the same sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from jflow import distributions, flows, losses, nets

EVENT, SYMBOLS, LENGTH = (4, 4, 2), 5, 3
SIZES = {"patch_size": 2, "width": 8, "depth": 2, "num_layers": 1, "num_heads": 2}
X = np.asarray(np.random.default_rng(0).normal(size=(3, *EVENT)), np.float32)
TEXT = np.array([[0, 1, 2], [3, 4, 0], [4, 4, 1]], np.int32)


def prior(features=6, **options):
    net = nets.CausalTransformer(features=features, width=8, num_layers=1, num_heads=2)
    return nets.WithText(net, SYMBOLS, length=LENGTH, width=8, **options)


def params_of(init, *args, scale=0.3):
    """Params of the form of init(key, *args), drawn at random: nothing is compiled."""
    draw, shapes = np.random.default_rng(3), jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda p: np.asarray(scale * draw.normal(size=p.shape), p.dtype), shapes)


def test_with_zero_heads_and_one_component_it_is_jet_over_a_normal_base():
    """With the same moved params of Jet; the factored-out numbers are in it. Of another text too,
    since nothing has been read of it yet."""
    jet = flows.jet(EVENT, **SIZES)
    flow = flows.jetformer(EVENT, prior(), kept=5, components=1, **SIZES)
    params = params_of(flow.init, X, TEXT)
    params["base"]["base"]["net"]["net"]["head"]["kernel"][:] = 0
    params["base"]["base"]["net"]["net"]["head"]["bias"][:] = 0
    floor = 1e-3  # of the standard deviation, which is added
    token = params["base"]["base"]["token"]["first"]
    token |= {"means": np.zeros((1, 5), np.float32)}
    token |= {"log_stds": np.full((1, 5), np.log(1 - floor), np.float32)}

    @jax.jit
    def both(params, x):
        of_jet = jet.log_prob({"bijector": params["bijector"], "base": {}}, x)
        return of_jet, flow.log_prob(params, x, TEXT), flow.log_prob(params, x, TEXT[::-1])

    expected, found, other = both(params, X)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_array_equal(other, found)


def test_the_density_of_two_numbers_integrates_to_one_and_captions_change_it():
    """By the trapezoid rule, under two texts, of which one has a symbol that is none: NaN."""
    flow = flows.jetformer(
        (1, 1, 2),
        prior(),
        kept=1,
        components=2,
        standardize=False,
        **SIZES | {"patch_size": 1},
    )
    x = np.asarray(np.random.default_rng(0).normal(size=(3, 1, 1, 2)), np.float32)
    params = params_of(flow.init, x, TEXT)
    axis = np.linspace(-12, 12, 241, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 1, 1, 2)
    density = jax.jit(
        lambda params, text: flow.log_prob(params, grid, jnp.tile(text[None], (len(grid), 1)))
    )
    first, second = (np.asarray(density(params, text), np.float64) for text in TEXT[:2])
    for log_prob in (first, second):
        np.testing.assert_allclose(np.exp(log_prob).sum() * 0.1**2, 1, atol=1e-3)
    assert np.abs(np.exp(first) - np.exp(second)).sum() * 0.1**2 > 0.05  # twice total variation
    assert np.all(np.isnan(density(params, np.array([0, SYMBOLS, 1], np.int32))))


def test_samples_are_the_map_of_the_priors_which_the_cache_does_not_change():
    flow = flows.jetformer(EVENT, prior(), kept=5, components=2, **SIZES)
    params = params_of(flow.init, X, TEXT)
    token = distributions.split(
        distributions.conditional_mixture((5,), 2), distributions.normal((3,)), 5
    )

    class Uncached(nets.WithText):
        def empty_cache(self, x, rows):
            return None

    laws = [
        distributions.causal(kind(prior().net, SYMBOLS, LENGTH, 8), token, (4, 8))
        for kind in (nets.WithText, Uncached)
    ]

    @jax.jit
    def run(params, key):
        cached, plain = (
            law.sample(params["base"]["base"], jax.random.clone(key), 3, TEXT) for law in laws
        )
        rows = cached.reshape(3, 2, 2, 2, 2, 2).swapaxes(2, 3).reshape(3, *EVENT)  # patches
        x, _ = flow.forward(params, rows, TEXT)
        return cached, plain, x, flow.sample(params, jax.random.clone(key), 3, TEXT)

    cached, plain, x, drawn = run(params, jax.random.key(5))
    np.testing.assert_allclose(cached, plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(drawn, x, rtol=1e-5, atol=1e-5)
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1


def test_the_text_is_the_beginning_of_the_same_sequence():
    """What is said of it does not depend on the image, sums to one over all texts, is -inf outside
    the vocabulary, and its gradient reaches the network that the image has."""
    net = prior()
    head = distributions.categorical(SYMBOLS)
    text = distributions.causal(nets.OfText(net), head, (LENGTH,))
    tokens = X.reshape(3, -1, 2)[:, :4]
    image = distributions.causal(net, distributions.conditional_mixture((2,)), (4, 2))
    params = {"net": params_of(image.init, tokens, TEXT)["net"]}
    params["token"] = params_of(head.init, TEXT[:, 0], np.zeros((3, 6), np.float32))
    every = np.stack(np.meshgrid(*[np.arange(SYMBOLS)] * LENGTH), -1).reshape(-1, LENGTH)
    every = every.astype(np.int32)

    @jax.jit
    def run(params):
        h = text_slots(net, params["net"], TEXT, tokens)
        value, grads = jax.value_and_grad(lambda p: jnp.sum(text.log_prob(p, TEXT)))(params)
        return h, logsumexp(text.log_prob(params, every)), value, grads

    h, total, value, grads = run(params)
    alone = nets.OfText(net).apply({"params": params["net"]}, TEXT)
    np.testing.assert_allclose(h, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, 0, atol=1e-5)
    assert np.isfinite(value) and np.any(grads["net"]["symbols"]["embedding"] != 0)
    assert np.all(grads["net"]["tokens"]["kernel"] == 0)  # of the image alone
    outside = text.log_prob(params, np.array([[0, 1, SYMBOLS], [0, 1, 2]], np.int32))
    assert outside[0] == -np.inf and np.isfinite(outside[1])
    drawn = text.sample(params, jax.random.key(2), 4)
    assert drawn.shape == (4, LENGTH) and np.all((drawn >= 0) & (drawn < SYMBOLS))


def text_slots(net, params, text, tokens):
    """h of the slots of the text, in the sequence with the tokens."""

    def whole(module, text, tokens):
        rows = jnp.concatenate([module.symbols(text), module.tokens(tokens)], axis=1)
        return module.net(rows)[:, : text.shape[1]]

    return net.apply({"params": params}, text, tokens, method=whole)


def test_guidance_takes_the_same_params_and_moves_samples_away_from_no_caption():
    """The mean log p(x | text) - log p(x | no text) of 200 samples rises."""
    null = np.zeros(LENGTH, np.int32)
    plain = flows.jetformer(EVENT, prior(), kept=5, components=2, **SIZES)
    guided = flows.jetformer(
        EVENT,
        nets.Contrasted(prior(), null),
        kept=5,
        components=2,
        guide=lambda law: distributions.contrasted(law, 3.0),
        **SIZES,
    )
    params = params_of(plain.init, X, TEXT)
    params["base"] = jax.tree.map(lambda p: 3 * p, params["base"])  # the text says more
    text = np.tile(TEXT[1:2], (200, 1))

    @jax.jit
    def gain(params):
        each = []
        for flow in (plain, guided):
            x = flow.sample(params, jax.random.key(4), 200, text)
            each.append(plain.log_prob(params, x, text) - plain.log_prob(params, x, 0 * text))
        return each

    without, towards = gain(params)
    error = np.sqrt(np.var(without) / 200 + np.var(towards) / 200)
    assert np.mean(towards) - np.mean(without) > 4 * error


def test_the_noise_follows_the_schedule():
    noise = losses.noised(lambda step: jnp.where(step < 5, 0.5, 0.0))
    batch = {"x": np.zeros((20_000, 1), np.float32)}
    at = lambda step: noise(jax.random.key(0), batch, {"step": jnp.int32(step)})["x"]  # noqa: E731
    np.testing.assert_allclose(np.std(at(4)), 0.5, rtol=0.02)  # 4 standard errors
    np.testing.assert_array_equal(at(5), 0)
    with pytest.raises(ValueError, match="'step'"):
        noise(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="std >= 0, got -1"):
        losses.noised(lambda step: -1.0 + 0 * step)


BAD = {
    r"kept in 1 \.\. 7, got 8": lambda: flows.jetformer(EVENT, prior(), kept=8, **SIZES),
    "net to be an instance of flax.linen.Module": lambda: nets.WithText(len, 5, 3),
    "expected vocabulary": lambda: nets.WithText(prior().net, 0, 3),
    "whole to be a WithText": lambda: nets.OfText(prior().net),
    r"text, integers \[b, 3\], got int32 \[3, 2\]": lambda: prior().init(
        jax.random.key(0), X[..., 0], TEXT[:, :2]
    ),
    r"text, integers \[b, 3\], got float32": lambda: prior().init(
        jax.random.key(0), X[..., 0], np.float32(TEXT)
    ),
    r"text, integers \[b, 3\], got NoneType": lambda: prior().init(jax.random.key(0), X[..., 0]),
    "expected no cond": lambda: nets.OfText(prior()).init(jax.random.key(0), TEXT, TEXT),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()
