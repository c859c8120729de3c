"""Writes what geoopt computes for geodesics and distances, as small float64 arrays, so that the
tests need no geoopt: in other dimensions than those of make_manifold_fixtures.py, where matrices
are not 2 by 2, and of a product.

    pip install torch geoopt
    python tests/peers/make_geoopt_fixtures.py

Written with geoopt 0.5.1 and torch 2.13.0.
"""

from pathlib import Path

import geoopt
import numpy as np
import torch

N = 8


def sphere(rng, dim):
    x = rng.normal(size=(N, dim + 1))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def hyperboloid(rng, dim):
    x = rng.normal(size=(N, dim))
    return np.concatenate([np.sqrt(1 + np.sum(x**2, 1, keepdims=True)), x], axis=1)


def ball(rng, dim):
    return 0.8 * rng.uniform(size=(N, 1)) * sphere(rng, dim - 1)


def positive(rng, dim):
    a = rng.normal(size=(N, dim, dim))
    return a @ a.swapaxes(1, 2) + 0.1 * np.eye(dim)


SPACES = {  # the manifold, and points of it
    "sphere": (geoopt.Sphere(), lambda rng: sphere(rng, 4)),
    "hyperboloid": (geoopt.Lorentz(), lambda rng: hyperboloid(rng, 3)),
    "poincare_ball": (geoopt.PoincareBall(), lambda rng: ball(rng, 3)),
    "spd": (geoopt.SymmetricPositiveDefinite(), lambda rng: positive(rng, 3)),
    "product": (
        geoopt.ProductManifold((geoopt.Sphere(), 4), (geoopt.PoincareBall(), 2)),
        lambda rng: np.concatenate([sphere(rng, 3), ball(rng, 2)], axis=1),
    ),
}


def main():
    rng, out = np.random.default_rng(0), {}
    for name, (space, draw) in SPACES.items():
        x, y = torch.tensor(draw(rng)), torch.tensor(draw(rng))
        v = space.proju(x, torch.tensor(0.5 * rng.normal(size=x.shape)))
        found = {
            "x": x,
            "y": y,
            "v": v,
            "exp": space.expmap(x, v),
            "log": space.logmap(x, y),
            "dist": space.dist(x, y),
        }
        out |= {f"{name}.{part}": np.asarray(a, np.float64) for part, a in found.items()}
    np.savez_compressed(Path(__file__).with_name("geoopt.npz"), **out)


if __name__ == "__main__":
    main()
