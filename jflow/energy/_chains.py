"""Markov chains with a flow: its samples as proposals, and its source as better coordinates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jflow._core.checks import (
    check_key,
    check_noun,
    check_rows,
    check_whole,
    count_rows,
)
from jflow.energy._kernels import Kernel, accept
from jflow.energy._target import Target
from jflow.types import Distribution, Flow, Key, Params

__all__ = ["independence_kernel", "pull_back", "run_chains", "successive_kernels"]


def independence_kernel(flow: Flow | Distribution, params: Params) -> Kernel:
    """A transition that proposes a sample of a flow, wherever the chain is.

    Also known as: independence Metropolis-Hastings, IMH, flow proposals, neural proposals, adaptive
    MCMC with flows.

        y ~ q,    accepted with the probability min(1, p~(y) q(x) / (p~(x) q(y)))

    Its chains move between modes that the flow has found. A flow equal to the target is always
    accepted; where q is far below p~ a chain stays for long.

    Args:
        flow: the flow q, or a distribution.
        params: its params.

    Returns:
        Kernel: the kernel, of two evaluations of either density and one sample.

    Raises:
        TypeError: flow is not a `Flow` or a `Distribution`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, energy
        >>> normal = distributions.normal((2,))
        >>> kernel = energy.independence_kernel(normal, {})
        >>> log_density = lambda x: -0.5 * jnp.sum(x**2, -1)  # the same
        >>> x, accepted = kernel(jax.random.key(0), log_density, jnp.zeros((3, 2)), 1)
        >>> accepted.tolist()
        [1.0, 1.0, 1.0]

    References:
        Albergo, Kanwar, Shanahan, *Flow-based generative models for Markov chain Monte Carlo in
            lattice field theory*, 2019, arXiv:1904.12072.
        Gabrié, Rotskoff, Vanden-Eijnden, *Adaptive Monte Carlo augmented with normalizing flows*,
            2021, arXiv:2105.12603.
    """
    check_noun("independence_kernel", flow, Flow, Distribution)

    def kernel(key, log_density, x, level):
        key_proposal, key_accept = jax.random.split(key)
        n = x.shape[0]
        if isinstance(flow, Flow):
            y, log_q = flow.sample_and_log_prob(params, key_proposal, n)
        else:
            y = flow.sample(params, key_proposal, n)
            log_q = flow.log_prob(params, y)
        y = y.astype(x.dtype)
        change = log_density(y) - log_density(x)
        ratio = change - log_q.astype(change.dtype) + flow.log_prob(params, x).astype(change.dtype)
        return accept(key_accept, x, y, ratio)

    return kernel


def successive_kernels(*kernels: Kernel) -> Kernel:
    """Transitions one after another, as one: such as flow proposals and then local steps.

    Also known as: a cycle of kernels, composition of kernels, deterministic scan.

    Args:
        *kernels: the kernels, each of which leaves the density as it is.

    Returns:
        Kernel: their composition; what it accepted is the mean over them.

    Raises:
        ValueError: there is no kernel.

    Examples:
        >>> from jflow import distributions, energy
        >>> kernel = energy.successive_kernels(
        ...     energy.independence_kernel(distributions.normal((2,)), {}),
        ...     energy.hamiltonian_kernel(0.1, 5),
        ... )
    """
    if not kernels:
        raise ValueError("successive_kernels: expected at least one kernel, got none")

    def kernel(key, log_density, x, level):
        total = 0.0
        for one, part in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
            x, accepted = one(part, log_density, x, level)
            total = total + accepted
        return x, total / len(kernels)

    return kernel


def pull_back(target: Target, flow: Flow, params: Params) -> Target:
    """A target in the coordinates of a flow's source, where it is near to the flow's base.

    Also known as: pullback density, NeuTra, flow-preconditioned MCMC, transport map accelerated
    MCMC.

        log p~(z) = log p~(x) + log |det dx/dz|,    x = forward(z)

    The constant is the same. Chains of any kernel, or of another package's sampler, mix in z as
    they would on the base if the flow were exact; `flow.forward(params, z)` takes them to x.

    Args:
        target: the target of x.
        flow: the flow, from its source to x.
        params: its params.

    Returns:
        Target: that of z. Its draws are those of the target through the inverse.

    Raises:
        TypeError: target is not a `Target` or flow not a `Flow`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, energy, flows
        >>> flow = flows.flow(bijectors.affine((2,)), distributions.normal((2,)))
        >>> params = {"bijector": {"shift": jnp.ones(2), "log_scale": jnp.zeros(2)}, "base": {}}
        >>> target = energy.Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2, -1), (2,))
        >>> energy.pull_back(target, flow, params).log_density(jnp.zeros((1, 2))).tolist()
        [0.0]

    References:
        Parno, Marzouk, *Transport map accelerated Markov chain Monte Carlo*, 2014, arXiv:1412.5492.
        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan, *NeuTra-lizing Bad Geometry in
            Hamiltonian Monte Carlo Using Neural Transport*, 2019, arXiv:1903.03704.
    """
    check_noun("pull_back", target, Target)
    check_noun("pull_back", flow, Flow)

    def log_density(z):
        x, log_det = flow.forward(params, z)
        return check_rows("pull_back", "log_density", target.log_density(x), len(x)) + log_det

    draw = target.sample
    sample = None if draw is None else lambda key, n: flow.inverse(params, draw(key, n))[0]
    return Target(log_density, target.event_shape, target.log_z, sample)


def run_chains(
    kernel: Kernel,
    target: Target,
    x: Float[Array, "n *event"],
    key: Key,
    steps: int,
    *,
    thin: int = 1,
) -> tuple[Float[Array, "steps n *event"], Float[Array, " n"]]:
    """Chains of a kernel from given points, in one scan.

    Args:
        kernel: such as `hamiltonian_kernel(0.1, 5)` or `independence_kernel(flow, params)`.
        target: the target.
        x: the starts of n chains, [n, *event].
        key: a key.
        steps: the number of states that are kept of every chain.
        thin: the number of transitions from a kept state to the next.

    Returns:
        states: [steps, n, *event].
        accepted: the share of accepted transitions of every chain, [n].

    Raises:
        TypeError: target is not a `Target`, or the key is none.
        ValueError: steps or thin is not a whole number of at least 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> kernel, target = energy.hamiltonian_kernel(0.2, 3), energy.banana()
        >>> states, accepted = energy.run_chains(
        ...     kernel, target, jnp.zeros((4, 2)), jax.random.key(0), 10
        ... )
        >>> states.shape, accepted.shape
        ((10, 4, 2), (4,))
    """
    check_noun("run_chains", target, Target)
    check_key("run_chains", key)
    check_whole("run_chains", steps=steps, thin=thin)
    count_rows("run_chains", x)

    def once(x, key):
        return kernel(key, target.log_density, x, 1.0)

    def kept(x, key):
        x, accepted = jax.lax.scan(once, x, jax.random.split(key, thin))
        return x, (x, jnp.mean(accepted, axis=0))

    _, (states, accepted) = jax.lax.scan(kept, x, jax.random.split(key, steps))
    return states, jnp.mean(accepted, axis=0)
