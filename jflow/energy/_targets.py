"""Targets of the literature, with the constants and the draws that are known of them."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import sum_event
from jflow._core.checks import check_event, check_whole
from jflow._core.seeds import generator
from jflow.energy._target import Target, posterior

__all__ = [
    "banana",
    "double_well",
    "double_well_particles",
    "forty_gaussians",
    "funnel",
    "lennard_jones",
    "log_gaussian_cox",
    "many_well",
    "phi4",
]

_LOG_2PI = math.log(2 * math.pi)
_CLOSE = 1e-2  # particles nearer than this count as this far apart: energies stay finite


def _log_normal(x, mean, std):
    return -0.5 * (jnp.square((x - mean) / std) + _LOG_2PI) - jnp.log(std)


def banana() -> Target:
    """A bent normal distribution in the plane: x1 ~ N(0, 2^2), x2 given x1 ~ N(x1^2 / 4 - 1, 1/4).

    Also known as: Rosenbrock density, twisted Gaussian.

    Returns:
        The target on [2], normalized, with draws.

    Examples:
        >>> from jflow import energy
        >>> energy.banana().log_z
        0.0

    References:
        Haario, Saksman, Tamminen, *Adaptive Proposal Distribution for Random Walk Metropolis
            Algorithm*, 1999, of another bend and without an arXiv number; the constants are ours.
    """

    def log_density(x):
        check_event("banana", x, (2,))
        bend = jnp.square(x[:, 0]) / 4 - 1
        return _log_normal(x[:, 0], 0.0, 2.0) + _log_normal(x[:, 1], bend, 0.5)

    def sample(key, n):
        z = jax.random.normal(key, (n, 2))
        first = 2 * z[:, 0]
        return jnp.stack([first, jnp.square(first) / 4 - 1 + z[:, 1] / 2], -1)

    return Target(log_density, (2,), 0.0, sample)


def funnel(dim: int = 10) -> Target:
    """Neal's funnel: x1 ~ N(0, 3^2), and the others given x1 are N(0, exp(x1)).

    Args:
        dim: The number of dimensions, at least 2.

    Returns:
        The target on [dim], normalized, with draws.

    Raises:
        ValueError: For a dim below 2.

    Examples:
        >>> from jflow import energy
        >>> energy.funnel().event_shape
        (10,)

    References:
        Neal, *Slice Sampling*, 2003, arXiv:physics/0009028.
    """
    check_whole("funnel", 2, dim=dim)

    def log_density(x):
        check_event("funnel", x, (dim,))
        neck, rest = x[:, 0], x[:, 1:]
        return _log_normal(neck, 0.0, 3.0) - 0.5 * (
            sum_event(jnp.square(rest)) * jnp.exp(-neck) + (dim - 1) * (_LOG_2PI + neck)
        )

    def sample(key, n):
        z = jax.random.normal(key, (n, dim))
        neck = 3 * z[:, :1]
        return jnp.concatenate([neck, jnp.exp(neck / 2) * z[:, 1:]], -1)

    return Target(log_density, (dim,), 0.0, sample)


def double_well() -> Target:
    """Two wells of unequal depth in the plane: -log density = x1^4 - 6 x1^2 - x1 / 2 + x2^2 / 2.

    The barrier at 0 is 9 nats above the wells, at about -1.7 and 1.7; the left one has the
    probability 0.155693.

    Returns:
        The target on [2], with log Z = 10.29348 by quadrature and draws by a table of quantiles.

    Examples:
        >>> from jflow import energy
        >>> round(energy.double_well().log_z, 5)
        10.29348

    References:
        Noe, Olsson, Koehler, Wu, *Boltzmann Generators: Sampling Equilibrium States of Many-Body
            Systems with Deep Learning*, 2019, arXiv:1812.01729.
        Wu, Koehler, Noe, *Stochastic Normalizing Flows*, 2020, arXiv:2002.06707.
    """
    return many_well(2)


def many_well(dim: int = 32) -> Target:
    """Independent double wells: dim / 2 of them, and so 2^(dim / 2) modes.

    Args:
        dim: The number of dimensions, even; x1 and x2, x3 and x4, ... are a `double_well` each.

    Returns:
        The target on [dim], with log Z = dim / 2 times that of the double well, 164.695675 in 32
        dimensions, and draws by a table of quantiles.

    Raises:
        ValueError: For an odd dim.

    Examples:
        >>> from jflow import energy
        >>> round(energy.many_well(32).log_z, 6)
        164.695675

    References:
        Midgley, Stimper, Simm, Schoelkopf, Hernandez-Lobato, *Flow Annealed Importance Sampling
            Bootstrap*, 2023, arXiv:2208.01893.
    """
    check_whole("many_well", 2, dim=dim)
    if dim % 2:
        raise ValueError(f"many_well: expected an even dim, got {dim}")

    def log_well(d):
        return d / 2 + 6 * d**2 - d**4

    # the integrand and all of its derivatives vanish at the ends: the sum is exact to rounding
    grid = np.linspace(-4, 4, 8001)
    mass = np.exp(log_well(grid))
    log_z = math.log(mass.sum() * (grid[1] - grid[0])) + _LOG_2PI / 2
    below = (np.cumsum(mass) - mass / 2) / mass.sum()

    def log_density(x):
        check_event("many_well", x, (dim,))
        return sum_event(log_well(x[:, 0::2]) - 0.5 * jnp.square(x[:, 1::2]))

    def sample(key, n):
        key_wells, key_normals = jax.random.split(key)
        quantile = jax.random.uniform(key_wells, (n, dim // 2))
        wells = jnp.interp(quantile, jnp.asarray(below, float), jnp.asarray(grid, float))
        normals = jax.random.normal(key_normals, (n, dim // 2))
        return jnp.stack([wells, normals], -1).reshape(n, dim)

    return Target(log_density, (dim,), dim // 2 * log_z, sample)


def forty_gaussians(std: float = 1.0) -> Target:
    """Forty round normal distributions of equal weight in the plane, means in the square of 40.

    Also known as: GMM-40, mixture of 40 Gaussians.

    Published targets of this name differ in their means, which are draws of a seed, in their
    standard deviation (1, or log(1 + e) = 1.3133) and in a cut of the far tails. This one has means
    of its own, uniform in [-40, 40]^2, and no cut.

    Args:
        std: The standard deviation of each of them.

    Returns:
        The target on [2], normalized, with draws.

    Raises:
        ValueError: Unless std > 0.

    Examples:
        >>> from jflow import energy
        >>> energy.forty_gaussians().log_z
        0.0

    References:
        Midgley, Stimper, Simm, Schoelkopf, Hernandez-Lobato, *Flow Annealed Importance Sampling
            Bootstrap*, 2023, arXiv:2208.01893.
    """
    _check_positive("forty_gaussians", std=std)
    means = generator("forty_gaussians", 0).uniform(-40, 40, (40, 2))

    def log_density(x):
        check_event("forty_gaussians", x, (2,))
        squares = jnp.sum(jnp.square((x[:, None] - jnp.asarray(means[None], x.dtype)) / std), -1)
        return jax.nn.logsumexp(-0.5 * squares, -1) - math.log(40 * 2 * math.pi * std**2)

    def sample(key, n):
        key_mode, key_noise = jax.random.split(key)
        mode = jax.random.randint(key_mode, (n,), 0, 40)
        return jnp.asarray(means, float)[mode] + std * jax.random.normal(key_noise, (n, 2))

    return Target(log_density, (2,), 0.0, sample)


def phi4(
    shape: Sequence[int] = (8, 8), *, mass_squared: float = -4.0, coupling: float = 8.0
) -> Target:
    """A scalar field on a periodic lattice, whose density is exp(-action).

        action = sum over sites of [sum over axes (phi(next) - phi)^2 + m^2 phi^2 + lambda phi^4].

    A negative m^2 and a small lambda give two wells, of one sign of the field each.

    Also known as: scalar lattice field theory.

    Args:
        shape: The sites along each axis, at least 2.
        mass_squared: m^2.
        coupling: lambda, not negative; the free field, 0, needs m^2 > 0.

    Returns:
        The target on [*shape]. The free field has log Z in closed form; otherwise it is None.

    Raises:
        ValueError: For a density that does not integrate, and an axis of one site.

    Examples:
        >>> from jflow import energy
        >>> free = energy.phi4((4, 4), mass_squared=1.0, coupling=0.0)
        >>> round(free.log_z, 4)
        -2.8581

    References:
        Albergo, Kanwar, Shanahan, *Flow-Based Generative Models for Markov Chain Monte Carlo in
            Lattice Field Theory*, 2019, arXiv:1904.12072.
    """
    shape = tuple(shape)
    for sites in shape:
        check_whole("phi4", 2, sites=sites)
    if not (coupling > 0 or (coupling == 0 and mass_squared > 0)):
        raise ValueError(
            "phi4: expected coupling > 0, or coupling 0 and mass_squared > 0, got coupling"
            f" {coupling} and mass_squared {mass_squared}"
        )
    axes = range(1, len(shape) + 1)

    def log_density(x):
        check_event("phi4", x, shape)
        squares = jnp.square(x)
        site = mass_squared * squares + coupling * jnp.square(squares)
        return -sum_event(site + sum(jnp.square(jnp.roll(x, -1, axis) - x) for axis in axes))

    log_z = None
    if coupling == 0:  # independent waves
        waves = np.meshgrid(*(4 * np.sin(np.pi * np.arange(n) / n) ** 2 for n in shape))
        log_z = float(0.5 * np.sum(np.log(np.pi / (mass_squared + sum(waves)))))
    return Target(log_density, shape, log_z)


def double_well_particles(particles: int = 4, dim: int = 2) -> Target:
    """Particles whose distances d have two wells: -log density = sum over pairs of E(d).

        E(d) = -4 (d - 4)^2 + 0.9 (d - 4)^4.

    Also known as: DW4.

    The energy does not change when all particles move, turn or trade places. To make it a density
    on [particles, dim], sqrt(particles) times the centroid is standard normal: on configurations
    with the centroid at 0 the log-density is that of the paper, and log Z is larger by dim / 2
    log(2 pi).

    Args:
        particles: The number of particles, at least 2.
        dim: The number of coordinates of each.

    Returns:
        The target on [particles, dim].

    Raises:
        ValueError: For fewer particles than 2, or no coordinates.

    Examples:
        >>> from jflow import energy
        >>> energy.double_well_particles().event_shape
        (4, 2)

    References:
        Koehler, Klein, Noe, *Equivariant Flows: Exact Likelihood Generative Learning for Symmetric
            Densities*, 2020, arXiv:2006.02425.
    """
    check_whole("double_well_particles", 2, particles=particles)
    check_whole("double_well_particles", dim=dim)

    def log_density(x):
        check_event("double_well_particles", x, (particles, dim))
        away = jnp.sqrt(_squared_distances(x)) - 4
        return -sum_event(-4 * away**2 + 0.9 * away**4) - _centroid_energy(x)

    return Target(log_density, (particles, dim))


def lennard_jones(particles: int = 13, dim: int = 3, *, trap: float = 1.0) -> Target:
    """Particles that attract and, when close, repel each other, in a harmonic trap.

        -log density = sum over pairs of (d^-12 - 2 d^-6) + trap / 2 sum |x_i - centroid|^2,

    whose least value for a pair is -1, at the distance 1.

    Also known as: LJ13, LJ55.

    The centroid has the law of `double_well_particles`. Distances below 0.01 count as 0.01, where
    the density is 0 for every purpose, so that energies and gradients stay finite.

    Args:
        particles: The number of particles, at least 2.
        dim: The number of coordinates of each.
        trap: The stiffness of the trap, positive; without one the particles drift apart.

    Returns:
        The target on [particles, dim].

    Raises:
        ValueError: For fewer particles than 2, no coordinates, or a trap that is not positive.

    Examples:
        >>> from jflow import energy
        >>> energy.lennard_jones().event_shape
        (13, 3)

    References:
        Koehler, Klein, Noe, *Equivariant Flows: Exact Likelihood Generative Learning for Symmetric
            Densities*, 2020, arXiv:2006.02425.
    """
    check_whole("lennard_jones", 2, particles=particles)
    check_whole("lennard_jones", dim=dim)
    _check_positive("lennard_jones", trap=trap)

    def log_density(x):
        check_event("lennard_jones", x, (particles, dim))
        inverse = _squared_distances(x) ** -3
        spread = sum_event(jnp.square(x - jnp.mean(x, 1, keepdims=True)))
        return (
            -sum_event(jnp.square(inverse) - 2 * inverse) - trap / 2 * spread - _centroid_energy(x)
        )

    return Target(log_density, (particles, dim))


def _squared_distances(x):
    """[n, particles, dim] -> [n, pairs]."""
    first, second = np.triu_indices(x.shape[1], 1)
    squares = jnp.sum(jnp.square(x[:, first] - x[:, second]), -1)
    return jnp.maximum(squares, _CLOSE**2)


def _centroid_energy(x):
    """Half the square of sqrt(particles) times the centroid."""
    return 0.5 * x.shape[1] * jnp.sum(jnp.square(jnp.mean(x, 1)), -1)


def log_gaussian_cox(
    counts: np.ndarray | None = None,
    *,
    size: int = 40,
    variance: float = 1.91,
    scale: float = 1 / 33,
    mean_count: float = 126.0,
) -> Target:
    """The log-intensity of points in the unit square, given their counts on a grid.

    The prior is a Gaussian process on the cells, with the covariance variance exp(-distance /
    scale) and a mean that makes `mean_count` points expected; counts are Poisson, of the rate
    exp(x) / cells.

    Also known as: LGCP, Cox process.

    Args:
        counts: The counts [size, size], whole numbers. None draws them from the model, by a fixed
            seed: published runs use the positions of 126 pine saplings, which are not in here.
        size: The cells along a side, where there are no counts.
        variance: That of the process.
        scale: The length over which the correlation falls by e, in sides of the square.
        mean_count: The expected number of points.

    Returns:
        The target on [size, size], a posterior with its prior and likelihood apart, whose log Z is
        the log evidence, with the constants of the Poisson law.

    Raises:
        ValueError: For counts that are not square or not whole numbers, and for numbers that are
            not positive.

    Examples:
        >>> from jflow import energy
        >>> energy.log_gaussian_cox(size=4).event_shape
        (4, 4)

    References:
        Moller, Syversveen, Waagepetersen, *Log Gaussian Cox Processes*, 1998, without an arXiv
            number.
    """
    name = "log_gaussian_cox"
    _check_positive(name, variance=variance, scale=scale, mean_count=mean_count)
    if counts is not None:
        counts = np.asarray(counts, np.float64)
        if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
            raise ValueError(f"{name}: expected counts of shape [m, m], got {list(counts.shape)}")
        if not np.all((counts >= 0) & (counts == np.round(counts))):
            raise ValueError(f"{name}: expected counts that are whole numbers of at least 0")
        size = len(counts)
    check_whole(name, size=size)
    cells = size**2
    center = (np.stack(np.meshgrid(*[np.arange(size)] * 2, indexing="ij"), -1) + 0.5) / size
    center = center.reshape(cells, 2)
    distance = np.linalg.norm(center[:, None] - center[None], axis=-1)
    factor = np.linalg.cholesky(variance * np.exp(-distance / scale))
    mean = math.log(mean_count) - variance / 2
    if counts is None:
        random = generator(name, 0)
        rate = np.exp(mean + factor @ random.normal(size=cells)) / cells
        counts = random.poisson(rate).reshape(size, size).astype(np.float64)
    points = counts.reshape(cells)
    constant = -sum(math.lgamma(k + 1) for k in points)
    log_scale = float(np.sum(np.log(np.diag(factor))))

    def flat(x):
        check_event(name, x, (size, size))
        return x.reshape(x.shape[0], cells)

    def log_prior(x):
        centered = (flat(x) - mean).T
        z = jax.scipy.linalg.solve_triangular(jnp.asarray(factor, x.dtype), centered, lower=True)
        return -0.5 * jnp.sum(jnp.square(z), 0) - log_scale - cells / 2 * _LOG_2PI

    def log_likelihood(x):
        log_rate = flat(x) - math.log(cells)
        return (
            sum_event(jnp.asarray(points[None], x.dtype) * log_rate - jnp.exp(log_rate)) + constant
        )

    def sample(key, n):
        z = jax.random.normal(key, (n, cells))
        return (mean + z @ jnp.asarray(factor.T, z.dtype)).reshape(n, size, size)

    return posterior(log_prior, log_likelihood, (size, size), sample=sample)


def _check_positive(name: str, **numbers: float) -> None:
    for what, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: expected a finite {what} > 0, got {number}")
