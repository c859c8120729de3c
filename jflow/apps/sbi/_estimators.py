"""Estimators: what learns a posterior from simulated pairs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn

from jflow import distributions, flows, losses, nets
from jflow.solvers import Method
from jflow.types import Flow, Loss


class Estimator(NamedTuple):
    """What learns a posterior: a conditional flow and the loss that trains it.

    A function (d, embed) -> Estimator is what `fit` takes: d is the number of parameters, embed
    what was passed to `fit`. Parameters reach the flow as numbers of order one on the reals, and
    the condition is what was simulated, in robust standard deviations, [b, *event].

    Attributes:
        flow: A conditional flow on [d].
        loss: The loss of its params, on batches {'x': parameters, 'cond': what was simulated}.
    """

    flow: Flow
    loss: Loss


def npe(
    *,
    depth: int = 5,
    hidden: Sequence[int] = (128, 128),
    bins: int = 8,
) -> Callable[[int, nn.Module | None], Estimator]:
    """Neural posterior estimation: a neural spline flow of the parameters, by maximum likelihood.

    Also known as: NPE, SNPE, neural posterior estimation, amortized posterior.

        minimize the mean of -log q(theta | x) over simulated pairs,

    whose minimum over all q is the posterior. Splines of each parameter are conditioned on the
    parameters before it and on x (`flows.neural_spline_autoregressive`).

    Args:
        depth: The number of layers.
        hidden: The widths of the network of each layer.
        bins: Of the splines.

    Returns:
        A function (d, embed) -> `Estimator`.

    Examples:
        >>> from jflow.apps import sbi
        >>> estimator = sbi.npe(depth=2, hidden=(16,))(3, None)
        >>> type(estimator.flow).__name__
        'Flow'

    References:
        Papamakarios, Murray, *Fast epsilon-free Inference of Simulation Models with Bayesian
            Conditional Density Estimation*, 2016, arXiv:1605.06376.
    """

    def make(d, embed):
        flow = flows.neural_spline_autoregressive(
            (d,),
            depth=depth,
            hidden=tuple(hidden),
            bins=bins,
            embed=_Flat() if embed is None else embed,
            standardize=False,
        )
        return Estimator(flow, losses.nll(flow))

    return make


def fmpe(
    *,
    hidden: Sequence[int] = (128, 128, 128),
    method: Method | int | None = None,
) -> Callable[[int, nn.Module | None], Estimator]:
    """Flow matching posterior estimation: a continuous flow of the parameters, by flow matching.

    Also known as: FMPE, flow matching posterior estimation.

    A velocity network of (theta_t, t, x) regresses on the straight line from noise to parameters
    (`losses.flow_matching`); draws and densities are solutions of its ODE (`flows.cnf`). Training
    steps are cheap and the network is free in its form; draws and densities are slower than those
    of `npe`.

    Args:
        hidden: The widths of the velocity network.
        method: How the ODE is solved: a `solvers.Method` or a number of steps; None is adaptive.

    Returns:
        A function (d, embed) -> `Estimator`.

    Examples:
        >>> from jflow.apps import sbi
        >>> estimator = sbi.fmpe(hidden=(16,), method=10)(3, None)
        >>> type(estimator.flow).__name__
        'Flow'

    References:
        Wildberger, Dax, Buchholz, Green, Macke, Schoelkopf, *Flow Matching for Scalable
            Simulation-Based Inference*, 2023, arXiv:2305.17161.
    """

    def make(d, embed):
        net = nets.TimeMLP(
            hidden=tuple(hidden), time_scale=10.0, embed=_Flat() if embed is None else embed
        )
        velocity = nets.velocity(net)
        flow = flows.cnf(velocity, distributions.normal((d,)), method=method)
        matching = losses.flow_matching(velocity)

        def loss(params, key, batch, frozen=None):
            return matching(params["velocity"], key, batch, frozen)

        return Estimator(flow, loss)

    return make


class _Flat(nn.Module):
    """A condition [b, *event] as vectors [b, k]."""

    @nn.compact
    def __call__(self, x):
        return x.reshape(x.shape[0], -1)
