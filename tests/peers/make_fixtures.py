"""Writes what zuko and nflows compute, as small float64 arrays, so that the tests need no torch.

Run once, in an environment that has the extra `peers` (jflow itself and jax are not needed), and
commit the result:

    pip install torch zuko nflows
    python tests/peers/make_fixtures.py

Written with torch 2.13.0, zuko 1.6.0, nflows 0.14. The splines are compared on equal knots; the way
from raw parameters to knots is worked out here a second time, in numpy, from the description in
jflow/bijectors/splines.py.
"""

from pathlib import Path

import numpy as np
import torch
import zuko
from nflows.transforms import AffineCouplingTransform
from nflows.transforms.lu import LULinear
from nflows.transforms.splines.rational_quadratic import rational_quadratic_spline

torch.set_default_dtype(torch.float64)
HERE = Path(__file__).parent
BOUND, BINS = 5.0, 8
FLOOR, CAP, EDGE = 1e-3, 10.0, 0.1


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def inverse_softplus(y):
    return y + np.log(-np.expm1(-y))


def bin_sizes(raw):
    share = np.exp(raw - raw.max())
    return 2 * BOUND * (FLOOR + (1 - FLOOR * BINS) * share / share.sum())


def knots(raw):
    """One spline's knots x, y and slopes."""
    w, h = bin_sizes(raw[:BINS]), bin_sizes(raw[BINS : 2 * BINS])
    inner = h[1:-1].sum()
    for k in (0, -1):
        h[k] += EDGE * (w[k] - h[k])
    h[1:-1] *= (2 * BOUND - h[0] - h[-1]) / inner
    slopes = softplus(raw[2 * BINS :] + inverse_softplus(1 - FLOOR)) + FLOOR
    s = h / w
    slopes = [min(d, CAP * s[k], CAP * s[k + 1]) for k, d in enumerate(slopes)]
    along = [np.concatenate([[0.0], np.cumsum(sizes)]) - BOUND for sizes in (w, h)]
    return *along, np.array([1.0, *slopes, 1.0])


def with_zuko(xk, yk, slopes, x):
    """y, log slope and the inverse's x and log slope, all at the points x."""
    spline = zuko.transforms.MonotonicRQSTransform(
        torch.zeros(BINS), torch.zeros(BINS), torch.zeros(BINS - 1), BOUND
    )
    spline.horizontal, spline.vertical, spline.derivatives = (
        torch.tensor(a) for a in (xk, yk, slopes)
    )
    y, log_slope = spline.call_and_ladj(torch.tensor(x))
    back, back_log_slope = spline.inv.call_and_ladj(torch.tensor(x))
    return [a.numpy() for a in (y, log_slope, back, back_log_slope)]


def with_nflows(xk, yk, slopes, x):
    """The same; raw parameters that its softmax and softplus turn into the given knots, its own
    floors off."""

    def rows(a):
        return torch.tensor(np.broadcast_to(a, (x.size, len(a))).copy())

    box = {"left": -BOUND, "right": BOUND, "bottom": -BOUND, "top": BOUND}
    floors = {"min_bin_width": 0.0, "min_bin_height": 0.0, "min_derivative": 0.0}
    raw = rows(np.log(np.diff(xk))), rows(np.log(np.diff(yk))), rows(inverse_softplus(slopes))
    out = [
        rational_quadratic_spline(torch.tensor(x), *raw, inverse=i, **box, **floors)
        for i in (False, True)
    ]
    return [a.numpy() for pair in out for a in pair]


def splines():
    rng = np.random.default_rng(0)
    raw = np.concatenate([scale * rng.normal(size=(6, 3 * BINS - 1)) for scale in (1.0, 4.0)])
    x = rng.uniform(-BOUND, BOUND, size=(12, 24))
    ours = [np.stack(a) for a in zip(*map(knots, raw), strict=True)]
    arrays = {"raw": raw, "x": x, "xk": ours[0], "yk": ours[1], "slopes": ours[2]}
    for name, library in (("zuko", with_zuko), ("nflows", with_nflows)):
        results = zip(*(library(*row) for row in zip(*ours, x, strict=True)), strict=True)
        keys = ("y", "log_slope", "back", "back_log_slope")
        arrays |= {f"{name}_{key}": np.stack(rows) for key, rows in zip(keys, results, strict=True)}
    np.savez_compressed(HERE / "splines.npz", **arrays)


class OurScale(AffineCouplingTransform):
    """nflows' coupling with log scale = 3 tanh(raw / 3); the net's numbers alternate: scale, shift,
    scale, shift ..."""

    def _scale_and_shift(self, transform_params):
        return torch.exp(3 * torch.tanh(transform_params[:, 0::2] / 3)), transform_params[:, 1::2]


class Net(torch.nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.hidden, self.head = torch.nn.Linear(inputs, 6), torch.nn.Linear(6, outputs)

    def forward(self, x, context=None):
        return self.head(torch.tanh(self.hidden(x)))


def both_ways(transform, x):
    with torch.no_grad():
        out = [*transform(torch.tensor(x)), *transform.inverse(torch.tensor(x))]
    return dict(
        zip(("y", "log_det", "back", "back_log_det"), (a.numpy() for a in out), strict=True)
    )


def coupling():
    torch.manual_seed(0)
    transform = OurScale([0, 0, 1, 1, 1], Net)
    net = transform.transform_net
    weights = {
        "hidden_kernel": net.hidden.weight.T,
        "hidden_bias": net.hidden.bias,
        "head_kernel": net.head.weight.T,
        "head_bias": net.head.bias,
    }
    x = np.random.default_rng(1).normal(size=(7, 5))
    arrays = {name: w.detach().numpy() for name, w in weights.items()}
    np.savez_compressed(HERE / "coupling.npz", x=x, **arrays, **both_ways(transform, x))


def lu():
    torch.manual_seed(1)
    features = 5
    transform = LULinear(features, identity_init=False)
    transform.bias.data = torch.randn(features)
    lower, upper = (a.detach().numpy() for a in transform._create_lower_upper())
    x = np.random.default_rng(2).normal(size=(7, features))
    arrays = {"lower": lower, "upper": upper, "shift": transform.bias.detach().numpy()}
    np.savez_compressed(HERE / "lu.npz", x=x, **arrays, **both_ways(transform, x))


if __name__ == "__main__":
    splines()
    coupling()
    lu()
