"""Flows that learn to draw from a log-density: log Z of known targets, and posteriors of
posteriordb beside their reference draws.

    python experiments/log_densities/run.py log_z [--picture log_z.png]
    python experiments/log_densities/run.py posteriordb --data-dir DATA/posteriordb

Minutes each on two CPU cores; --short shrinks both to seconds and needs no data: the double well
alone, and a normal law for the posteriors. Prints the tables of README.md beside this file. Needs
the extra `experiments`.

Methods: Rezende, Mohamed, *Variational Inference with Normalizing Flows* (2015); Roeder, Wu,
Duvenaud, *Sticking the Landing* (2017); Midgley, Stimper, Simm, Schoelkopf, Hernandez-Lobato, *Flow
Annealed Importance Sampling Bootstrap* (2023); Neal, *Annealed Importance Sampling* (1998).
"""

import argparse
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jflow import distributions, energy, flows, losses, train

DRAWS = 128  # a gradient
METHODS = ("reverse KL", "path gradient", "annealed bootstrap")


def make_flow(event_shape, depth):
    return flows.neural_spline(event_shape, depth=depth, hidden=(32, 32), bins=8)


def fit(method, flow, target, kernel, steps, rate=2e-3):
    """((params, key) -> params after so many updates, in one compiled scan; the evaluations of the
    target)."""
    optimizer = optax.chain(
        optax.zero_nans(),
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(rate, steps)),
    )
    if method == "annealed bootstrap":
        return _bootstrap(flow, target, kernel, steps, optimizer)
    make = losses.reverse_kl if method == "reverse KL" else losses.path_gradient
    step = train.make_step(make(flow, target.log_density, draws=DRAWS), optimizer)

    @jax.jit
    def run(params, key):
        state = train.init_state(params, optimizer, key)
        return jax.lax.scan(lambda s, _: (step(s, {})[0], None), state, length=steps)[0].params

    return run, steps * DRAWS


def _bootstrap(flow, target, kernel, steps, optimizer):
    """Draws annealed in two levels to p^2 / q, four updates on rows of a buffer after each."""
    levels, updates = 2, 4
    draw = energy.annealed_draws(flow, target, kernel, draws=DRAWS, levels=levels)
    step = train.make_step(losses.nll(flow), optimizer)

    def update(carry, key):
        state, replay = carry
        replay, batch = energy.draw_replay(flow, replay, state.params, key, DRAWS)
        return (step(state, batch)[0], replay), None

    def round_of(carry, key):
        key_draw, *keys = jax.random.split(key, updates + 1)
        state, replay = carry
        replay = energy.add_draws(replay, draw(state.params, key_draw))
        return jax.lax.scan(update, (state, replay), jnp.stack(keys))[0], None

    rounds = steps // updates

    @jax.jit
    def run(params, key):
        key_state, key_rounds = jax.random.split(key)
        state = train.init_state(params, optimizer, key_state)
        replay = energy.empty_replay(target.event_shape, 32 * DRAWS)
        keys = jax.random.split(key_rounds, rounds)
        return jax.lax.scan(round_of, (state, replay), keys)[0][0].params

    # a level: its weight, and a transition of three leapfrog steps: four gradients, two values
    return run, rounds * DRAWS * levels * 7


def log_weights(flow, target, n):
    """(params, key) -> (draws [n], log-weights [n]), compiled."""

    def run(params, key):
        x, log_q = flow.sample_and_log_prob(params, key, n)
        return x, target.log_density(x) - log_q

    return jax.jit(run)


def normal_start(event_shape, std):
    """The normal law at which annealing starts that has no flow."""
    base = distributions.scaled(distributions.normal(event_shape), std)
    return energy.as_target(base, {}, event_shape)


# name: target, spread of the start, step of the transitions, depth of the flow
TARGETS = {
    "double well": (energy.double_well(), 2.0, 0.15, 6),
    "forty modes": (energy.forty_gaussians(), 25.0, 1.0, 10),
    "many wells, 32": (energy.many_well(32), 2.0, 0.15, 6),
    "phi^4, 4 x 4": (energy.phi4((4, 4)), 1.0, 0.1, 6),
}


def log_z(args):
    steps, draws, seeds = (8, 256, 2) if args.short else (2000, 20_000, args.seeds)
    levels = 8 if args.short else 512
    print(
        "| target | method | log Z | error: mean, spread over seeds | effective share | "
        "evaluations | seconds |\n|---|---|---|---|---|---|---|"
    )
    fitted = {}
    for name in args.only or (["double well"] if args.short else TARGETS):
        target, std, size, depth = TARGETS[name]
        kernel = energy.hamiltonian_kernel(size, 3)
        start = normal_start(target.event_shape, std)
        n = draws // 10

        @jax.jit
        def anneal(key, target=target, start=start, kernel=kernel, n=n):
            return energy.annealed_importance_sampling(
                key, target, start, kernel, draws=n, levels=levels
            ).log_weights

        clock = time.perf_counter()
        runs = [anneal(jax.random.key(100 + seed)) for seed in range(seeds)]
        together, error = energy.estimate_log_z(jnp.concatenate(runs))
        exact = target.log_z if target.log_z is not None else float(together)
        seconds = (time.perf_counter() - clock) / seeds
        row(name, "annealing, no flow", runs, exact, n * levels * 7, seconds)
        if target.log_z is None:
            print(f"| {name} | all of it, the reference | {exact:.4f} +- {error:.4f} | | | | |")
        flow = make_flow(target.event_shape, depth)
        weigh = log_weights(flow, target, draws)
        for method in METHODS:
            clock, found = time.perf_counter(), []
            train_flow, evaluations = fit(method, flow, target, kernel, steps)
            for seed in range(seeds):
                key_init, key_data, key_fit, key_draw = jax.random.split(jax.random.key(seed), 4)
                params = jax.jit(flow.init)(key_init, start.sample(key_data, 1000))
                x, weights = weigh(train_flow(params, key_fit), key_draw)
                found.append(weights)
            seconds = (time.perf_counter() - clock) / seeds
            row(name, method, found, exact, evaluations, seconds)
            fitted[name, method] = np.asarray(x[:2000])
    if args.picture:
        draw_samples(fitted, args.picture)


def row(name, method, runs, exact, evaluations, seconds):
    errors = [float(energy.estimate_log_z(w)[0]) - exact for w in runs]
    shares = [float(energy.effective_sample_size(w)) / len(w) for w in runs]
    print(
        f"| {name} | {method} | {exact:.4f} | {np.mean(errors):+.4f}, {np.std(errors):.4f} |"
        f" {np.mean(shares):.2f} | {evaluations:.1e} | {seconds:.0f} |",
        flush=True,
    )


def draw_samples(fitted, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(10, 2.7))
    target = TARGETS["forty modes"][0]
    shown = {"exact draws": np.asarray(target.sample(jax.random.key(0), 2000))}
    shown |= {method: fitted["forty modes", method] for method in METHODS}
    for axis, (title, x) in zip(axes, shown.items(), strict=True):
        axis.plot(*x.T, ".", markersize=1.5, color="black", alpha=0.5)
        axis.set(title=title, xlim=(-50, 50), ylim=(-50, 50), xticks=[], yticks=[], aspect="equal")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def whitened(target, start, steps):
    """(the target of y, y -> x) for x = mode + L y, L L^T the inverse Hessian at the mode."""
    loss = lambda x: -target.log_density(x[None])[0]  # noqa: E731
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        x, state = carry
        value, slope = value_and_grad(x, state=state)
        updates, state = solver.update(slope, state, x, value=value, grad=slope, value_fn=loss)
        return (optax.apply_updates(x, updates), state), None

    @jax.jit
    def climb(x):
        (x, _), _ = jax.lax.scan(step, (x, solver.init(x)), length=steps)
        return x, jax.hessian(loss)(x)

    mode, hessian = (np.asarray(a, np.float64) for a in climb(start))
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    factor = jnp.asarray(vectors / np.sqrt(np.maximum(values, 1e-2)), jnp.float32)
    log_det = float(jnp.linalg.slogdet(factor)[1])
    to_x = lambda y: jnp.asarray(mode, jnp.float32)[None] + y @ factor.T  # noqa: E731
    return energy.Target(
        lambda y: target.log_density(to_x(y)) + log_det, target.event_shape, target.log_z
    ), to_x


def likely(target):
    """The best of 1000 draws of the prior, where there is one; 0 otherwise."""
    if target.prior is None:
        return jnp.zeros(target.event_shape)
    x = target.prior.sample(jax.random.key(4), 1000)
    return x[jnp.argmax(jnp.nan_to_num(target.log_density(x), nan=-jnp.inf))]


NAMES = ("arK", "eight_schools", "garch", "kidiq", "mixture", "lynx_hare")


def read(args):
    if not args.short:
        return {name: energy.posteriordb(name, args.data_dir) for name in args.only or NAMES}
    normal = distributions.multivariate_normal(2)
    params = {"mean": jnp.ones(2), "lower": jnp.eye(2, k=-1), "log_diagonal": jnp.zeros(2)}
    same = lambda x: x  # noqa: E731
    made_up = energy.ReferencePosterior(
        energy.as_target(normal, params, (2,)),
        ("a", "b"),
        same,
        same,
        np.asarray(normal.sample(params, jax.random.key(0), 1000)),
    )
    return {"made up": made_up}


def posteriordb(args):
    steps, draws = (8, 256) if args.short else (1500, 20_000)
    print(
        "| posterior | method | worst mean, in deviations | worst deviation | effective share | "
        "log Z | evaluations | seconds |\n|---|---|---|---|---|---|---|---|"
    )
    for name, one in read(args).items():
        clock = time.perf_counter()
        target, to_x = whitened(one.target, likely(one.target), 20 if args.short else 200)
        start = normal_start(target.event_shape, 1.0)
        y = start.sample(jax.random.key(5), draws)
        weights = jax.jit(lambda y, t=target, s=start: t.log_density(y) - s.log_density(y))(y)
        print_posterior(name, "Laplace", one, to_x(y), weights, draws, clock)

        clock, levels, kernel = time.perf_counter(), 32, energy.hamiltonian_kernel(0.4, 3)

        @jax.jit
        def anneal(key, target=target, start=start, kernel=kernel, levels=levels):
            return energy.annealed_importance_sampling(
                key, target, start, kernel, draws=draws // 10, levels=levels
            )

        found = anneal(jax.random.key(6))
        evaluations = draws // 10 * levels * 7
        print_posterior(
            name, "annealing from it", one, to_x(found.x), found.log_weights, evaluations, clock
        )
        flow = make_flow(target.event_shape, 4)
        weigh = log_weights(flow, target, draws)
        for method in METHODS[1:]:
            clock = time.perf_counter()
            key_init, key_fit, key_draw = jax.random.split(jax.random.key(0), 3)
            params = jax.jit(flow.init)(key_init, y[:1000])
            train_flow, evaluations = fit(method, flow, target, kernel, steps)
            y_flow, weights = weigh(train_flow(params, key_fit), key_draw)
            print_posterior(name, method, one, to_x(y_flow), weights, evaluations + draws, clock)


def print_posterior(name, method, one, x, weights, evaluations, clock):
    values = np.asarray(one.constrain(x), np.float64)
    w = np.asarray(weights, np.float64)
    w = np.where(np.isfinite(w) & np.isfinite(values).all(1), w, -np.inf)
    share = np.exp(w - w.max())
    share /= share.sum()
    values = np.where(share[:, None] > 0, values, 0)
    mean = share @ values
    std = np.sqrt(share @ np.square(values - mean))
    exact = one.draws.mean(0), one.draws.std(0)
    off = np.abs(mean - exact[0]) / exact[1]
    wide = std / exact[1] - 1
    constant, error = energy.estimate_log_z(jnp.asarray(w))
    print(
        f"| {name} | {method} | {off.max():.3f} ({one.names[off.argmax()]}) |"
        f" {wide[np.abs(wide).argmax()]:+.1%} | {1 / np.square(share).sum() / len(w):.3f} |"
        f" {constant:.3f} +- {error:.3f} | {evaluations:.1e} | {time.perf_counter() - clock:.0f} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["log_z", "posteriordb"])
    parser.add_argument("--short", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seeds", type=int, default=3, help="of each fit of log_z")
    parser.add_argument("--only", nargs="*", help="these targets or posteriors")
    parser.add_argument("--picture", help="where to draw the forty modes")
    parser.add_argument(
        "--data-dir", default=Path(os.environ.get("JFLOW_DATA", "")) / "posteriordb", type=Path
    )
    args = parser.parse_args()
    {"log_z": log_z, "posteriordb": posteriordb}[args.part](args)


if __name__ == "__main__":
    main()
