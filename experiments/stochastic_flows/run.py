"""Stochastic flows, diffusion samplers, evidence, particles and a lattice field, in five tables.

    python experiments/stochastic_flows/run.py double_well [--picture wells.png]
    python experiments/stochastic_flows/run.py diffusions
    python experiments/stochastic_flows/run.py evidence
    python experiments/stochastic_flows/run.py particles
    python experiments/stochastic_flows/run.py lattice

Minutes each on two CPU cores; --short shrinks each to seconds. Prints the tables of README.md
beside this file. The picture needs the extra `experiments`, nothing is downloaded.

Methods: Wu, Köhler, Noé, *Stochastic Normalizing Flows* (2020); Zhang, Chen, *Path Integral
Sampler* (2021); Zhang et al., *Diffusion Generative Flow Samplers* (2023); Polanska et al.,
*Learned harmonic mean estimation of the Bayesian evidence with normalizing flows* (2024);
Wirnsberger et al., *Targeted free energy estimation via learned mappings* (2020); Albergo, Kanwar,
Shanahan, *Flow-based generative models for Markov chain Monte Carlo in lattice field theory*
(2019).
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import bijectors as bj
from jflow import distributions, energy, flows, losses, nets, solvers, train
from jflow.types import Field

LOG_Z, LOG_ODDS = 10.29348, np.log(0.155693 / 0.844307)  # of the double well, by quadrature


def trained(loss, params, steps, rate, batches=lambda key: {}, key=None, labels=None):
    """Adam with a cosine, all steps in one scan; batches: key -> batch."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(rate, steps))
    )
    if labels is not None:  # a rate of its own for log Z
        optimizer = optax.partition({"own": optax.adam(0.1), "rest": optimizer}, labels)
    step = train.make_step(loss, optimizer)

    def once(state, key):
        return step(state, batches(key))[0], None

    key_state, key_steps = jax.random.split(jax.random.key(0) if key is None else key)
    state = train.init_state(params, optimizer, key_state)
    return jax.lax.scan(once, state, jax.random.split(key_steps, steps))[0].params


# ---- a double well: flows with and without layers of Markov chains at equal blocks


def between(power):
    """The mixture in the exponent of the base and the double well."""
    target = energy.double_well().log_density
    return lambda x: power * target(x) - (1 - power) * 0.5 * jnp.sum(jnp.square(x), axis=-1)


def block(univariate):
    """A coupling for either half, which starts at the identity."""
    coupled = partial(bj.coupling, univariate, nets.MLP((32, 32)), split=1)
    return bj.chain(coupled(), bj.reverse(), coupled(), bj.reverse())


def layers(univariate, chain, blocks=3):
    """Blocks, each followed by steps of a chain towards the target."""
    if chain is None:
        return bj.scan(block(univariate), blocks)
    powers = jnp.arange(1, blocks + 1) / blocks
    return bj.scan(
        lambda power: bj.chain(block(univariate), chain(between(power))), blocks, xs=powers
    )


def metropolis(log_density):
    return bj.metropolis(log_density, 0.25, repeats=20)


def hamiltonian(log_density):
    return bj.hamiltonian(log_density, 0.1, num_steps=5, repeats=4)


AFFINE, SPLINE = bj.univariate.affine(), bj.univariate.rational_quadratic()
CHAINS = {
    "affine couplings": (AFFINE, None),
    "affine + Metropolis": (AFFINE, metropolis),
    "affine + Hamiltonian": (AFFINE, hamiltonian),
    "splines": (SPLINE, None),
    "splines + Metropolis": (SPLINE, metropolis),
}


def double_well(args):
    """Trained on half the energy, half even data: as many draws of either well."""
    runs, steps, draws = (2, 20, 256) if args.short else (10, 800, 20_000)
    target, base = energy.double_well(), distributions.normal((2,))
    data = target.sample(jax.random.key(9), 20_000)
    sides = [data[data[:, 0] < 0], data[data[:, 0] > 0]]

    def even(key):
        keys = jax.random.split(key)
        return {
            "x": jnp.concatenate(
                [jax.random.choice(k, side, (64,)) for k, side in zip(keys, sides, strict=True)]
            )
        }

    pictured = {}
    print("| flow | bias | std | raw | reweighted | log Z error | ESS |")
    print("|---|---|---|---|---|---|---|")
    for name, (univariate, chain) in [*CHAINS.items()][: 3 if args.short else 5]:
        transport = layers(univariate, chain)
        sample, model = flows.path_sampler(transport, base), flows.elbo_flow(transport, base)
        energy_loss = losses.reverse_kl(sample, target.log_density, draws=128)
        data_loss = losses.negative_elbo(model)

        def both(params, key, batch, frozen=None, losses=(energy_loss, data_loss)):
            keys = jax.random.split(key)
            of_energy, said = losses[0](params, keys[0], {})
            return of_energy + losses[1](params, keys[1], batch)[0], said

        def one(key, both=both, sample=sample, model=model):
            key_init, key_fit, key_draw = jax.random.split(key, 3)
            params = model.init(key_init, data[:8])
            params = trained(both, params, steps, 1e-3, even, key_fit)
            x, log_q = sample(params, key_draw, draws)
            return x, target.log_density(x) - log_q

        start = time.perf_counter()
        x, log_w = jax.device_get(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), runs)))
        left = x[..., 0] < 0
        w = np.exp(log_w - log_w.max(1, keepdims=True))
        raw = np.log(left.mean(1) / (1 - left.mean(1))) - LOG_ODDS
        weighted = (w * left).sum(1) / w.sum(1)
        weighted = np.log(weighted / (1 - weighted)) - LOG_ODDS
        log_z = np.log(w.mean(1)) + log_w.max(1) - LOG_Z
        ess = (w.sum(1) ** 2 / (w**2).sum(1)).mean() / draws
        cells = [abs(raw.mean()), raw.std(), np.hypot(raw.mean(), raw.std())]
        cells += [np.hypot(weighted.mean(), weighted.std()), np.sqrt((log_z**2).mean())]
        row = " | ".join(f"{cell:.3f}" for cell in cells)
        print(f"| {name} | {row} | {ess:.2f} |", flush=True)
        args.note(name, start)
        pictured[name] = x[0]
    if args.picture:
        draw(pictured, np.asarray(data), args.picture)


def draw(pictured, data, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(pictured), figsize=(2 * (1 + len(pictured)), 2.3))
    bins = np.linspace(-3, 3, 61), np.linspace(-3.5, 3.5, 61)
    for axis, (name, x) in zip(axes, {"target": data, **pictured}.items(), strict=True):
        counts, *_ = np.histogram2d(*x.T, bins=bins)
        axis.imshow(np.log1p(counts).T, origin="lower", cmap="magma")
        axis.set_title(name, fontsize=8)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


# ---- diffusion samplers: one rollout, four objectives


def diffusions(args):
    """log Z from the weights of 10,000 paths, over seeds."""
    seeds, steps, draws, grid = (1, 5, 100, 4) if args.short else (2, 500, 10_000, 25)
    net = jflow.velocity(nets.TimeMLP((32, 32), time_features=16))
    flow = Field(net.init, lambda *args, **kwargs: net.apply(*args, **kwargs)[:, 0])
    print("| target | objective | log Z error | ELBO - log Z | ESS |\n|---|---|---|---|---|")
    for title, target, noise in (
        ("double well", energy.double_well(), 2.0),
        ("many well, 4 dimensions", energy.many_well(4), 2.0),
    ):
        event = target.event_shape
        options = {"noise": noise, "grid": grid}
        drift = energy.langevin_drift(net, net, target.log_density)
        sample = solvers.diffusion_sampler(drift, event, **options)
        more = options | {"draws": 64, "exploration": 0.5}
        given = drift, target.log_density, event
        at = jnp.zeros((1, *event)), jnp.zeros(1)
        objectives = {
            "reverse KL (PIS)": (losses.reverse_kl(sample, target.log_density, draws=64), None),
            "log-variance (VarGrad)": (losses.diffusion_log_variance(*given, **more), None),
            "balance (TB)": (losses.diffusion_balance(*given, **more), "log_z"),
            "partial balance (DGFS)": (
                losses.diffusion_partial_balance(drift, flow, *given[1:], **more),
                "flow",
            ),
        }
        for name, (loss, other) in objectives.items():

            def one(key, loss=loss, other=other, sample=sample, drift=drift, target=target, at=at):
                keys, labels = jax.random.split(key, 4), None
                params = control = drift.init(keys[0], *at)
                if other == "log_z":
                    params, labels = {"log_z": jnp.zeros(())}, {"drift": "rest", "log_z": "own"}
                if other == "flow":
                    params = {"flow": flow.init(keys[1], *at)}
                if other:
                    params = {**params, "drift": control}
                params = trained(loss, params, steps, 5e-3, key=keys[2], labels=labels)
                x, log_q = sample(params["drift"] if other else params, keys[3], draws)
                return target.log_density(x) - log_q

            start, log_z = time.perf_counter(), target.log_z
            log_w = jax.device_get(
                jax.jit(partial(jax.lax.map, one))(jax.random.split(jax.random.key(2), seeds))
            )
            w = np.exp(log_w - log_w.max(1, keepdims=True))
            found = np.log(w.mean(1)) + log_w.max(1) - log_z
            ess = (w.sum(1) ** 2 / (w**2).sum(1)).mean() / draws
            print(
                f"| {title} | {name} | {found.mean():+.3f} +- {found.std():.3f} |"
                f" {log_w.mean() - log_z:.3f} | {ess:.2f} |",
                flush=True,
            )
            args.note(name, start)


# ---- evidence of eight schools


def eight_schools():
    """The noncentered model in (theta, mu, log tau): mu ~ N(0, 5^2), tau half Cauchy of scale 5."""
    y = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    logpdf = jax.scipy.stats.norm.logpdf

    def log_prior(x):
        log_tau = x[:, 9]
        cauchy = jnp.log(2 / (5 * jnp.pi)) - jnp.log1p(jnp.square(jnp.exp(log_tau) / 5)) + log_tau
        return logpdf(x[:, :8]).sum(-1) + logpdf(x[:, 8], 0, 5) + cauchy

    def log_likelihood(x):
        return logpdf(y, x[:, 8:9] + jnp.exp(x[:, 9:]) * x[:, :8], sigma).sum(-1)

    return energy.posterior(log_prior, log_likelihood, (10,), log_z=-31.3113)


def evidence(args):
    """20 chains, 10 of them to fit and 10 for the estimates."""
    seeds, kept, steps = (1, 50, 5) if args.short else (3, 2000, 1000)
    target = eight_schools()
    normal = distributions.normal((10,))
    flow, cool = (
        flows.neural_spline((10,), depth=3, hidden=(32,), base=base)
        for base in (normal, distributions.scaled(normal, 0.8**0.5))
    )
    loss = losses.nll(flow)

    @jax.jit
    def one(key):
        keys = jax.random.split(key, 6)
        start = jax.random.normal(keys[0], (20, 10))
        states, _ = energy.run_chains(
            energy.hamiltonian_kernel(0.35, 6), target, start, keys[1], kept + 300
        )
        chains = jnp.swapaxes(states[300:], 0, 1)
        by_normal = energy.evidence(target, chains, keys[2])
        fit = chains[:10].reshape(-1, 10)
        params = flow.init(keys[3], fit[:512])
        batches = lambda key: {"x": jax.random.choice(key, fit, (128,))}  # noqa: E731
        params = trained(loss, params, steps, 2e-3, batches, keys[4])
        by_flow = energy.evidence(target, chains[10:], keys[5], flow, params, concentrated=cool)
        return {"normal": by_normal, "spline flow": by_flow}

    start = time.perf_counter()
    found = jax.device_get([one(key) for key in jax.random.split(jax.random.key(3), seeds)])
    print("| q | estimator | log Z - exact, nats | stated error |\n|---|---|---|---|")
    for name in found[0]:
        for estimator in energy.Evidence._fields:
            values = np.array([getattr(run[name], estimator) for run in found])
            off = values[:, 0] - target.log_z
            print(
                f"| {name} | {estimator} | {off.mean():+.4f} +- {off.std():.4f} |"
                f" {values[:, 1].mean():.4f} |",
                flush=True,
            )
    args.note("evidence", start)


# ---- four particles between two temperatures


def particles(args):
    """DW4 from temperature 4 to 1: log Z_1 / Z_4 by weights, with and without a map."""
    draws, steps, batch = (64, 3, 16) if args.short else (2000, 300, 64)
    model = energy.double_well_particles()

    def at(beta):
        """At an inverse temperature, with the law of the centroid as it is."""

        def log_density(x):
            center = -0.5 * x.shape[1] * jnp.sum(jnp.square(jnp.mean(x, 1)), -1)
            return beta * (model.log_density(x) - center) + center

        return energy.Target(log_density, model.event_shape)

    def long_run(beta, key, n, kept):
        key_start, key_run = jax.random.split(key)
        start = 2 * jax.random.normal(key_start, (n, *model.event_shape))
        kernel = energy.hamiltonian_kernel(0.08, 10)
        states, _ = energy.run_chains(kernel, at(beta), start, key_run, kept + 10, thin=20)
        return states[10:].reshape(-1, *model.event_shape)

    # the reference: minus the mean energy, integrated over the inverse temperature
    nodes, weights = np.polynomial.legendre.leggauss(3 if args.short else 8)
    n, kept = (16, 2) if args.short else (250, 20)
    betas = jnp.asarray(0.625 + 0.375 * nodes, jnp.float32)

    @jax.jit
    def slopes(key):
        def one(given):
            x = long_run(*given, n, kept)
            value = at(1.0).log_density(x) - at(0.0).log_density(x)
            means = value.reshape(kept, n).mean(0)
            return means.mean(), means.std() / n**0.5

        return jax.lax.map(one, (betas, jax.random.split(key, len(nodes))))

    start = time.perf_counter()
    means, errors = jax.device_get(slopes(jax.random.key(4)))
    exact = 0.375 * np.sum(weights * means)
    spread = 0.375 * np.sqrt(np.sum((weights * errors) ** 2))
    args.note("reference", start)
    hot, cold = at(0.25).log_density, at(1.0).log_density
    net = nets.PairVelocity((32, 32), reach=8.0, radial_features=20)
    flow = flows.cnf(jflow.velocity(net), distributions.normal(model.event_shape), method=6)
    loss = losses.transfer(flow, hot, cold)

    @jax.jit
    def one(key):
        keys = jax.random.split(key, 4)
        x = long_run(0.25, keys[0], *((16, 8) if args.short else (300, 20)))
        x, fit = x[:draws], x[draws:]
        fit = x if len(fit) == 0 else fit
        batches = lambda key: {"x": jax.random.choice(key, fit, (batch,))}  # noqa: E731
        params = flow.init(keys[1], fit[:1])
        plain = cold(x) - hot(x)
        params = trained(loss, params, steps, 2e-3, batches, keys[2])
        _, mapped = energy.transfer_weights(flow, params, x, hot, cold)
        return {"no map": plain, "equivariant flow": mapped}

    found = jax.device_get(one(jax.random.key(5)))
    print(f"log Z_1 / Z_4 = {exact:.4f} +- {spread:.4f} by thermodynamic integration")
    print("| map | log Z_1 / Z_4 | difference | mean log w - reference | ESS |")
    print("|---|---|---|---|---|")
    for name, log_w in found.items():
        log_z, error = energy.estimate_log_z(jnp.asarray(log_w))
        ess = float(energy.effective_sample_size(jnp.asarray(log_w))) / len(log_w)
        print(
            f"| {name} | {log_z:.4f} +- {error:.4f} | {log_z - exact:+.4f} |"
            f" {log_w.mean() - exact:.4f} | {ess:.3f} |"
        )
    args.note("particles", start)


# ---- a field on a lattice: flow proposals beside Hamiltonian transitions


def autocorrelation_time(series):
    """1/2 + the sum of the autocorrelations of [steps, chains], up to five times itself."""
    x, n = series - series.mean(), len(series)
    power = np.abs(np.fft.rfft(x, 2 * n, axis=0)) ** 2
    covariance = np.fft.irfft(power, axis=0)[:n].mean(1) / (n - np.arange(n))
    times = 0.5 + np.cumsum(covariance[1:] / covariance[0])
    return times[np.argmax(np.arange(1, n) >= 5 * times)]


def lattice(args):
    """phi^4 on 6 x 6 sites: 100 chains of 2000 states from draws of the flow."""
    steps, chains, kept, depth = (5, 8, 50, 2) if args.short else (4000, 100, 2000, 16)
    target = energy.phi4((6, 6), mass_squared=-4.0, coupling=6.975)
    flow = flows.real_nvp((6, 6), depth=depth, hidden=(64, 64), standardize=False)
    keys = jax.random.split(jax.random.key(6), 4)
    start = time.perf_counter()
    params = flow.init(keys[0], jnp.zeros((2, 6, 6)))
    loss = losses.path_gradient(flow, target.log_density, draws=128)
    params = jax.jit(lambda params, key: trained(loss, params, steps, 1e-3, key=key))(
        params, keys[1]
    )
    draw = jax.jit(flow.sample_and_log_prob, static_argnums=2)
    x, log_q = draw(params, keys[2], 20 * chains)
    weights = target.log_density(x) - log_q
    log_z, error = energy.estimate_log_z(weights)
    share = energy.effective_sample_size(weights) / len(weights)
    print(f"the flow: ESS {share:.2f}, log Z {log_z:.3f} +- {error:.3f}")
    args.note("the flow", start)
    jumps = energy.independence_kernel(flow, params)
    local = energy.hamiltonian_kernel(0.1, 10)
    print("| transition | accepted | time of M^2 | time of the action | M^2 | gradients |")
    print("|---|---|---|---|---|---|")
    for name, kernel, gradients in (
        ("flow proposals", jumps, 0),
        ("Hamiltonian, 10 steps", local, 11),
        ("one after the other", energy.successive_kernels(jumps, local), 11),
    ):
        start = time.perf_counter()

        @jax.jit
        def run(x, key, kernel=kernel):
            states, accepted = energy.run_chains(kernel, target, x, key, kept)
            squares = jnp.square(jnp.mean(states, axis=(2, 3)))
            return squares, jax.lax.map(target.log_density, states), accepted

        squares, action, accepted = jax.device_get(run(x[:chains], keys[3]))
        squares, action = (one[kept // 10 :].astype(np.float64) for one in (squares, action))
        error = squares.mean(0).std() / np.sqrt(chains)
        print(
            f"| {name} | {accepted.mean():.2f} | {autocorrelation_time(squares):.1f} |"
            f" {autocorrelation_time(action):.1f} | {squares.mean():.4f} +- {error:.4f} |"
            f" {gradients} |",
            flush=True,
        )
        args.note(name, start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tables = {f.__name__: f for f in (double_well, diffusions, evidence, particles, lattice)}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--short", action="store_true", help="seconds, for a trial")
    parser.add_argument("--seconds", action="store_true", help="say what each row took")
    parser.add_argument("--picture", help="a file for the picture of the double well")
    args = parser.parse_args()
    args.note = lambda name, start: (
        args.seconds and print(f"  {name}: {time.perf_counter() - start:.0f} s", flush=True)
    )
    tables[args.table](args)
