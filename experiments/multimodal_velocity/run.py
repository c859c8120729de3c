"""Eight Gaussians in few evaluations: the mean velocity, a Gaussian mixture of velocities, and a
flow of velocities.

    python experiments/multimodal_velocity/run.py --out runs/multimodal  # minutes on two CPU cores
    # another seed, a folder of its own
    python experiments/multimodal_velocity/run.py --out runs/multimodal --seed 1
    # CI: a minute, numbers mean nothing
    python experiments/multimodal_velocity/run.py --out runs/short --short

Trains, for as many updates and with the same backbone, a rectified flow, GMFlow with 1 and with 8
components, and a hierarchical rectified flow of depth 2, from independent pairs and with the data
coupled by optimal transport. Prints the W2 to fresh data after 1, 2, 4 and 8 evaluations of the
network, for each way to sample. Run again after a kill it goes on where it was. Writes results.json
and samples.png. README.md has the results.
"""

import argparse
import functools
import json
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jflow
from jflow import couplings, data, losses, metrics, nets, solvers, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EVALUATIONS = (1, 2, 4, 8)
EULER, MIDPOINT = diffrax.Euler(), diffrax.Midpoint()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and results")
    parser.add_argument(
        "--steps", type=int, default=10_000, help="of every training, 256 rows each"
    )
    parser.add_argument("--rows", type=int, default=2000, help="that W2 is measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="shrink it to seconds")
    args = parser.parse_args()
    counts = EVALUATIONS
    if args.short:
        args.steps, args.rows, counts = 200, 256, (2,)
    out = args.out / str(args.seed)
    fit = functools.partial(trained, out, args.steps, args.seed)
    rows = jnp.asarray(data.eight_gaussians(100_000, 10 * args.seed + 1)["x"])
    fresh = data.eight_gaussians(args.rows, 10 * args.seed + 2)["x"]
    floor = metrics.wasserstein(data.eight_gaussians(args.rows, 10 * args.seed + 3)["x"], fresh)
    print(f"W2 of {args.rows} fresh rows: {floor:.3f}", flush=True)

    backbone = nets.ResidualMLP(width=64, num_blocks=2)
    plain = jflow.velocity(backbone)
    few, many = (jflow.field(nets.MixtureHead(backbone, components=k)) for k in (1, 8))
    coupled = losses.HierarchyLevel(coupling=couplings.optimal_transport()), losses.HierarchyLevel()
    params = {
        "rectified": fit("rectified", plain, losses.flow_matching(plain), rows),
        "mixture of 1": fit("mixture-1", few, losses.mixture_matching(few), rows),
        "mixture of 8": fit("mixture-8", many, losses.mixture_matching(many), rows),
        "hierarchy": fit("hierarchy", plain, losses.hierarchical_matching(plain), rows, depth=2),
        "hierarchy, coupled": fit(
            "coupled", plain, losses.hierarchical_matching(plain, coupled), rows, depth=2
        ),
    }

    def ode(solver, stages, name="rectified"):
        def draw(x, key, n):
            return solvers.sample(
                plain, params[name], x, method=solvers.fixed(n // stages, solver)
            )[0]

        return draw, stages

    def mixture(field, name, **options):
        return lambda x, key, n: solvers.gm_ode(
            field, params[name], x, steps=n, substeps=64 // n, **options
        )[0], 1

    def stochastic(x, key, n):
        return solvers.sample_sde(
            solvers.gm_sde(many), params["mixture of 8"], x, key, np.linspace(0, 1, n + 1)
        )[0]

    def nested(name, outer):
        def draw(x, key, n):
            return solvers.sample_hierarchy(plain, params[name], x, key, grids=(outer, n // outer))[
                0
            ]

        return draw, outer

    samplers = {
        "rectified flow, Euler": ode(EULER, 1),
        "rectified flow, midpoint": ode(MIDPOINT, 2),
        "GM-ODE, 1 component": mixture(few, "mixture of 1"),
        "GM-ODE": mixture(many, "mixture of 8"),
        "GM-ODE, second order": mixture(many, "mixture of 8", order=2),
        "GM-SDE": (stochastic, 1),
        "hierarchy, 1 outer step": nested("hierarchy", 1),
        "hierarchy, 2 outer steps": nested("hierarchy", 2),
        "coupled hierarchy, 1 outer step": nested("hierarchy, coupled", 1),
        "coupled hierarchy, 2 outer steps": nested("hierarchy, coupled", 2),
    }
    noise_key, key = jax.random.split(jax.random.key(args.seed + 100))
    noise, table, drawn = jax.random.normal(noise_key, (args.rows, 2)), {}, {}
    print(" " * 34 + "".join(f"{n:8d}" for n in counts))
    for name, (draw, least) in samplers.items():
        run = jax.jit(draw, static_argnums=2)
        drawn[name] = {n: np.asarray(run(noise, key, n)) for n in counts if n % least == 0}
        table[name] = {n: metrics.wasserstein(x, fresh) for n, x in drawn[name].items()}
        shown = "".join(
            f"{table[name][n]:8.3f}" if n in table[name] else "       -" for n in counts
        )
        print(f"{name:34s}{shown}", flush=True)

    (out / "results.json").write_text(
        json.dumps({"floor": floor, "W2 by evaluations": table}, indent=1)
    )
    picture(out / "samples.png", drawn, fresh)
    print(f"pictures and numbers: {out}")


def trained(out, steps, seed, name, network, loss, rows, depth=1):
    """The averaged params after `steps` updates; picks up a training that was killed."""
    x, t = jnp.zeros((2, 2)), jnp.zeros(2)
    cond = () if depth == 1 else (solvers.HierarchyCondition((x,), (t,)),)
    key, init_key = jax.random.split(jax.random.key(seed))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    )
    state = train.init_state(network.init(init_key, x, t, *cond), optimizer, key, ema=0.999)
    step = train.make_step(loss, optimizer, ema=0.999)
    batches = lambda state, key: {"x": rows[jax.random.randint(key, (256,), 0, len(rows))]}  # noqa: E731
    often = max(100, steps // 4)
    how = {
        "inner": 100,
        "log_every": often,
        "save_every": often,
        "max_to_keep": 1,
        "progress": False,
    }
    return train.fit(state, step, batches, steps=steps, workdir=out / name, **how).state.ema


def picture(path, drawn, fresh):
    """Samples by evaluations, a row of pictures for each way to sample, over fresh data."""
    figure, axes = plt.subplots(
        len(drawn), len(EVALUATIONS), figsize=(8, 2 * len(drawn)), squeeze=False
    )
    for row, (name, by_count) in zip(axes, drawn.items(), strict=True):
        for axis, n in zip(row, EVALUATIONS, strict=True):
            axis.set(xlim=(-7, 7), ylim=(-7, 7), xticks=[], yticks=[])
            axis.scatter(*fresh.T, s=1, color="0.85")
            if n in by_count:
                axis.scatter(*by_count[n].T, s=1, color="tab:red")
            axis.set_title(f"{name}: {n}", fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
