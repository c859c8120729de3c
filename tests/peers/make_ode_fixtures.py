"""Writes what torchdiffeq computes for a small network, as float64 arrays, so that the tests need
no torch.

Run once, in an environment that has torch and torchdiffeq, and commit the result:

    pip install torch torchdiffeq
    python tests/peers/make_ode_fixtures.py

Written with torch 2.13.0, torchdiffeq 0.2.5. The divergence is the trace of torch's own Jacobian.
"""

from pathlib import Path

import numpy as np
import torch
from torchdiffeq import odeint, odeint_adjoint

torch.set_default_dtype(torch.float64)


class Net(torch.nn.Module):
    """v(x, t) = tanh([x, t] W0 + b0) W1 + b1, [b, 3] -> [b, 3]."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        shapes = {"w0": (4, 8), "b0": (8,), "w1": (8, 3), "b1": (3,)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.tensor(0.8 * rng.normal(size=shape))))

    def forward(self, t, x):
        h = torch.cat([x, t.expand(x.shape[0], 1)], dim=1)
        return torch.tanh(h @ self.w0 + self.b0) @ self.w1 + self.b1


class WithDivergence(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, state):
        x = state[0]
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        with torch.enable_grad():
            v = self.net(t, x)
            rows = [
                torch.autograd.grad(v[:, i].sum(), x, create_graph=True)[0][:, i]
                for i in range(x.shape[1])
            ]
        return v, sum(rows)


net = Net()
x = torch.tensor(np.random.default_rng(1).normal(size=(5, 3)))
up, down = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
grid = torch.linspace(0, 1, 9)
tight = {"rtol": 1e-11, "atol": 1e-11}
out = {name: p.detach().numpy() for name, p in net.named_parameters()} | {"x": x.numpy()}

with torch.no_grad():
    out["dopri5"] = odeint(net, x, up, method="dopri5", **tight)[-1].numpy()
    for method in ("euler", "midpoint"):
        out[method] = odeint(net, x, grid, method=method)[-1].numpy()

z, minus = odeint_adjoint(WithDivergence(net), (x, torch.zeros(5)), down, method="dopri5", **tight)
log_prob = -0.5 * (z[-1] ** 2).sum(1) - 1.5 * np.log(2 * np.pi) + minus[-1]
(-log_prob.mean()).backward()
out["log_prob"] = log_prob.detach().numpy()
for name, p in net.named_parameters():
    out[f"gradient_{name}"] = p.grad.numpy()
np.savez_compressed(Path(__file__).parent / "ode.npz", **out)
