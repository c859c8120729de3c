r"""torchcfm's loop for `run.py`: one training, one JSON line; run by the Python of an environment
with torch and torchcfm.

    TORCH_PYTHON experiments/gaussians_to_moons/torchcfm_run.py --coupling exact --seed 0 \
        --points points.npz --out made.npz

Data, network, optimizer and batch are those of run.py. torchcfm's own helper draws the eight
Gaussians in a Python loop over rows; here they are drawn at once, so that the clock measures the
training.
"""

import argparse
import json
import math
import sys
import time

import numpy as np

try:
    import torch
    from torchcfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.models import MLP
    from torchcfm.optimal_transport import OTPlanSampler
except ImportError as error:
    sys.exit(
        f"{error}: this script needs torch, POT and torchcfm (pip install torch pot; pip install"
        " --no-deps torchcfm)"
    )


def gaussians(n: int, variance: float):
    angle = torch.randint(0, 8, (n,)) * (math.pi / 4)
    return 5 * torch.stack([torch.cos(angle), torch.sin(angle)], 1) + math.sqrt(
        variance
    ) * torch.randn(n, 2)


def moons(n: int):
    label, angle = torch.randint(0, 2, (n,)), math.pi * torch.rand(n)
    upper = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    lower = torch.stack([1 - torch.cos(angle), 0.5 - torch.sin(angle)], 1)
    return 3 * (torch.where(label[:, None] == 0, upper, lower) + 0.2 * torch.randn(n, 2)) - 1


def matcher(coupling: str):
    if coupling == "independent":
        return ConditionalFlowMatcher(sigma=0.0)
    found = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    if coupling == "sinkhorn":
        found.ot_sampler = OTPlanSampler(
            method="sinkhorn", reg=0.35
        )  # 0.01 of the mean cost, as run.py's
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coupling", choices=["independent", "exact", "sinkhorn"], required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--variance", type=float, default=0.1)
    parser.add_argument("--points", required=True, help="npz with the sources 'x0' to sample from")
    parser.add_argument(
        "--out", required=True, help="npz for the samples, one array for each number of Euler steps"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of torch; one is the fastest for a network this small",
    )
    parser.add_argument("--euler", type=int, nargs="+", default=[1, 4, 100])
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002, torchcfm draws from the plan with it
    model, flow = MLP(dim=2, time_varying=True), matcher(args.coupling)
    optimizer = torch.optim.Adam(model.parameters())
    start = time.perf_counter()
    for _ in range(args.steps):
        optimizer.zero_grad()
        t, x_t, u_t = flow.sample_location_and_conditional_flow(
            gaussians(args.batch, args.variance), moons(args.batch)
        )
        loss = torch.mean((model(torch.cat([x_t, t[:, None]], dim=-1)) - u_t) ** 2)
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start

    samples = {}
    with torch.no_grad():
        for steps in args.euler:
            x = torch.from_numpy(np.load(args.points)["x0"]).float()
            for k in range(steps):
                x = x + model(torch.cat([x, torch.full((len(x), 1), k / steps)], dim=-1)) / steps
            samples[str(steps)] = x.numpy()
    np.savez(args.out, **samples)
    print(json.dumps({"seconds": seconds, "loss": float(loss.detach())}))


if __name__ == "__main__":
    main()
