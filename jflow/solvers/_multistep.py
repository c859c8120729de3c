"""Multistep methods as diffrax solvers: one evaluation a step, and the steps before remembered.

A polynomial through the last predictions is integrated exactly over the step. The grid may be
anything: the weights are those of its times. The first steps know fewer points and are of lower
order: Euler or DDIM, then order two, and so on. Euler's step costs the square of its own length, so
that a uniform grid shows order 2 at most, 3 where the step is corrected later; one that starts with
smaller steps (`grids.power(n, 2)`) shows the full order.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jflow.paths import LINEAR, Schedule
from jflow.solvers._exponential import Stepper, combine, predictions, real_time, values

__all__ = ["adams_bashforth", "dpm_solver_pp", "fireflow", "pseudo_corrector", "unipc"]


def adams_bashforth(order: int = 2) -> diffrax.AbstractSolver:
    """Adams-Bashforth: the polynomial in t through the last velocities, integrated over the step.

    It takes one evaluation a step. On the linear path this is what the field calls iPNDM where the
    grid is uniform, and DEIS with time as its variable where it is not.

    Args:
        order: how many velocities, 1 to 4; 1 is Euler's method.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    Raises:
        ValueError: order is another number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):
        ...     return t[:, None]
        >>> velocity = Velocity(lambda *_: {}, apply)
        >>> method = solvers.fixed(2, solvers.adams_bashforth(2))  # Euler's step, then order two
        >>> solvers.sample(velocity, {}, jnp.zeros((1, 1)), method=method)[0].tolist()
        [[0.375]]

    References:
        Zhang, Chen, *Fast Sampling of Diffusion Models with Exponential Integrator*, 2023,
            arXiv:2204.13902 (DEIS, iPNDM).
        Hairer, Norsett, Wanner, *Solving Ordinary Differential Equations I*, 1993, III.5 (variable
            steps).
    """
    _check_order("adams_bashforth", order, 4)
    return _AdamsBashforth(order)


def dpm_solver_pp(order: int = 2, schedule: Schedule = LINEAR) -> diffrax.AbstractSolver:
    """DPM-Solver++(2M), and its relatives of order 1 (DDIM) and 3.

    Also known as: DPM-Solver++.

    The polynomial in lambda = log(alpha / sigma) through the last `order` predictions of x1 is
    integrated against e^lambda. It takes one evaluation a step. Order 2 takes the value of the
    polynomial at the middle of the step, as published; order 3 its exact integral, as UniP-3 does.
    (The third order of diffusers 0.42 has half the exact weight on the second difference, and is of
    order 2.) A step that starts or ends at t=0 or t=1, where lambda may be infinite, is DDIM's, and
    the predictions there are not extrapolated from.

    Args:
        order: how many predictions, 1, 2 or 3.
        schedule: the path that the velocity was trained on; the default is the linear one.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    Raises:
        ValueError: order is another number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):  # all data at 3
        ...     return (3 - x) / (1 - t[:, None])
        >>> velocity = Velocity(lambda *_: {}, apply)
        >>> method = solvers.fixed(2, solvers.dpm_solver_pp())
        >>> x1, info = solvers.sample(velocity, {}, jnp.ones((1, 1)), method=method)
        >>> round(float(x1[0, 0]), 4), info.evaluations.tolist()
        (3.0, [2])

    References:
        Lu, Zhou, Bao, Chen, Li, Zhu, *DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
            Probabilistic Models*, 2022, arXiv:2211.01095.
    """
    _check_order("dpm_solver_pp", order, 3)
    return _Exponential(order, schedule, False)


def unipc(order: int = 2, schedule: Schedule = LINEAR) -> diffrax.AbstractSolver:
    """UniPC (B2, predicting x1): `dpm_solver_pp(order)`, and a corrector of one order more.

    Also known as: UniPC.

    The corrector redoes each step once the prediction at its end is known, so that there is one
    evaluation a step; the last step is not corrected. Both use the exact integral of their
    polynomial, but the value at the middle for two points, as published.

    Args:
        order: of the predictor, 1, 2 or 3.
        schedule: the path that the velocity was trained on; the default is the linear one.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    Raises:
        ValueError: order is another number.

    References:
        Zhao, Bai, Rao, Zhou, Lu, *UniPC: A Unified Predictor-Corrector Framework for Fast Sampling
            of Diffusion Models*, 2023, arXiv:2302.04867.
    """
    _check_order("unipc", order, 3)
    return _Exponential(order, schedule, True)


def fireflow() -> diffrax.AbstractSolver:
    """FireFlow: the explicit midpoint method that starts with the middle velocity of the last step.

    That takes the place of the velocity at the start of the step. It is about second order at one
    evaluation a step, and one more at the start.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    References:
        Deng, He, Mei, Wang, Tang, *FireFlow: Fast Inversion of Rectified Flow for Image Semantic
            Editing*, 2025, arXiv:2412.07517.
    """
    return _FireFlow()


def pseudo_corrector() -> diffrax.AbstractSolver:
    """FlowTurbo's pseudo corrector: Heun's method with the second velocity of the last step.

    It takes the place of the first velocity of this step. That velocity was taken at the
    prediction, not at the corrected state: second order at one evaluation a step, and one more at
    the start. The first step is Heun's.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    References:
        Zhao, Shi, Yu, Zhou, Lu, *FlowTurbo: Towards Real-time Flow-Based Image Generation with
            Velocity Refiner*, 2024, arXiv:2409.18128.
    """
    return _PseudoCorrector()


class _FireFlow(Stepper):
    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, last, made_jump):
        h = terms.contr(t0, t1)
        y_mid = combine((1, h / 2), (y0, last))
        v = terms.vf(t0 + (t1 - t0) / 2, y_mid, args)
        y1 = combine((1, h), (y0, v))
        return y1, None, {"y0": y0, "y1": y1}, v, diffrax.RESULTS.successful

    def evaluations(self, steps):
        return steps + 1


class _PseudoCorrector(Stepper):
    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, last, made_jump):
        h = terms.contr(t0, t1)
        v = terms.vf(t1, combine((1, h), (y0, last)), args)
        y1 = combine((1, h / 2, h / 2), (y0, last, v))
        return y1, None, {"y0": y0, "y1": y1}, v, diffrax.RESULTS.successful

    def evaluations(self, steps):
        return steps + 1


class _AdamsBashforth(Stepper):
    points: int = eqx.field(static=True)

    def order(self, terms):
        return self.points

    def init(self, terms, t0, t1, y0, args):
        return _no_past(real_time(terms, t0), y0, self.points - 1)

    def step(self, terms, t0, t1, y0, args, state, made_jump):
        past, times, count = state
        t, h = real_time(terms, t0), terms.contr(t0, t1)
        v = terms.vf(t0, y0, args)
        known = (v, *past)
        nodes = [jnp.where(k < count, (time - t) / h, -1.0 - k) for k, time in enumerate(times)]
        w = _by_count([0.0, *nodes], 0.0, jnp.minimum(count, len(nodes)))
        y1 = combine((1, *(h * w)), (y0, *known))
        state = known[: self.points - 1], (t, *times)[: self.points - 1], count + 1
        return y1, None, {"y0": y0, "y1": y1}, state, diffrax.RESULTS.successful


class _Exponential(Stepper):
    """DPM-Solver++ multistep, and UniPC where `correct`.

    The state is predictions (of x1, on the way back of x0) and their times, the latest first, how
    many there are, and the corrected y of the last time.
    """

    points: int = eqx.field(static=True)
    schedule: Schedule = eqx.field(static=True)
    correct: bool = eqx.field(static=True)

    def order(self, terms):
        return self.points + self.correct

    def init(self, terms, t0, t1, y0, args):
        # a corrector of one order more looks one step further back
        past = _no_past(real_time(terms, t0), y0, self.points - 1 + self.correct)
        return past, jax.tree.map(jnp.zeros_like, y0)

    def step(self, terms, t0, t1, y0, args, state, made_jump):
        (past, times, count), y_last = state
        t, t_next = real_time(terms, t0), real_time(terms, t1)
        rises, y = t < t_next, y0
        x1, x0 = predictions(self.schedule, terms, t0, y0, args)
        known, ts = (
            (jax.tree.map(lambda x1, x0: jnp.where(rises, x1, x0), x1, x0), *past),
            (t, *times),
        )
        if self.correct:
            keep, w = self._weights(rises, times[0], t, times[1:], count - 1, corrects=True)
            corrected = combine((keep, *w), (y_last, *past, known[0]))
            y = jax.tree.map(lambda a, b: jnp.where(count > 0, a, b), corrected, y0)
        keep, w = self._weights(rises, t, t_next, ts[1 : self.points], count)
        y1 = combine((keep, *w), (y, *known[: self.points]))
        state = (known[: len(past)], ts[: len(past)], count + 1), y
        return y1, None, {"y0": y0, "y1": y1}, state, diffrax.RESULTS.successful

    def _weights(self, rises, t, t_next, back, count, corrects=False):
        """keep and w of the step from t to t_next, keep y + sum_k w[k] x1[k]: x1[0] predicted at
        t, those that follow at the times `back`, `count` of which are there, and the last at
        t_next if it `corrects`. x1 is x0 unless it rises.
        """
        (a, s), (a_next, s_next) = values(self.schedule, t), values(self.schedule, t_next)
        keep = jnp.where(rises, s_next, a_next) / jnp.where(rises, s, a)
        held = jnp.where(rises, a_next - keep * a, s_next - keep * s)
        (lam, here), (lam_next, there) = self._log_snr(t), self._log_snr(t_next)
        finite = here & there & (lam != lam_next)
        h = jnp.where(finite, lam_next - lam, 1)
        nodes, usable = [0.0], jnp.minimum(count, len(back))
        for k, (before, known) in enumerate(map(self._log_snr, back)):
            nodes.append(jnp.where(known & finite & (k < count), (before - lam) / h, -1.0 - k))
            usable = jnp.minimum(usable, jnp.where(known, len(back), k))
        # the weight in the integral is e^lambda for x1 and e^-lambda for x0, which grow the way the
        # solve goes
        return keep, held * _by_count(nodes, jnp.abs(h), jnp.where(finite, usable, 0), corrects)

    def _log_snr(self, t):
        """log(alpha / sigma) at t, and whether t is inside (0, 1) (0 where not, so that
        gradients are finite).
        """
        (a, s), inside = values(self.schedule, t), (t > 0) & (t < 1)
        return jnp.log(jnp.where(inside, a, 1) / jnp.where(inside, s, 1)), inside


def _no_past(t0, y0, length):
    """Zeros for predictions, the start for their times, and a count of 0."""
    return (
        (jax.tree.map(jnp.zeros_like, y0),) * length,
        (t0,) * length,
        jnp.zeros_like(t0, jnp.int32),
    )


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)
_NODES, _NODE_WEIGHTS = (_NODES + 1) / 2, _NODE_WEIGHTS / 2


def _by_count(nodes, h, count, corrects=False):
    """`_integral` through nodes[0], the `count` nodes that follow, and 1 if it `corrects`; the
    other weights are 0.
    """
    dtype, rows = jnp.result_type(h, *nodes), []
    for n in range(1, len(nodes) + 1):
        w = _integral([*nodes[:n], *([1.0] if corrects else [])], h, dtype)
        rows.append(jnp.concatenate([w[:n], jnp.zeros(len(nodes) - n, dtype), w[n:]]))
    return jnp.stack(rows)[count]


def _integral(nodes, h, dtype):
    """[len(nodes)]: the weights w of the values p(nodes) of a polynomial p in sum_k w[k]
    p(nodes[k]), the mean of p(u) on [0, 1] under a density proportional to e^(h u); from two
    nodes p(1/2), which is second order too.
    """
    if len(nodes) == 2:
        u, density = jnp.full((1,), 0.5, dtype), jnp.ones((1,), dtype)
    else:  # sixteen nodes: exact to rounding up to h of about 20
        u = jnp.asarray(_NODES, dtype)
        density = jax.nn.softmax(jnp.asarray(np.log(_NODE_WEIGHTS), dtype) + h * u)
    weights = []
    for k, node in enumerate(nodes):
        factors = [(u - other) / (node - other) for j, other in enumerate(nodes) if j != k]
        weights.append(
            jnp.sum(
                density * (jnp.prod(jnp.stack(factors), axis=0) if factors else jnp.ones_like(u))
            )
        )
    return jnp.stack(weights)


def _check_order(name, order, most):
    if isinstance(order, bool) or order not in range(1, most + 1):
        raise ValueError(
            f"{name}: expected order to be one of {list(range(1, most + 1))}, got {order!r}"
        )
