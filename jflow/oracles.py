"""Closed forms to test against: what a perfect network would compute.

Data x1 is Gaussian or a mixture of Gaussians, the source x0 is standard normal and independent of
it, and x_t = alpha(t) x1 + sigma(t) x0 (the linear path unless a schedule is given). Then x_t is
Gaussian or a mixture too, and velocity, score and density at any time are known; for a Gaussian the
flow map and the average velocity as well.

x is [b, d]; t and r are [b], or scalars given to every row. Everything is computed in the precision
of x, float32 at least; the constants are prepared in float64. The functions are compiled, outside
jit too. `as_velocity(oracle)` is the noun that samplers, losses and likelihoods take.

References:
    Lipman, Chen, Ben-Hamu, Nickel, Le, *Flow Matching for Generative Modeling*, 2023,
        arXiv:2210.02747.
    Albergo, Boffi, Vanden-Eijnden,
        *Stochastic Interpolants: A Unifying Framework for Flows and Diffusions*, 2023,
        arXiv:2303.08797.
    Boffi, Albergo, Vanden-Eijnden, *Flow Map Matching*, 2024, arXiv:2406.07507.
    Geng, Deng, Bai, Kolter, He, *Mean Flows for One-step Generative Modeling*, 2025,
        arXiv:2505.13447.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_parts, count_rows, rows
from jflow._core.names import explain_unknown
from jflow._core.tokens import check_probabilities, kappa
from jflow.paths import LINEAR, Schedule, coefficients
from jflow.types import Array, Field, FlowMap, Key, Velocity

__all__ = [
    "Gaussian",
    "JointGaussian",
    "Mixture",
    "Tokens",
    "as_average_velocity",
    "as_flow_map",
    "as_velocity",
    "eight_gaussians",
    "gaussian",
    "joint_gaussian",
    "mixture",
    "mixture_flow_map",
    "tokens",
]

explain_unknown(__name__)


class Gaussian(NamedTuple):
    """The closed forms of Gaussian data, as `gaussian` returns them.

    A label is accepted and ignored, so that both oracles are called alike.

    Attributes:
        velocity: `velocity(x, t, label=None) -> [b, d]`, E[dx_t/dt | x_t = x].
        score: `score(x, t, label=None) -> [b, d]`, grad log p_t(x).
        log_density: `log_density(x, t, label=None) -> [b]`, log p_t(x) in nats.
        flow_map: `flow_map(x, t, r) -> [b, d]`, x carried along the velocity from time t to time r.
        average_velocity: `average_velocity(x, t, r) -> [b, d]`, (flow_map - x) / (r - t), which is
            the velocity at r = t.
        marginal: `marginal(t) -> (mean [b, d], cov [b, d, d])` of x_t for t [b], and of every SDE
            of `euler_maruyama`.
        euler_maruyama: `euler_maruyama(times, noise) -> (mean [n + 1, d], cov [n + 1, d, d])` for
            times [n + 1]: the exact moments of the *discrete* SDE.
        sample: `sample(key, n) -> [n, d]`, rows of x1.
        entropy: that of the data, in nats, a float.
    """

    velocity: Callable[..., Array]
    score: Callable[..., Array]
    log_density: Callable[..., Array]
    flow_map: Callable[..., Array]
    average_velocity: Callable[..., Array]
    marginal: Callable[..., tuple[Array, Array]]
    euler_maruyama: Callable[..., tuple[Array, Array]]
    sample: Callable[..., Array]
    entropy: float


class Mixture(NamedTuple):
    """The closed forms of mixtures of Gaussians, as `mixture` returns them.

    A label [b] picks one component a row; K, the null label, means the whole mixture.

    Attributes:
        velocity: `velocity(x, t, label=None) -> [b, d]`, E[dx_t/dt | x_t = x].
        score: `score(x, t, label=None) -> [b, d]`, grad log p_t(x).
        log_density: `log_density(x, t, label=None) -> [b]`, log p_t(x) in nats.
        responsibilities: `responsibilities(x, t, label=None) -> [b, K]`, p(component | x_t = x).
        sample: `sample(key, n, label=None) -> [n, d]`, rows of x1; label [n].
        sample_labels: `sample_labels(key, n) -> [n]`, components drawn by their weights.
    """

    velocity: Callable[..., Array]
    score: Callable[..., Array]
    log_density: Callable[..., Array]
    responsibilities: Callable[..., Array]
    sample: Callable[..., Array]
    sample_labels: Callable[..., Array]


def gaussian(mean: ArrayLike, cov: ArrayLike, schedule: Schedule = LINEAR) -> Gaussian:
    """The closed forms of a path from N(0, I) to Gaussian data N(mean, cov).

    In the eigenbasis of cov, with eigenvalues l, m = mean, a and s the values of the schedule and
    l_t = a^2 l + s^2:

        x_t ~ N(a m, l_t)
        score      -(x - a m) / l_t
        velocity   a' m + (a a' l + s s') / l_t (x - a m)
        flow map   a_r m + sqrt(l_r / l_t) (x - a_t m)

    `euler_maruyama(times, noise)` follows

        dx = (velocity + noise(t)^2 / 2 score) dt + noise(t) dW,

    which has the marginals of x_t whatever noise is, through the steps of the grid: the mean and
    the covariance of its states, started from the exact marginal at times[0]. noise takes and
    returns a scalar.

    Args:
        mean: of the data, [d].
        cov: the covariance of the data: [d, d], the variances [d], or one variance.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        Gaussian: a tuple of functions of x [b, d] and t.

    Raises:
        ValueError: the shapes do not fit, or cov is not symmetric and positive definite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles
        >>> oracle = oracles.gaussian([0.0], 9.0)
        >>> oracle.flow_map(jnp.ones((1, 1)), 0.0, 1.0)
        Array([[3.]], dtype=float32)
        >>> round(oracle.entropy, 3)  # log(2 pi e 9) / 2
        2.518
    """
    law = _law("gaussian", np.asarray(mean, np.float64)[None], _batch_of_one(cov), schedule)
    d = law.means.shape[1]

    @jax.jit
    def velocity(x, t, label=None):
        return law.velocities(*_inputs(x, t))[:, 0]

    @jax.jit
    def score(x, t, label=None):
        return law.scores(*_inputs(x, t))[:, 0]

    @jax.jit
    def log_density(x, t, label=None):
        return law.log_densities(*_inputs(x, t))[:, 0]

    @jax.jit
    def flow_map(x, t, r):
        x, t = _inputs(x, t)
        means, variances, _, _ = law.at(_inputs(x, r)[1])
        z, now = law.coordinates(x, t)
        return (means + law.back(jnp.sqrt(variances / now) * z))[:, 0]

    @jax.jit
    def average_velocity(x, t, r):
        # (sqrt(l_r) - sqrt(l_t)) / (r - t) as a difference of squares over a sum: no 0 / 0 at r = t
        x, t = _inputs(x, t)
        r = _inputs(x, r)[1]
        da, ds = (_mean_slope(f, t, r)[:, None, None] for f in schedule[:2])
        (a_t, s_t), (a_r, s_r) = ([f(time)[:, None, None] for f in schedule[:2]] for time in (t, r))
        squares = (a_r + a_t) * da * _constant(law.eigenvalues, x) + (s_r + s_t) * ds
        z, now = law.coordinates(x, t)
        root, root_r = jnp.sqrt(now), jnp.sqrt(law.at(r)[1])
        return (da * _constant(law.means, x) + law.back(squares / (root * (root_r + root)) * z))[
            :, 0
        ]

    @jax.jit
    def marginal(t):
        t = jnp.atleast_1d(jnp.asarray(t))
        means, variances, _, _ = law.at(t.astype(float_dtype(t)))
        return means[:, 0], law.covariances(variances[:, 0])

    def euler_maruyama(times, noise):
        times = jnp.asarray(times)
        times = times.astype(float_dtype(times))

        def step(carry, ends):
            mean, variance = carry
            t, t_next = ends
            center, exact, rate, drift = (v[0, 0] for v in law.at(t[None]))
            h, g = t_next - t, noise(t)
            slope = rate - g**2 / 2 / exact  # of the drift, in the eigenbasis
            mean = mean + h * (drift + law.along(slope, mean - center))
            variance = (1 + h * slope) ** 2 * variance + h * g**2
            return (mean, variance), (mean, variance)

        start = tuple(v[0, 0] for v in law.at(times[:1])[:2])
        _, path = jax.lax.scan(step, start, (times[:-1], times[1:]))
        means, variances = (
            jnp.concatenate([first[None], rest]) for first, rest in zip(start, path, strict=True)
        )
        return means, law.covariances(variances)

    @functools.partial(jax.jit, static_argnames="n")
    def sample(key, n):
        return law.draw(key, jnp.zeros(n, jnp.int32))

    entropy = float(0.5 * (d * np.log(2 * np.pi * np.e) + np.sum(np.log(law.eigenvalues))))
    return Gaussian(
        velocity,
        score,
        log_density,
        flow_map,
        average_velocity,
        marginal,
        euler_maruyama,
        sample,
        entropy,
    )


def mixture(
    weights: ArrayLike, means: ArrayLike, covs: ArrayLike, schedule: Schedule = LINEAR
) -> Mixture:
    """The closed forms of a path from N(0, I) to a mixture of Gaussians.

    The data are sum_k weights[k] N(means[k], covs[k]). With g_k the responsibilities p(k | x_t =
    x), velocity and score are sum_k g_k times those of `gaussian`.

    Args:
        weights: of the components, [K], positive; normalized here.
        means: of the components, [K, d].
        covs: the covariances of the components: [K, d, d], the variances [K, d], one variance a
            component [K], or one for all. A full covariance that all share is repeated K times.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        Mixture: a tuple of functions of x [b, d], t and a label.

    Raises:
        ValueError: the shapes do not fit, a weight is not positive, or a covariance is not
            symmetric and positive definite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles
        >>> oracle = oracles.mixture([0.5, 0.5], [[-4.0], [4.0]], 1.0)
        >>> oracle.responsibilities(jnp.zeros((1, 1)), 1.0)
        Array([[0.5, 0.5]], dtype=float32)
    """
    weights = np.asarray(weights, np.float64)
    means = np.asarray(means, np.float64)
    if weights.ndim != 1 or means.shape[:1] != weights.shape:
        raise ValueError(
            f"mixture: expected weights [K] and means [K, d], got {list(weights.shape)} and "
            f"{list(means.shape)}"
        )
    if not np.all(weights > 0):
        raise ValueError(f"mixture: expected positive weights, got {weights.tolist()}")
    count = len(weights)
    log_weights = np.log(weights / weights.sum())
    law = _law("mixture", means, np.asarray(covs, np.float64), schedule)

    def joint(x, t, label):
        """log p(k) p_t(x | k): [b, K]; a label leaves one component, of probability 1."""
        prior = jnp.asarray(log_weights, x.dtype)[None]
        if label is not None:
            if jnp.shape(label) != x.shape[:1]:
                raise ValueError(
                    f"mixture: expected label of shape [{x.shape[0]}], got {list(jnp.shape(label))}"
                )
            label = jnp.asarray(label)[:, None]
            only = jnp.where(
                jnp.arange(count, dtype=label.dtype)[None] == label, jnp.zeros_like(prior), -jnp.inf
            )
            prior = jnp.where(label == count, prior, only)
        return prior + law.log_densities(x, t)

    @jax.jit
    def responsibilities(x, t, label=None):
        x, t = _inputs(x, t)
        return jax.nn.softmax(joint(x, t, label), axis=1)

    @jax.jit
    def velocity(x, t, label=None):
        x, t = _inputs(x, t)
        return jnp.sum(responsibilities(x, t, label)[..., None] * law.velocities(x, t), axis=1)

    @jax.jit
    def score(x, t, label=None):
        x, t = _inputs(x, t)
        return jnp.sum(responsibilities(x, t, label)[..., None] * law.scores(x, t), axis=1)

    @jax.jit
    def log_density(x, t, label=None):
        x, t = _inputs(x, t)
        return jax.nn.logsumexp(joint(x, t, label), axis=1)

    @functools.partial(jax.jit, static_argnames="n")
    def sample_labels(key, n):
        return jax.random.categorical(key, jnp.asarray(log_weights, float), shape=(n,))

    @functools.partial(jax.jit, static_argnames="n")
    def sample(key, n, label=None):
        which, noise = jax.random.split(key)
        drawn = sample_labels(which, n)
        return law.draw(
            noise,
            drawn if label is None else jnp.where(label == count, drawn.astype(label.dtype), label),
        )

    return Mixture(velocity, score, log_density, responsibilities, sample, sample_labels)


def mixture_flow_map(
    oracle: Mixture,
    x: Float[Array | np.ndarray, "b d"],
    t: Array | np.ndarray | float,
    r: Array | np.ndarray | float,
    label: Int[Array | np.ndarray, " b"] | None = None,
    *,
    tolerance: float = 1e-10,
) -> Float[Array, "b d"]:
    """Points carried from one time to another along the velocity of a mixture, to a tolerance.

    The ODE is solved by Dopri8 in float64, each row by itself. It is differentiable in reverse
    mode.

    Args:
        oracle: what `mixture` returned.
        x: the points, [b, d], float64 (`with jax.enable_x64(True)`).
        t: the times that they are at, [b] or a scalar.
        r: the times to carry them to, [b] or a scalar; before t or after it.
        label: a component for each row, [b]; None is the whole mixture.
        tolerance: relative and absolute.

    Returns:
        The points [b, d] at r; a row whose solve failed is NaN.

    Raises:
        ValueError: x is not float64.
    """
    if jnp.result_type(x) != jnp.float64:
        raise ValueError(
            "mixture_flow_map: expected x in float64, under jax.enable_x64(True), got "
            f"{jnp.result_type(x)}"
        )

    def solve(x, t, r, label):
        def slope(s, y, _):  # s in [0, 1], so that r = t and r < t are solves like any other
            time = (t + s * (r - t))[None]
            return (r - t) * oracle.velocity(y[None], time, None if label is None else label[None])[
                0
            ]

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(slope),
            diffrax.Dopri8(),
            t0=0.0,
            t1=1.0,
            dt0=None,
            y0=x,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=4096,
            throw=False,
        )
        return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[0], jnp.nan)

    x, t = _inputs(x, t)
    return jax.vmap(solve)(x, t, rows(r, x.shape[0]).astype(x.dtype), label)


def eight_gaussians(
    radius: float = 5.0, variance: float = 0.1, schedule: Schedule = LINEAR
) -> Mixture:
    """Eight equal Gaussians on a circle: the usual toy in two dimensions.

    Its entropy at the defaults is 2.6147 nats. (Well separated, it is log 8 + log(2 pi e variance),
    less the overlap of neighbors.)

    Args:
        radius: of the circle of the means.
        variance: of each Gaussian.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        Mixture: the oracle, d = 2 and K = 8.

    Examples:
        >>> import jax
        >>> from jflow import oracles
        >>> oracles.eight_gaussians().sample(jax.random.key(0), 3).shape
        (3, 2)
    """
    angles = 2 * np.pi * np.arange(8) / 8
    return mixture(
        np.ones(8), radius * np.stack([np.cos(angles), np.sin(angles)], axis=1), variance, schedule
    )


class JointGaussian(NamedTuple):
    """The closed forms of Gaussian parts at times of their own, as `joint_gaussian` returns them.

    x and t are dicts with the names of the parts, x_i [b, d_i] and t_i [b]; a single t [b] is for
    all. A label is accepted and ignored.

    Attributes:
        velocity: `velocity(x, t, label=None) -> {part: [b, d_i]}`, E[x1_i - x0_i | x_t = x].
        residual: `residual(t) -> {part: [b]}`, the mean over the part of the variance of x1_i -
            x0_i given x_t, the least mean squared error of a velocity at these times.
        sample: `sample(key, n) -> {part: [n, d_i]}`, rows of x1.
    """

    velocity: Callable[..., dict[str, Array]]
    residual: Callable[..., dict[str, Array]]
    sample: Callable[..., dict[str, Array]]


def joint_gaussian(mean: Mapping[str, ArrayLike], cov: ArrayLike) -> JointGaussian:
    """The closed forms of correlated Gaussian parts, each on its linear path at its own time.

    With T = diag(t), each t_i repeated for the numbers of its part, x1 ~ N(m, C) and x0 ~ N(0, I),

        x_t = T x1 + (I - T) x0 ~ N(T m, S),     S = T C T + (I - T)^2
        velocity  m + G S^-1 (x - T m),          G = C T - (I - T)
        residual  the diagonal of C + I - G S^-1 G^T

    At t_i = 1 a part is given and at t_i = 0 it says nothing of the others.

    Args:
        mean: of each part, {part: [d_i]}.
        cov: the covariance of all numbers, [D, D], part after part in the order of `mean`.

    Returns:
        JointGaussian: a tuple of functions.

    Raises:
        ValueError: a mean is not [d_i], or cov is not [D, D], symmetric and positive definite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles
        >>> oracle = oracles.joint_gaussian({"a": [0.0], "b": [0.0]}, [[1.0, 0.5], [0.5, 1.0]])
        >>> x, t = {"a": jnp.zeros((1, 1)), "b": jnp.ones((1, 1))}, {"a": 0.0, "b": 1.0}
        >>> oracle.velocity(x, t)["a"]  # E[a | b = 1]
        Array([[0.5]], dtype=float32)
    """
    means = {part: np.asarray(m, np.float64) for part, m in mean.items()}
    shapes = {part: list(m.shape) for part, m in means.items()}
    if not means or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"joint_gaussian: expected a mean [d] of each part, got {shapes}")
    sizes = [len(m) for m in means.values()]
    m, cov, eye = np.concatenate([*means.values()]), np.asarray(cov, np.float64), np.eye(sum(sizes))
    if cov.shape != eye.shape:
        raise ValueError(
            f"joint_gaussian: expected a covariance {list(eye.shape)} of all parts, got"
            f" {list(cov.shape)}"
        )
    law = _law("joint_gaussian", m[None], cov[None], LINEAR)

    def joined(parts):
        return jnp.concatenate([parts[part] for part in means], axis=1)

    def taken_apart(a):
        ends = np.cumsum(sizes)[:-1]
        return dict(zip(means, jnp.split(a, ends, axis=1), strict=True))

    def factors(t, n, dtype):
        """T [n, D] as vectors, G and S [n, D, D]."""
        t = t if isinstance(t, Mapping) else dict.fromkeys(means, t)
        check_parts("joint_gaussian", "t", t, means)
        t = [jnp.asarray(rows(t[part], n, f"t[{part!r}]"), dtype)[:, None] for part in means]
        t = jnp.repeat(
            jnp.concatenate(t, axis=1), np.asarray(sizes), axis=1, total_repeat_length=len(m)
        )
        rest = (1 - t)[:, None] * _constant(eye, t)
        c = _constant(cov, t)
        return t, c * t[:, None] - rest, t[:, :, None] * c * t[:, None] + rest**2

    @jax.jit
    def velocity(x, t, label=None):
        check_parts("joint_gaussian", "x", x, means)
        n = count_rows("joint_gaussian", x)
        x = {part: a.astype(float_dtype(a)) for part, a in x.items()}
        x = joined(x)
        t, gain, spread = factors(t, n, x.dtype)
        center = _constant(m, x)
        away = jnp.linalg.solve(spread, (x - t * center)[..., None])
        out = jnp.einsum("nij,njk->nik", gain, away, precision=jax.lax.Precision.HIGHEST)
        return taken_apart(center + out[..., 0])

    @jax.jit
    def residual(t):
        one = jnp.asarray(jax.tree.leaves(t)[0])
        _, gain, spread = factors(t, one.shape[0], float_dtype(one))
        solved = jnp.linalg.solve(spread, gain.swapaxes(1, 2))
        known = jnp.einsum("nij,nji->ni", gain, solved, precision=jax.lax.Precision.HIGHEST)
        variance = _constant(np.diag(cov) + 1, known) - known
        return {part: jnp.mean(v, axis=1) for part, v in taken_apart(variance).items()}

    @functools.partial(jax.jit, static_argnames="n")
    def sample(key, n):
        return taken_apart(law.draw(key, jnp.zeros(n, jnp.int32)))

    return JointGaussian(velocity, residual, sample)


def as_velocity(oracle: Gaussian | Mixture | JointGaussian) -> Velocity:
    """The velocity of an oracle as the noun that samplers, losses and likelihoods take.

    Args:
        oracle: what `gaussian`, `mixture` or `joint_gaussian` returned.

    Returns:
        Velocity: params {}, cond is the label, and the type of x is kept.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles
        >>> velocity = oracles.as_velocity(oracles.gaussian([2.0], 1.0))
        >>> velocity.apply({}, jnp.zeros((1, 1)), 0.0)
        Array([[2.]], dtype=float32)
    """
    return Velocity(
        lambda key, x, t, cond=None: {},
        lambda params, x, t, cond=None, *, key=None: jax.tree.map(
            lambda v, x: v.astype(jnp.result_type(x)), oracle.velocity(x, t, cond), x
        ),
    )


def as_flow_map(oracle: Gaussian) -> FlowMap:
    """The flow map of a Gaussian oracle as a `FlowMap`: x carried from time t to time r.

    Args:
        oracle: what `gaussian` returned.

    Returns:
        FlowMap: params {}.
    """
    return FlowMap(
        lambda key, x, t, r, cond=None: {},
        lambda params, x, t, r, cond=None, *, key=None: oracle.flow_map(x, t, r),
    )


def as_average_velocity(oracle: Gaussian) -> FlowMap:
    """The average velocity of a Gaussian oracle between t and r as a `FlowMap`.

    Args:
        oracle: what `gaussian` returned.

    Returns:
        FlowMap: params {}.
    """
    return FlowMap(
        lambda key, x, t, r, cond=None: {},
        lambda params, x, t, r, cond=None, *, key=None: oracle.average_velocity(x, t, r),
    )


class Tokens(NamedTuple):
    """The closed forms of tokens that are one of a few sequences, as `tokens` returns them.

    Attributes:
        field: a `Field` without params, apply({}, x, t) -> log p(x1 | x_t = x) [b, *event, V] of
            each token, what a perfect network would say. Where x can not occur at t, it is the law
            of the sequences that x differs from in the fewest tokens.
        responsibilities: `responsibilities(x, t) -> [b, m]`, p(sequence | x_t = x).
        sample: `sample(key, n) -> [n, *event]`, rows of x1.
        entropy: that of the data, in nats, a float.
    """

    field: Field
    responsibilities: Callable[..., Array]
    sample: Callable[..., Array]
    entropy: float


def tokens(
    sequences: ArrayLike,
    weights: ArrayLike,
    *,
    source: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Tokens:
    """Data that are one of m sequences of tokens, on a path from independent tokens.

        p(x_t | x1) = prod over tokens of kappa 1{x_t = x1} + (1 - kappa) p0(x_t)

    Args:
        sequences: the possible x1, all different, integers [m, *event].
        weights: their probabilities, [m], positive; they are divided by their sum.
        source: the probabilities of each token of x0, p0 [V]; all masks is `jnp.eye(V)[mask]`.
        schedule: its alpha is kappa.

    Returns:
        Tokens: the closed forms.

    Raises:
        ValueError: the shapes do not fit, sequences are no tokens of the vocabulary or occur twice,
            weights are not positive, or source is not a law.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> x, t = jnp.array([[2, 1], [2, 2]]), jnp.array([0.5, 0.5])  # 2 is the mask
        >>> jnp.exp(pairs.field.apply({}, x, t))[:, 0].round(2).tolist()  # of the first token
        [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]
    """
    name = "oracles.tokens"
    p0, known = check_probabilities(name, source), np.asarray(sequences)
    weight = np.asarray(weights, np.float64)
    right = np.issubdtype(known.dtype, np.integer) and p0.ndim == 1 and known.ndim > 0
    if not right or weight.shape != known.shape[:1] or not np.all(weight > 0):
        raise ValueError(
            f"{name}: expected integers [m, *event] with positive weights [m] and a source [V], got"
            f" {known.dtype}{list(known.shape)}, {weight.tolist()} and {list(p0.shape)}"
        )
    flat = known.reshape(len(known), -1)
    if flat.min() < 0 or flat.max() >= len(p0) or len(np.unique(flat, axis=0)) < len(flat):
        raise ValueError(
            f"{name}: expected different sequences of tokens in 0 ... {len(p0) - 1}, got"
            f" {known.tolist()}"
        )
    weight = weight / weight.sum()
    event = known.shape[1:]

    @jax.jit
    def responsibilities(x, t):
        x = jnp.asarray(x)
        share = kappa(schedule, rows(t, x.shape[0]), x)[0].reshape(x.shape[0], 1, -1)
        share = jnp.maximum(share, jnp.finfo(share.dtype).tiny)  # a known token is, at t=0 too
        x = x.reshape(x.shape[0], 1, -1)
        hit = x == jnp.asarray(flat)[None]
        drawn = jnp.asarray(p0, share.dtype)[x]
        p = jnp.where(hit, share, jnp.zeros_like(share)) + (1 - share) * drawn
        likely = jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)), -1e4)
        return jax.nn.softmax(
            jnp.sum(likely, axis=-1) + jnp.asarray(np.log(weight), p.dtype)[None], axis=1
        )

    def apply(params, x, t, cond=None, *, key=None):
        marks = jax.nn.one_hot(jnp.asarray(flat), len(p0))  # [m, n, V]
        found = responsibilities(x, t)
        p = jnp.einsum("bm,mnv->bnv", found, marks.astype(found.dtype))
        return jnp.log(p).reshape(x.shape[0], *event, len(p0))

    def sample(key, n):
        return jnp.asarray(known)[
            jax.random.categorical(key, jnp.asarray(np.log(weight), float)[None], shape=(n,))
        ]

    entropy = float(-np.sum(weight * np.log(weight)))
    return Tokens(Field(lambda *_, **__: {}, apply), responsibilities, sample, entropy)


class _Law(NamedTuple):
    """K Gaussians, with the covariances decomposed.

    means [K, d]; orthonormal eigenvectors as the columns of basis [K, d, d]; eigenvalues [K, d].
    """

    means: np.ndarray
    basis: np.ndarray
    eigenvalues: np.ndarray
    schedule: Schedule

    def at(self, t):
        """The law of x_t and its motion, each [b, K, d]: a m, l_t, (a a' l + s s') / l_t, a' m."""
        a, s, da, ds = coefficients(self.schedule, t)
        a, da, s, ds = (v[:, None, None] for v in (a, da, s, ds))
        means, eigenvalues = _constant(self.means, t), _constant(self.eigenvalues, t)
        variances = a**2 * eigenvalues + s**2
        return a * means, variances, (a * da * eigenvalues + s * ds) / variances, da * means

    def coordinates(self, x, t):
        """x - a m in each eigenbasis, and the variances there: [b, K, d] both."""
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(
                f"oracle: expected x of shape [b, {self.means.shape[1]}], got {list(x.shape)}"
            )
        means, variances, _, _ = self.at(t)
        return _einsum("kij,bki->bkj", self.basis, x[:, None] - means), variances

    def back(self, z):
        """From the eigenbases to x: [b, K, d] -> [b, K, d]."""
        return _einsum("kij,bkj->bki", self.basis, z)

    def along(self, factors, x):
        """Multiply x [d] by a factor [d] along each eigenvector of the first component."""
        return _einsum("ij,j->i", self.basis[0], factors * _einsum("ij,i->j", self.basis[0], x))

    def covariances(self, variances):
        """Variances [n, d] in the first component's eigenbasis -> [n, d, d]."""
        return _einsum(
            "ij,njk->nik", self.basis[0], _einsum("kj,nj->njk", self.basis[0], variances)
        )

    def velocities(self, x, t):
        z, _ = self.coordinates(x, t)
        _, _, rate, drift = self.at(t)
        return drift + self.back(rate * z)

    def scores(self, x, t):
        z, variances = self.coordinates(x, t)
        return -self.back(z / variances)

    def log_densities(self, x, t):
        z, variances = self.coordinates(x, t)
        return -0.5 * jnp.sum(z**2 / variances + jnp.log(2 * jnp.pi * variances), axis=-1)

    def draw(self, key: Key, label):
        """One data row of component label[i] for each i: [n, d]."""
        noise = jax.random.normal(key, (label.shape[0], self.means.shape[1]))
        root = jnp.asarray(self.basis * np.sqrt(self.eigenvalues)[:, None, :], noise.dtype)[label]
        return jnp.asarray(self.means, noise.dtype)[label] + _einsum("nij,nj->ni", root, noise)


def _constant(value, like):
    return jnp.asarray(value, like.dtype)[None]


def _einsum(spec, constant, x):
    # the accelerators' default precision of a product (TF32, bfloat16) would not do for an oracle
    return jnp.einsum(spec, jnp.asarray(constant, x.dtype), x, precision=jax.lax.Precision.HIGHEST)


def _inputs(x, t):
    """x in float32 or better and t [b] in the same type."""
    x = jnp.asarray(x)
    x = x.astype(float_dtype(x))
    return x, rows(t, x.shape[0]).astype(x.dtype)


def _batch_of_one(cov):
    cov = np.asarray(cov, np.float64)
    return cov[None] if cov.ndim else cov


def _law(name, means, covs, schedule) -> _Law:
    """Means [K, d] and covariances in any accepted form, decomposed in float64."""
    if means.ndim != 2:
        raise ValueError(
            f"{name}: expected a mean of shape [d] for each component, got {list(means.shape[1:])}"
        )
    count, d = means.shape
    if covs.shape == (count, d, d):
        if not np.allclose(covs, covs.swapaxes(1, 2)):
            raise ValueError(f"{name}: expected a symmetric covariance")
        eigenvalues, basis = np.linalg.eigh(covs)
    elif covs.shape in ((), (count,), (count, d)):
        eigenvalues = np.broadcast_to(covs.reshape(covs.shape + (1,) * (2 - covs.ndim)), (count, d))
        basis = np.broadcast_to(np.eye(d), (count, d, d))
    else:
        raise ValueError(
            f"{name}: expected one covariance [{d}, {d}], variances [{d}] or a variance for each "
            f"of {count} components, "
            f"got {list(covs.shape)}"
        )
    if not np.all(eigenvalues > 0):
        raise ValueError(
            f"{name}: expected positive definite covariances, got the eigenvalue "
            f"{eigenvalues.min()}"
        )
    return _Law(means, basis, eigenvalues, schedule)


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)


def _mean_slope(f, t, r):
    """(f(r) - f(t)) / (r - t) as the mean of f' between t and r: [b], smooth at r = t.

    Sixteen Gauss-Legendre nodes: exact for polynomials up to degree 32, to rounding for smooth
    schedules.
    """
    nodes = jnp.asarray((_NODES + 1) / 2, t.dtype)[None]
    times = (t[:, None] + nodes * (r - t)[:, None]).reshape(-1)
    slopes = jax.jvp(f, (times,), (jnp.ones_like(times),))[1].reshape(t.shape[0], -1)
    return jnp.sum(slopes * jnp.asarray(_NODE_WEIGHTS / 2, t.dtype)[None], axis=1)
