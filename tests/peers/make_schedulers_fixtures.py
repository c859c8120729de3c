"""Writes the steps of diffusers' flow schedulers, as small float64 arrays, so that the tests need
no torch.

Run once, in an environment that has the extra `peers`, and commit the result:

    pip install torch diffusers
    python tests/peers/make_schedulers_fixtures.py

Written with torch 2.13.0, diffusers 0.42.1. The schedulers' own grids are float32, and shifted:
every one is given the same float64 sigmas, 1 - t. They step from sigma to sigma with the velocity
noise - data, which is minus ours.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

torch.set_default_dtype(torch.float64)
HERE = Path(__file__).parent
GRID = np.array([0.04, 0.1, 0.23, 0.41, 0.55, 0.78, 0.9])


def run(scheduler, sigmas, matrix, x):
    """The state after each call of the scheduler."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
    scheduler.num_inference_steps = len(scheduler.timesteps)
    x, states = torch.tensor(x), []
    scheduler.set_begin_index(0)
    for sigma, t in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        velocity = torch.sin(x @ torch.tensor(matrix) + 2 * (1 - sigma))
        x = scheduler.step(-velocity, t, x, return_dict=False)[0]
        states.append(x.numpy())
    return np.stack(states)


def main():
    rng = np.random.default_rng(0)
    matrix, x = rng.normal(size=(3, 3)), rng.normal(size=(4, 3))
    sigmas = 1 - GRID
    twice = np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), sigmas[-1:]])
    arrays = {"grid": GRID, "matrix": matrix, "x": x}
    arrays["euler"] = run(FlowMatchEulerDiscreteScheduler(), sigmas, matrix, x)[-1]
    arrays["heun"] = run(FlowMatchHeunDiscreteScheduler(), twice, matrix, x)[1::2][
        -1
    ]  # its last step is Euler's
    flow = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "lower_order_final": False,
    }
    for order in (1, 2, 3):
        if order > 1:
            scheduler = DPMSolverMultistepScheduler(
                solver_order=order, final_sigmas_type="sigma_min", **flow
            )
            arrays[f"dpm_solver_pp_{order}"] = run(scheduler, sigmas, matrix, x)[-1]
        for name, disabled in (("unipc", []), ("unip", list(range(len(GRID))))):
            scheduler = UniPCMultistepScheduler(
                solver_order=order, disable_corrector=disabled, **flow
            )
            arrays[f"{name}_{order}"] = run(scheduler, sigmas, matrix, x)[-1]
    np.savez_compressed(HERE / "schedulers.npz", **arrays)
    for name, value in arrays.items():
        print(name, value.dtype, value.shape)


if __name__ == "__main__":
    main()
