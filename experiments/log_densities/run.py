"""Flows that learn to draw from a log-density: log Z of known targets, and posteriors of
posteriordb beside their reference draws.

    python experiments/log_densities/run.py log_z --out runs/log_densities [--picture log_z.png]
    python experiments/log_densities/run.py posteriordb --out runs/log_densities --data-dir DATA

DATA holds posteriordb/ (or set JFLOW_DATA). About an hour each on two CPU cores, and for an ODE
(lynx_hare) as long again; --short shrinks both to seconds and needs no data: the field alone, and a
normal law for the posteriors. OUT keeps what each method found of each target with each seed, so
that a run goes on where it was cut off. Prints the tables of README.md beside this file. Needs the
extra `experiments`.

Methods: Rezende, Mohamed, *Variational Inference with Normalizing Flows* (2015); Roeder, Wu,
Duvenaud, *Sticking the Landing* (2017); Midgley, Stimper, Simm, Schoelkopf, Hernandez-Lobato, *Flow
Annealed Importance Sampling Bootstrap* (2023); Neal, *Annealed Importance Sampling* (1998).
"""

import argparse
import functools
import json
import math
import os
import re
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


MODES, FIELD = "forty modes", "phi^4, 4 x 4"
# name: target, spread of the start, step of the transitions, depth of the flow
TARGETS = {
    "double well": (energy.double_well(), 2.0, 0.15, 6),
    MODES: (energy.forty_gaussians(), 25.0, 1.0, 10),
    "many wells, 32": (energy.many_well(32), 2.0, 0.15, 6),
    FIELD: (energy.phi4((4, 4)), 1.0, 0.1, 6),
}


def lattice_log_z(rank=6):
    """log Z of `energy.phi4((4, 4))`, to 3e-6: the trace of a network of tensors.

    The factor exp(-(a - b)^2) of two neighbors is the product of two matrices of this rank, on a
    grid of values, once each of the four neighbors of a site carries a quarter of its potential.
    What remains to be summed is indices of bonds: a row of four sites is a matrix, Z = tr(row^4).
    """
    at = np.linspace(-4, 4, 601)
    part = (np.exp(4 * at**2 - 8 * at**4) * (at[1] - at[0])) ** 0.25
    bond = part[:, None] * np.exp(-np.square(at[:, None] - at)) * part
    values, vectors = np.linalg.eigh(bond)
    half = vectors[:, -rank:] * np.sqrt(values[-rank:])
    site = np.einsum("xu,xl,xd,xr->uldr", half, half, half, half, optimize=True)
    two = np.einsum("uldm,vmer->uvlder", site, site).reshape(rank**2, rank, rank**2, rank)
    row = np.einsum("uldm,vmel->uvde", two, two, optimize=True).reshape(rank**4, rank**4)
    return math.log(np.sum(np.square(row @ row)))  # of a symmetric matrix, tr(row^4)


def annealing(target, start, kernel, draws, levels):
    """(key -> (draws, log-weights), the evaluations of the target)."""

    @jax.jit
    def run(key):
        found = energy.annealed_importance_sampling(
            key, target, start, kernel, draws=draws, levels=levels
        )
        return found.x, found.log_weights

    return run, draws * levels * 7


def trained(method, target, start, kernel, depth, steps, draws):
    """The same of a flow that is trained first."""
    flow = make_flow(target.event_shape, depth)
    weigh = log_weights(flow, target, draws)
    train_flow, evaluations = fit(method, flow, target, kernel, steps)
    init = jax.jit(flow.init)

    def run(key):
        key_init, key_data, key_fit, key_draw = jax.random.split(key, 4)
        params = init(key_init, start.sample(key_data, 1000))
        return weigh(train_flow(params, key_fit), key_draw)

    return run, evaluations + draws


def kept(args, name, method, one):
    """Rows one(seed), from the files where they are there."""
    rows = []
    for seed in range(args.seeds):
        words = f"{args.part} {name} {method} {seed}".lower()
        path = args.out / (re.sub("[^a-z0-9]+", "-", words) + ".json")
        if not path.exists():
            clock = time.perf_counter()
            row = one(seed)
            path.write_text(json.dumps({**row, "seconds": time.perf_counter() - clock}))
        rows.append(json.loads(path.read_text()))
    return rows


def column(rows, key):
    return np.array([row[key] for row in rows])


def mean_and_error(values):
    """The mean over seeds and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return values.mean(), error


def log_z(args):
    steps, draws = (8, 256) if args.short else (2000, 20_000)
    print(
        "| target | method | log Z | error | in standard errors | effective share: mean, least |"
        " evaluations | seconds |\n|---|---|---|---|---|---|---|---|"
    )
    for name in args.only or ([FIELD] if args.short else TARGETS):
        target, std, size, depth = TARGETS[name]
        exact = target.log_z if target.log_z is not None else lattice_log_z()
        kernel = energy.hamiltonian_kernel(size, 3)
        start = normal_start(target.event_shape, std)
        levels = {
            "annealing, no flow": 8 if args.short else 512,
            "long annealing, no flow": 16 if args.short else 8192,
        }
        for method in args.methods or (*levels, *METHODS):
            if method in levels:
                made = annealing(target, start, kernel, draws // 10, levels[method])
            else:
                made = trained(method, target, start, kernel, depth, steps, draws)

            def one(seed, made=made, picture=f"{method}.npy" if name == MODES else None):
                x, weights = made[0](jax.random.key(seed))
                if seed == 0 and picture:
                    np.save(args.out / picture, x[:2000])
                log_z, _ = energy.estimate_log_z(weights)
                share = energy.effective_sample_size(weights) / len(weights)
                return {"log_z": float(log_z), "share": float(share), "evaluations": made[1]}

            rows = kept(args, name, method, one)
            off, error = mean_and_error(column(rows, "log_z") - exact)
            share = column(rows, "share")
            print(
                f"| {name} | {method} | {exact:.4f} | {off:+.4f} +- {error:.4f} |"
                f" {abs(off) / error:.1f} |"
                f" {share.mean():.2f}, {share.min():.2f} | {rows[0]['evaluations']:.1e} |"
                f" {np.median(column(rows, 'seconds')):.0f} |",
                flush=True,
            )
    if args.picture:
        draw_samples(args)


def draw_samples(args):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(10, 2.7))
    target = TARGETS[MODES][0]
    shown = {"exact draws": np.asarray(target.sample(jax.random.key(0), 2000))}
    shown |= {method: np.load(args.out / f"{method}.npy") for method in METHODS}
    for axis, (title, x) in zip(axes, shown.items(), strict=True):
        axis.plot(*x.T, ".", markersize=1.5, color="black", alpha=0.5)
        axis.set(title=title, xlim=(-50, 50), ylim=(-50, 50), xticks=[], yticks=[], aspect="equal")
    figure.tight_layout()
    figure.savefig(args.picture, dpi=90)


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
        return {
            name: energy.posteriordb(name, args.data_dir / "posteriordb")
            for name in args.only or NAMES
        }
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
        "| posterior | method | worst mean, in deviations | worst deviation | within 0.1 and 10% |"
        " effective share: mean, least | log Z | evaluations | seconds |"
        "\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, reference in read(args).items():

        @functools.cache
        def at_the_mode(target=reference.target):
            return whitened(target, likely(target), 20 if args.short else 200)

        def make(method, event_shape=reference.target.event_shape, at_the_mode=at_the_mode):
            target, start = at_the_mode()[0], normal_start(event_shape, 1.0)
            kernel = energy.hamiltonian_kernel(0.4, 3)
            if method == "Laplace":

                @jax.jit
                def run(key):
                    y = start.sample(key, draws)
                    return y, target.log_density(y) - start.log_density(y)

                return run, draws
            if method == "annealing from it":
                return annealing(target, start, kernel, draws // 10, 32)
            return trained(method, target, start, kernel, 4, steps, draws)

        for method in args.methods or ("Laplace", "annealing from it", *METHODS[1:]):
            made = functools.cache(functools.partial(make, method))

            def one(seed, made=made, at_the_mode=at_the_mode, reference=reference):
                run, evaluations = made()
                y, weights = run(jax.random.key(seed))
                found = compare(reference, at_the_mode()[1](y), weights)
                return {**found, "evaluations": evaluations}

            print_posterior(name, method, kept(args, name, method, one))


def compare(reference, x, weights):
    """The worst mean and the worst deviation of weighted draws beside those of the reference."""
    values = np.asarray(reference.constrain(x), np.float64)
    w = np.asarray(weights, np.float64)
    w = np.where(np.isfinite(w) & np.isfinite(values).all(1), w, -np.inf)
    share = np.exp(w - w.max())
    share /= share.sum()
    values = np.where(share[:, None] > 0, values, 0)
    mean = share @ values
    std = np.sqrt(share @ np.square(values - mean))
    exact = reference.draws.mean(0), reference.draws.std(0)
    off, wide = np.abs(mean - exact[0]) / exact[1], std / exact[1] - 1
    return {
        "off": off.max(),
        "of": reference.names[off.argmax()],
        "wide": wide[np.abs(wide).argmax()],
        "share": 1 / np.square(share).sum() / len(w),
        "log_z": float(energy.estimate_log_z(jnp.asarray(w))[0]),
    }


def print_posterior(name, method, rows):
    off, wide, share = column(rows, "off"), column(rows, "wide"), column(rows, "share")
    worst = off.argmax()
    within = np.sum((off <= 0.1) & (np.abs(wide) <= 0.1))
    constant, error = mean_and_error(column(rows, "log_z"))
    print(
        f"| {name} | {method} | {off.mean():.3f}, {off[worst]:.3f} ({rows[worst]['of']}) |"
        f" {wide[np.abs(wide).argmax()]:+.1%} | {within} of {len(rows)} | {share.mean():.3f},"
        f" {share.min():.3f} | {constant:.3f} +- {error:.3f} |"
        f" {rows[0]['evaluations']:.1e} | {np.median(column(rows, 'seconds')):.0f} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["log_z", "posteriordb"])
    parser.add_argument("--short", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is found")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="these targets or posteriors")
    parser.add_argument("--methods", nargs="*", help="these methods")
    parser.add_argument("--picture", help="where to draw the forty modes")
    parser.add_argument("--data-dir", default=os.environ.get("JFLOW_DATA", ""), type=Path)
    args = parser.parse_args()
    if args.short:
        args.seeds = min(args.seeds, 2)
    args.out.mkdir(parents=True, exist_ok=True)
    {"log_z": log_z, "posteriordb": posteriordb}[args.part](args)


if __name__ == "__main__":
    main()
