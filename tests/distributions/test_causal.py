"""Causal laws of sequences: an exact likelihood, samples with a cache, padding, what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiling import compiled_again
from keys import KEYS, keys_consumed_twice

import jflow
from jflow import distributions, flows, losses, nets
from jflow.types import Condition, Distribution

B, N, D = 3, 4, 2
X = np.asarray(np.random.default_rng(0).normal(size=(B, N, D)), np.float32)
VALID = np.arange(N)[None] < np.array([4, 2, 0])[:, None]  # the last row has no token
ALIGNED = np.asarray(np.random.default_rng(1).normal(size=(B, N, 1)), np.float32)


class Preceding(nn.Module):
    """h_i = x_{i-1}, zeros before the first, without a cache."""

    @nn.compact
    def __call__(self, x, cond=None):
        return jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))


class Uncached(nn.Module):
    """A network without its cache, which is then sampled by parallel passes."""

    net: nn.Module

    @nn.compact
    def __call__(self, x, cond=None):
        return self.net(x, cond)


def drawn(init, *args, scale=0.4):
    """Params away from where they start, where heads are zero; init is not compiled."""
    draw, shapes = np.random.default_rng(3), jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda p: np.asarray(scale * draw.normal(size=p.shape), p.dtype), shapes)


A, S = 0.8, 0.6


def ar1():
    """x_i = A x_{i-1} + S noise from x_{-1} = 0, its params, and the covariance of n numbers."""
    law = distributions.causal(
        Preceding(), distributions.conditional_mixture((1,), min_std=1e-9), (N, 1)
    )
    log_std = np.full((1, 1), np.log(S - 1e-9))
    token = {"means": np.zeros((1, 1)), "log_stds": log_std, "kernel": np.array([[A, 0.0]])}
    lower = np.tril(A ** np.abs(np.subtract.outer(np.arange(N), np.arange(N)))) * S
    return law, {"net": {}, "token": token}, lower @ lower.T


def test_an_autoregression_of_order_one_has_scipys_likelihood_and_covariance(x64):
    """In float64; the beginnings of rows of unequal lengths have the marginal law; 20,000 samples
    have the covariance within 4 standard errors."""
    law, params, covariance = ar1()
    x = np.random.default_rng(0).normal(size=(B, N, 1))
    of_tokens = distributions.token_log_probs(Preceding(), distributions.conditional_mixture((1,)))
    whole = law.log_prob(params, x)
    normal = scipy.stats.multivariate_normal
    np.testing.assert_allclose(whole, normal(np.zeros(N), covariance).logpdf(x[..., 0]), rtol=1e-9)
    assert whole.dtype == np.float64
    found = law.log_prob(params, np.where(VALID[..., None], x, np.nan), Condition(valid=VALID))
    expected = [
        normal(np.zeros(n), covariance[:n, :n]).logpdf(row[:n, 0]) if n else 0.0
        for n, row in zip((4, 2, 0), x, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    each = of_tokens(params, x, Condition(valid=VALID))
    assert each.shape == (B, N) and np.all((each != 0) == VALID)

    draws = np.asarray(law.sample(params, jax.random.key(0), 20_000))[..., 0]
    products = draws[:, :, None] * draws[:, None]
    error = products.std(0) / np.sqrt(len(draws))
    assert np.all(np.abs(products.mean(0) - covariance) < 4 * error)


NETS = {
    "transformer": nets.CausalTransformer(features=3, width=4, num_layers=1, num_heads=2),
    "LSTM with previous": nets.WithPrevious(nets.CausalLSTM(width=3)),
}


@pytest.mark.parametrize("name", NETS)
def test_padding_changes_nothing_and_samples_with_a_cache_are_those_without(name):
    """Log-densities and gradients under what stands in padding, NaN too; samples of unequal lengths
    under one key, in float32."""
    net, token = NETS[name], distributions.conditional_mixture((D,), 2)
    law = distributions.causal(net, token, (N, D))
    plain = distributions.causal(Uncached(net), token, (N, D))
    cond = Condition(aligned=ALIGNED, valid=VALID)
    params = drawn(law.init, X, cond)
    spoilt = np.where(VALID[..., None], X, np.nan)

    @jax.jit
    def run(x, valid):
        def objective(params):
            log_prob = law.log_prob(params, x, cond._replace(valid=valid))
            return jnp.sum(log_prob), log_prob

        return jax.grad(objective, has_aux=True)(params)

    grads, log_prob = jax.device_get(run(X, VALID))
    jax.tree.map(np.testing.assert_array_equal, run(spoilt, VALID), (grads, log_prob))
    assert log_prob[2] == 0 and np.all(log_prob[:2] != 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), path

    wrapped = {"net": {"net": params["net"]}, "token": params["token"]}
    cached, passes = (
        np.asarray(model.sample(p, jax.random.key(5), B, cond))
        for model, p in ((law, params), (plain, wrapped))
    )
    np.testing.assert_allclose(cached, passes, atol=1e-5)
    np.testing.assert_array_equal(cached != 0, np.broadcast_to(VALID[..., None], cached.shape))
    shorter = Condition(aligned=ALIGNED[:, :2], valid=VALID[:, :2])
    beginning = law.log_prob(params, X[:, :2], shorter)
    np.testing.assert_allclose(beginning[1], log_prob[1], rtol=1e-4)  # its two tokens


@pytest.mark.parametrize("name", NETS)
def test_a_continuation_keeps_its_beginning_and_is_that_without_a_cache(name):
    """Under one key, with padding; what comes before its last token matters too."""
    net, token = NETS[name], distributions.conditional_mixture((D,), 2)
    cond = Condition(aligned=ALIGNED, valid=np.arange(N)[None] < np.array([4, 3, 0])[:, None])
    params = drawn(distributions.causal(net, token).init, X, cond)
    wrapped = {"net": {"net": params["net"]}, "token": params["token"]}
    run = distributions.continuation(net, token, (N, D))
    cached = np.asarray(run(params, jax.random.key(5), X[:, :2], cond))
    plain = distributions.continuation(Uncached(net), token, (N, D))
    passes = plain(wrapped, jax.random.key(5), X[:, :2], cond)
    np.testing.assert_allclose(cached, passes, atol=1e-5)
    np.testing.assert_array_equal(cached[:2, :2], X[:2, :2])
    held = np.broadcast_to(cond.valid[..., None], cached.shape)
    np.testing.assert_array_equal(cached != 0, held)
    other = X.copy()
    other[:, 0] += 1
    changed = np.asarray(run(params, jax.random.key(5), other[:, :2], cond))
    assert np.all(np.abs(changed - cached)[:2, 2] > 1e-6)


def test_a_continuation_of_an_autoregression_has_its_law(x64):
    """x_{m + k} ~ N(A^(k + 1) x_{m - 1}, S^2 (1 + ... + A^(2 k))), by a Kolmogorov-Smirnov test
    (false alarm 1 in 1000 each)."""
    law, params, _ = ar1()
    token = distributions.conditional_mixture((1,), min_std=1e-9)
    run = distributions.continuation(Preceding(), token, (N, 1))
    x = np.full((5000, 2, 1), [[3.0], [2.0]])
    found = np.asarray(run(params, jax.random.key(0), x))[:, 2:, 0]
    for k, variance in enumerate((S**2, S**2 * (1 + A**2))):
        normal = scipy.stats.norm(2 * A ** (k + 1), np.sqrt(variance))
        assert scipy.stats.kstest(found[:, k], normal.cdf).pvalue > 1e-3


def test_a_density_integrates_to_one_and_tokens_follow_each_other():
    """Two tokens of one number, by the trapezoid rule; and the sum over tokens, one by one, each by
    the law of the token given what the network says of the beginning."""
    net, token = nets.CausalLSTM(width=3), distributions.conditional_mixture((1,), 2, min_std=0.05)
    law = distributions.causal(net, token, (2, 1))
    x = X[:, :2, :1]
    params = drawn(law.init, x, scale=0.3)
    u = np.linspace(-1, 1, 401) * np.arcsinh(60.0)
    grid, weight = np.sinh(u), np.cosh(u) * (u[1] - u[0])
    pairs = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2, 1)
    density = np.exp(law.log_prob(params, pairs.astype(np.float32)), dtype=np.float64)
    np.testing.assert_allclose(density @ np.outer(weight, weight).reshape(-1), 1, atol=1e-4)

    from jflow._core.linen import apply_linen

    h = apply_linen(net, params["net"], x)
    expected = sum(token.log_prob(params["token"], x[:, i], h[:, i]) for i in range(2))
    np.testing.assert_allclose(law.log_prob(params, x), expected, rtol=1e-5)


TOKENS = {
    "spline": lambda: flows.neural_spline((D,), depth=2, hidden=(4,), bins=3),
    "cnf": lambda: flows.cnf(
        jflow.velocity(nets.TimeMLP((4,))), distributions.normal((D,)), method=2
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_flow_is_a_token_with_gradients_and_samples_that_trace_once(name):
    """MoGlow's step, and a flow head."""
    law = distributions.causal(nets.CausalLSTM(width=3), TOKENS[name](), (N, D))
    params = jax.jit(law.init)(jax.random.key(0), X)
    key = jax.random.key(1)
    again = compiled_again(
        log_prob=lambda: law.log_prob(params, X),
        sample=lambda: law.sample(params, key, 3),
    )
    assert not again
    shapes = jax.eval_shape(jax.grad(lambda p: jnp.sum(law.log_prob(p, X))), params)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    sample = np.asarray(law.sample(params, key, 3))
    assert sample.shape == (3, N, D) and np.all(np.isfinite(sample)) and sample.std() > 0.1
    assert np.all(np.isfinite(law.log_prob(params, sample)))


def symbols(temperature=1.0):
    net = nets.CausalLSTM(width=4, vocabulary=3)
    return distributions.causal(net, distributions.categorical(3, temperature=temperature), (2,))


def test_symbols_have_probabilities_and_frequencies():
    """All sequences of two symbols: probabilities that add up to one, the frequencies of 20,000
    samples (chi-squared, false alarm 1 in 1000), and a loss of integers."""
    law, every = symbols(), np.stack(np.meshgrid(*[np.arange(3)] * 2, indexing="ij"), -1)
    every = every.reshape(-1, 2)
    params = drawn(law.init, every)
    p = np.exp(law.log_prob(params, every), dtype=np.float64)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
    assert p.max() / p.min() > 1.5
    draws = np.asarray(law.sample(params, jax.random.key(1), 20_000))
    assert draws.dtype == np.int32 and draws.shape == (20_000, 2)
    counts = np.bincount(draws @ [3, 1], minlength=9)
    assert scipy.stats.chisquare(counts, 20_000 * p / p.sum()).pvalue > 1e-3
    cold = np.asarray(symbols(1e-3).sample(params, jax.random.key(1), 5))
    assert np.all(cold == cold[:1])  # the likeliest at each step
    first = np.array([p.reshape(3, 3)[i].sum() for i in range(3)])
    assert cold[0, 0] == first.argmax()

    value, _ = losses.nll(law)(params, None, {"x": every})
    np.testing.assert_allclose(value, -np.log(p).mean(), rtol=1e-5)
    outside = law.log_prob(params, np.array([[0, 3], [-1, 0], [2, 2]]))
    np.testing.assert_array_equal(np.isneginf(outside), [True, True, False])


def test_the_laws_of_a_token_are_scipys(x64):
    draw = np.random.default_rng(0)
    cond, x = draw.normal(size=(5, 3)), draw.normal(size=(5, 2))
    law = distributions.conditional_mixture((2,), 2, min_std=0.1)
    params = drawn(law.init, x, cond)
    logits, means, log_stds = np.split(cond @ params["kernel"], (2, 6), axis=1)
    weights = scipy.special.softmax(logits + params["logits"], axis=1)
    means = means.reshape(5, 2, 2) + params["means"]
    stds = np.exp(log_stds.reshape(5, 2, 2) + params["log_stds"]) + 0.1
    parts = scipy.stats.norm.pdf(x[:, None], means, stds).prod(-1)
    found = law.log_prob(params, x, cond)
    np.testing.assert_allclose(found, np.log((weights * parts).sum(1)), rtol=1e-10)
    samples = law.sample(params, jax.random.key(0), 40_000, cond[:1])
    mean = (weights[0, :, None] * means[0]).sum(0)
    square = (weights[0, :, None] * (means[0] ** 2 + stds[0] ** 2)).sum(0)
    error = np.sqrt((square - mean**2) / 40_000)
    assert np.all(np.abs(samples.mean(0) - mean) < 4 * error)
    spread = (np.asarray(samples) ** 2).std(0) / 200
    assert np.all(np.abs((samples**2).mean(0) - square) < 4 * spread)
    collapsed = law.log_prob({**params, "log_stds": np.full((2, 2), -50.0)}, means[:, 0], cond)
    assert np.all(collapsed <= -2 * np.log(0.1 * np.sqrt(2 * np.pi)) + 1e-9)  # the floor

    letter = distributions.categorical(4, temperature=2.0)
    params = drawn(letter.init, np.arange(5) % 4, cond)
    expected = scipy.special.log_softmax((cond @ params["kernel"] + params["logits"]) / 2, axis=1)
    found = letter.log_prob(params, np.array([0, 1, 2, 3, 0]), cond)
    np.testing.assert_allclose(found, expected[np.arange(5), [0, 1, 2, 3, 0]], rtol=1e-12)
    floats = letter.log_prob(params, np.array([0.0, 1.0, 2.5, np.nan, 4.0]), cond)
    np.testing.assert_allclose(floats[:2], found[:2], rtol=1e-12)
    np.testing.assert_array_equal(floats[2:], [-np.inf, np.nan, -np.inf])

    around = distributions.around_previous(2, 0.7)
    expected = scipy.stats.norm.logpdf(x, cond[:, :2], 0.7).sum(1)
    np.testing.assert_allclose(around.log_prob({}, x, cond), expected, rtol=1e-12)
    z = (around.sample({}, jax.random.key(0), 5000, cond[:1]) - cond[:1, :2]) / 0.7
    assert scipy.stats.kstest(np.ravel(z), "norm").pvalue > 1e-3


class Rolled(nn.Module):
    """It sees the token itself, from a slot on."""

    since: int = 0

    @nn.compact
    def __call__(self, x, cond=None):
        h = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return jnp.where(jnp.arange(x.shape[1])[None, :, None] >= self.since, x, h)


@pytest.mark.parametrize("since", [0, 2])
def test_a_network_that_is_not_causal_is_refused_by_its_tokens(since):
    law = distributions.causal(Rolled(since), distributions.conditional_mixture((D,)))
    said = f"h_{since} of Rolled changes with x_{since}"
    for init in (law.init, jax.jit(law.init)):
        with pytest.raises(ValueError, match=said):
            init(jax.random.key(0), X)


def test_what_is_refused():
    token = distributions.conditional_mixture((D,))
    law = distributions.causal(nets.CausalLSTM(width=3), token)
    params = law.init(jax.random.key(0), X)
    for call, said in (
        (lambda: law.sample(params, KEYS[0], 2), "expected the shape of a sequence"),
        (lambda: law.log_prob(params, X[0, 0]), r"x of shape \[b, n, \*token\], got \[2\]"),
        (lambda: law.log_prob(params, X, Condition(valid=VALID[:, :2])), "truth values .3, 4."),
        (lambda: law.log_prob({"net": {}}, X), "expected params with .'net', 'token'."),
        (
            lambda: distributions.causal(Preceding(), token, (N, 3)).log_prob(params, X),
            r"x of shape \[b, n, 3\]",
        ),
        (
            lambda: distributions.causal(nets.CausalLSTM(width=3), token, (N, 3)).sample(
                params, KEYS[0], 2
            ),
            "fit its params|tokens of shape",
        ),
        (lambda: distributions.causal(Preceding(), token, ()), "event_shape"),
        (lambda: distributions.continuation(Preceding(), token, ()), "event_shape"),
        (
            lambda: distributions.continuation(nets.CausalLSTM(width=3), token, (N, D))(
                params, KEYS[0], X
            ),
            r"\[b, m, 2\] with 1 <= m < 4, got \[3, 4, 2\]",
        ),
        (lambda: distributions.categorical(0), "num_classes to be a whole number"),
        (lambda: distributions.categorical(3, temperature=0.0), "temperature > 0"),
        (lambda: distributions.conditional_mixture((2,), 0), "components to be a whole number"),
        (lambda: distributions.conditional_mixture((2,), min_std=0.0), "min_std > 0"),
        (lambda: distributions.around_previous(2, 0.0), "std > 0"),
        (
            lambda: distributions.around_previous(2, 1.0).log_prob({}, X[0], X[0][:, :1]),
            r"begins with the 2 numbers of the preceding token .*got \[4, 1\]",
        ),
        (lambda: token.log_prob(params["token"], X[0]), "expected a call with cond"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="net to be an instance of flax.linen.Module"):
        distributions.causal(len, token)
    with pytest.raises(TypeError, match="expected a Distribution or a Flow"):
        distributions.causal(Preceding(), nets.CausalLSTM())


def test_keys_are_consumed_once():
    law = distributions.causal(
        nets.CausalLSTM(width=3), distributions.conditional_mixture((D,), 2), (N, D)
    )
    assert isinstance(law, Distribution)
    params = jax.eval_shape(law.init, KEYS[0], X)
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), params)
    run = distributions.continuation(
        nets.CausalLSTM(width=3), distributions.conditional_mixture((D,), 2), (N, D)
    )

    def calls(a, b, c, d):
        return (
            law.init(a, X),
            law.log_prob(params, X, key=b),
            law.sample(params, c, 3),
            run(params, d, X[:, :2]),
        )

    assert not keys_consumed_twice(calls, *KEYS[:4])
