"""Writes what normflows computes for planar and radial flows, as small float64 arrays, so that the
tests need no torch.

Run once, in an environment that has the extra `peers`, and commit the result:

    pip install torch normflows
    python tests/peers/make_residual_fixtures.py

Written with torch 2.13.0, normflows 1.7.3. The parameters saved are those of the maps themselves,
constraints applied.
"""

from pathlib import Path

import numpy as np
import torch
from normflows.flows import Planar, Radial

torch.set_default_dtype(torch.float64)
HERE = Path(__file__).parent


def run(flow, z):
    with torch.no_grad():
        x, log_det = flow(torch.tensor(z))
    return x.numpy(), log_det.numpy()


def main():
    rng = np.random.default_rng(0)
    z = 2 * rng.normal(size=(9, 3))
    u, w = torch.tensor(rng.normal(size=(2, 1, 3)))
    planar = Planar((3,), u=u, w=w, b=torch.tensor([0.3]))
    inner = torch.sum(w * u)
    held = u + (torch.nn.functional.softplus(inner) - 1 - inner) * w / torch.sum(w**2)
    arrays = {
        "z": z,
        "planar_u": held[0].numpy(),
        "planar_w": w[0].numpy(),
        "planar_b": np.array(0.3),
    }
    arrays |= dict(zip(("planar_x", "planar_log_det"), run(planar, z), strict=True))
    torch.manual_seed(0)
    radial = Radial((3,), z_0=torch.tensor(rng.normal(size=(1, 3))))
    alpha = torch.abs(radial.alpha.detach())
    beta = torch.nn.functional.softplus(radial.beta.detach()) - alpha
    arrays |= {"radial_center": radial.z_0[0].detach().numpy(), "radial_alpha": alpha[0].numpy()}
    arrays |= {"radial_beta": beta[0].numpy()}
    arrays |= dict(zip(("radial_x", "radial_log_det"), run(radial, z), strict=True))
    np.savez_compressed(HERE / "residual.npz", **arrays)


if __name__ == "__main__":
    main()
