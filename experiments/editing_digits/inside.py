r"""Digits edited into another class inside a network: by what its attention saw of the source.

    python experiments/editing_digits/inside.py --out runs/inside  # 2.3 minutes of CPU time
    python experiments/editing_digits/inside.py --out runs/short --short  # CI

A DiT of 16 patches is trained on scikit-learn's digits as in run.py, and the same held-out digits
are edited into the same classes: by RF-Edit (values of attention shared with the inversion), ReFlex
(weights of attention adapted, its outputs shared, a mask) and FluxSpace (outputs of attention, or
the embedding of the class, shifted), and by inversion alone. Prints the table of run.py and draws
OUT/inside.png. README.md has the results.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from run import NULL, draw, judged, sources, trained

from jflow import data, nets, solvers, steering

STEPS = 20  # of the samplers, each way


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and picture")
    parser.add_argument("--steps", type=int, default=1500, help="updates of the training")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate, falling to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--short", action="store_true", help="20 steps of a narrow network: numbers mean nothing"
    )
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.depth = 20, 16, 2
    args.out.mkdir(parents=True, exist_ok=True)
    splits = data.digits()
    net = nets.DiT(2, width=args.width, num_layers=args.depth, num_heads=4, num_classes=NULL)
    velocity, params = trained(net, splits, args)
    x, old, new = sources(splits, 20 if args.short else None)
    edited = edit_all(net, velocity, params, x, old, new, args)
    table = judged(edited, splits, x, new)
    (args.out / "results.json").write_text(json.dumps(table))
    draw(edited, x, new, args.out / "inside.png")


def edit_all(net, velocity, params, x, old, new, args):
    """{name: (edited digits, evaluations of the velocity)}."""
    x0 = jax.random.normal(jax.random.key(args.seed + 1), x.shape)
    method = solvers.fixed(STEPS, steering.rf_solver())
    lower = np.arange(8)[:, None, None] >= 4  # of the pixels
    null = jnp.full_like(new, NULL)
    both = {"features": ["blocks:attended"], "until": 0.6}

    def inverted():
        return steering.edit_by_inversion(velocity, params, x, old, new, method=method)

    def shared(until):
        return steering.rf_edit(
            net, params, x, old, new, sites=["blocks:v"], steps=STEPS, until=until
        )

    def adapted(**options):
        mixed = steering.adapted_weights(0, top=3)
        given = {"weights": ["blocks:weights"], "combine": mixed, "steps": 2 * STEPS} | options
        return steering.reflex(net, params, x, old, new, **given)

    def shifted(site, scale):
        noise = solvers.sample(velocity, params, x, old, method=method, t0=1, t1=0)[0]
        shifting = steering.fluxspace(net, [site], scale)
        cond = steering.EditCondition(old, new, null)
        return solvers.sample(shifting, params, noise, cond, method=method)[0]

    n = 2 * STEPS  # evaluations one way
    methods = {
        "fresh sample of the new class": (
            lambda: solvers.sample(velocity, params, x0, new, method=method)[0],
            n,
        ),
        "inversion, RF-Solver": (inverted, 2 * n),
        "RF-Edit, values, t < 0.3": (lambda: shared(0.3), 2 * n),
        "RF-Edit, values, t < 0.8": (lambda: shared(0.8), 2 * n),
        "ReFlex, weights, t < 0.25": (adapted, 2 * n + n // 4),
        "ReFlex, and outputs, t < 0.6": (lambda: adapted(**both), 2 * n + 3 * n // 5),
        "ReFlex, lower half alone": (
            lambda: adapted(mask=lower, blend_until=1.0),
            2 * n + n // 4,
        ),
        "FluxSpace, outputs": (lambda: shifted("blocks:attended", 6.0), 4 * n),
        "FluxSpace, embedding": (lambda: shifted("embed", 2.0), 4 * n),
    }
    return {name: (np.asarray(jax.jit(run)()), count) for name, (run, count) in methods.items()}


if __name__ == "__main__":
    main()
