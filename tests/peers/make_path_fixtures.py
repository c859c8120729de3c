"""Writes what flow_matching and diffusers compute for schedules, conversions, a change of schedule
and SD3's densities of time, as small float64 arrays, so that the tests need no torch.

    pip install torch flow_matching diffusers
    python tests/peers/make_path_fixtures.py

Written with torch 2.13.0, flow_matching 1.0.10 (called, never read or copied: its license is
non-commercial), diffusers 0.42.1. The network of the change of schedule is the exact velocity of
data N(MEAN, STD^2) on the trained schedule.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from flow_matching.path import AffineProbPath
from flow_matching.path.scheduler import (
    CondOTScheduler,
    CosineScheduler,
    LinearVPScheduler,
    PolynomialConvexScheduler,
    ScheduleTransformedModel,
    VPScheduler,
)
from flow_matching.utils import ModelWrapper

MEAN, STD = 1.5, 0.4
SCHEDULERS = {
    "linear": CondOTScheduler(),
    "polynomial": PolynomialConvexScheduler(n=2.5),
    "vp": VPScheduler(beta_min=0.1, beta_max=20.0),
    "linear_vp": LinearVPScheduler(),
    "cosine": CosineScheduler(),
}
PAIRS = [("linear", "cosine"), ("vp", "linear"), ("linear", "vp"), ("cosine", "linear_vp")]


class Exact(ModelWrapper):
    """The velocity of x_t = a x1 + s x0 for Gaussian data."""

    def __init__(self, scheduler):
        super().__init__(torch.nn.Identity())
        self.scheduler = scheduler

    def forward(self, x, t, **extras):
        now = self.scheduler(t)
        a, s, da, ds = now.alpha_t, now.sigma_t, now.d_alpha_t, now.d_sigma_t
        rate = (a * da * STD**2 + s * ds) / (a**2 * STD**2 + s**2)
        return da * MEAN + rate * (x - a * MEAN)


def main():
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)
    t, x, prediction = (
        torch.tensor(np.linspace(0.05, 0.95, 10)),
        *torch.tensor(rng.normal(size=(2, 10, 3))),
    )
    arrays = {"t": t, "x": x, "prediction": prediction}
    column = t[:, None]
    for name, scheduler in SCHEDULERS.items():
        now = scheduler(t)
        arrays[f"{name}/at"] = torch.stack([now.alpha_t, now.sigma_t, now.d_alpha_t, now.d_sigma_t])
        path = AffineProbPath(scheduler=scheduler)
        convert = {
            "x1_to_velocity": path.target_to_velocity(prediction, x, column),
            "x0_to_velocity": path.epsilon_to_velocity(prediction, x, column),
            "velocity_to_x1": path.velocity_to_target(prediction, x, column),
            "velocity_to_x0": path.velocity_to_epsilon(prediction, x, column),
            "x0_to_x1": path.epsilon_to_target(prediction, x, column),
            "x1_to_x0": path.target_to_epsilon(prediction, x, column),
        }
        arrays |= {f"{name}/{key}": value for key, value in convert.items()}
    for trained, new in PAIRS:
        model = ScheduleTransformedModel(
            Exact(SCHEDULERS[trained]), SCHEDULERS[trained], SCHEDULERS[new]
        )
        rows = [model(row[None], time) for row, time in zip(x, t, strict=True)]
        arrays[f"{trained}_to_{new}"] = torch.cat(rows)
    arrays["mode/u"] = torch.rand(16, generator=torch.Generator().manual_seed(0))
    for scale in (1.29, -0.8):
        arrays[f"mode/{scale}"] = compute_density_for_timestep_sampling(
            "mode", 16, mode_scale=scale, generator=torch.Generator().manual_seed(0)
        )
    arrays["cosmap/density"] = compute_loss_weighting_for_sd3("cosmap", sigmas=t)
    numpy = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("paths.npz"), **numpy)


main()
