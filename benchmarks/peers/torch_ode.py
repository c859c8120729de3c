"""The torch side of ode_sampling.py: answers requests on stdin, a JSON line each, with the seconds
that sampling took.

    TORCH_PYTHON benchmarks/peers/torch_ode.py --weights weights.npz

A request: {"library": "torchdiffeq" or "flow_matching", "method": "euler", "midpoint" or "rk4",
"steps": n, "out": a file for the samples, optional}. torchcfm has no sampler of its own: its
examples call torchdiffeq.
"""

import argparse
import json
import sys
import time

import numpy as np

try:
    import torch
    from flow_matching.solver import ODESolver
    from flow_matching.utils import ModelWrapper
    from torchdiffeq import odeint
except ImportError as error:
    sys.exit(f"{error}: this script needs torch, torchdiffeq and flow_matching (pip install them)")


class Net(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        layers = []
        for i in range(sum(name.startswith("w") for name in weights.files)):
            w, b = weights[f"w{i}"], weights[f"b{i}"]
            linear = torch.nn.Linear(*w.shape)
            linear.weight.data, linear.bias.data = torch.from_numpy(w.T.copy()), torch.from_numpy(b)
            layers += [torch.nn.SELU(), linear] if layers else [linear]
        self.net = torch.nn.Sequential(*layers)

    def forward(self, t, x):
        return self.net(torch.cat([x, t.expand(len(x), 1)], dim=1))


class Wrapped(ModelWrapper):
    def forward(self, x, t, **extras):
        return self.model(t, x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--weights", required=True, help="npz: w0, b0, w1, ... and x0, where to start"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = np.load(args.weights)
    net = Net(weights).to(device).eval()
    solver, x0 = ODESolver(velocity_model=Wrapped(net)), torch.from_numpy(weights["x0"]).to(device)

    def sample(library, method, steps):
        grid = torch.linspace(0, 1, steps + 1, device=device)
        start = time.perf_counter()
        with torch.no_grad():
            if library == "torchdiffeq":
                x = odeint(net, x0, grid[[0, -1]], method=method, options={"step_size": 1 / steps})[
                    -1
                ]
            else:
                x = solver.sample(x0, step_size=None, method=method, time_grid=grid)
        x = x.cpu().numpy()
        return x, time.perf_counter() - start

    def best_of_three(threads):
        torch.set_num_threads(threads)
        return min(sample("torchdiffeq", "euler", 50)[1] for _ in range(3))

    torch.set_num_threads(min({1, args.threads}, key=best_of_three))
    for line in sys.stdin:
        request = json.loads(line)
        out = request.pop("out", None)
        x, seconds = sample(**request)
        if out is not None:
            np.save(out, x)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
