"""A Ramachandran plot: the test data, the density of a trained flow, and its samples.

python experiments/torsions/picture.py runs/gln --out ramachandran.png
"""

import argparse

import jax
import matplotlib
import numpy as np

import jflow
from jflow import manifolds, solvers

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir")
    parser.add_argument("--out", default="ramachandran.png")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--grid", type=int, default=64, help="points of the density a side")
    parser.add_argument("--method", type=int, default=50, help="steps of the solver of the density")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loaded = jflow.load(args.workdir)
    test = loaded.experiment.data().test["x"][: args.rows]
    drawn = loaded.experiment.sample(loaded.params, jax.random.key(args.seed), args.rows)["x"]
    ends = np.linspace(-np.pi, np.pi, args.grid + 1)
    middle = (ends[1:] + ends[:-1]) / 2
    panels = [("test data", test), ("samples", np.asarray(drawn))]
    if test.shape[1] == 2:
        phi, psi = np.meshgrid(middle, middle)
        at = np.stack([phi.ravel(), psi.ravel()], 1).astype(np.float32)
        volume = manifolds.torus(2).log_volume
        log_prob = jax.jit(
            lambda params, x: solvers.log_prob(
                loaded.model, params, x, lambda x: 0 * x[:, 0] - volume, method=args.method
            )[0]
        )
        panels.insert(
            1, ("log-density", np.asarray(log_prob(loaded.params, at)).reshape(phi.shape))
        )
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), squeeze=False)
    for axis, (title, what) in zip(axes[0], panels, strict=True):
        if title == "log-density":
            degrees = np.degrees(ends)
            axis.pcolormesh(degrees, degrees, np.maximum(what, -8), cmap="viridis", rasterized=True)
        else:
            axis.scatter(*np.degrees(what[:, :2]).T, s=1.5, lw=0, alpha=0.6, rasterized=True)
        axis.set(title=title, xlabel="phi (degrees)", xlim=(-180, 180), ylim=(-180, 180))
        axis.set(xticks=(-180, 0, 180), yticks=(-180, 0, 180), aspect="equal")
    axes[0, 0].set_ylabel("psi (degrees)")
    figure.tight_layout()
    figure.savefig(args.out, dpi=75)
    print(args.out)


if __name__ == "__main__":
    main()
