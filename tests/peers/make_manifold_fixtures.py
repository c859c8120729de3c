"""Writes what geomstats computes for geodesics and distances, as small float64 arrays, so that the
tests need no geomstats.

    pip install geomstats "numpy<2.2"
    python tests/peers/make_manifold_fixtures.py

Written with geomstats 2.8.0.
"""

from pathlib import Path

import numpy as np
from geomstats.geometry.hyperboloid import Hyperboloid
from geomstats.geometry.hypersphere import Hypersphere
from geomstats.geometry.poincare_ball import PoincareBall
from geomstats.geometry.spd_matrices import (
    SPDAffineMetric,
    SPDLogEuclideanMetric,
    SPDMatrices,
)
from geomstats.geometry.special_orthogonal import SpecialOrthogonal
from geomstats.information_geometry.categorical import CategoricalDistributions

SPACES = {
    "sphere": Hypersphere(2),
    "hyperboloid": Hyperboloid(2),
    "poincare_ball": PoincareBall(2),
    "spd": SPDMatrices(2, equip=False),
    "spd_log_euclidean": SPDMatrices(2, equip=False),
    "so3": SpecialOrthogonal(3, point_type="matrix"),
    "simplex": CategoricalDistributions(2),
}
METRICS = {"spd": SPDAffineMetric, "spd_log_euclidean": SPDLogEuclideanMetric}


def main():
    np.random.seed(0)  # noqa: NPY002  geomstats draws from it
    rng = np.random.default_rng(1)
    out = {}
    for name, space in SPACES.items():
        if name in METRICS:
            space.equip_with_metric(METRICS[name])
        x, y = space.random_point(8), space.random_point(8)
        v = space.to_tangent(0.7 * rng.normal(size=x.shape), base_point=x)
        if name == "simplex":  # small enough to stay inside
            v = 0.1 * v * x.min(axis=1, keepdims=True)
            v = v - v.mean(axis=1, keepdims=True)
        if name == "poincare_ball":
            v = 0.2 * v
        found = {
            "x": x,
            "y": y,
            "v": v,
            "exp": space.metric.exp(v, x),
            "log": space.metric.log(y, x),
            "dist": space.metric.dist(x, y),
        }
        out |= {f"{name}.{part}": np.asarray(a, np.float64) for part, a in found.items()}
    np.savez_compressed(Path(__file__).with_name("manifolds.npz"), **out)


if __name__ == "__main__":
    main()
