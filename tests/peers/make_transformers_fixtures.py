"""Writes what nflows, normflows and zuko compute for free and circular splines, reflections and
monotone integrals, as small float64 arrays, so that the tests need no torch.

    pip install torch zuko nflows normflows
    python tests/peers/make_transformers_fixtures.py

Written with torch 2.13.0, zuko 1.6.0, nflows 0.14, normflows 1.7.3. Splines are compared on equal
knots; the way from raw parameters to knots is worked out here a second time, from the description
in jflow/bijectors/splines.py.
"""

import numpy as np
import torch
import zuko
from make_fixtures import BINS, BOUND, CAP, FLOOR, HERE, bin_sizes, inverse_softplus, softplus
from nflows.transforms.orthogonal import HouseholderSequence
from nflows.transforms.qr import QRLinear
from nflows.transforms.splines.rational_quadratic import rational_quadratic_spline
from normflows.utils.splines import unconstrained_rational_quadratic_spline

NO_FLOORS = {"min_bin_width": 0.0, "min_bin_height": 0.0, "min_derivative": 0.0}


def knots(raw, periodic):
    """One spline's widths, heights and slopes, the slopes of both ends among them."""
    w, h = bin_sizes(raw[:BINS]), bin_sizes(raw[BINS : 2 * BINS])
    s = h / w
    slopes = softplus(raw[2 * BINS :] + inverse_softplus(1 - FLOOR)) + FLOOR
    if periodic:
        slopes = np.append(slopes, slopes[0])
    for k in range(BINS + 1):
        left, right = (
            (s[k - 1], s[k % BINS]) if periodic else (s[max(k - 1, 0)], s[min(k, BINS - 1)])
        )
        slopes[k] = min(slopes[k], CAP * left, CAP * right)
    return w, h, slopes


def rows(a, x):
    return torch.tensor(np.broadcast_to(a, (x.size, len(a))).copy())


def free(w, h, slopes, x, inverse):
    """nflows, inside the box."""
    raw = (rows(np.log(a), x) for a in (w, h))
    box = {"left": -BOUND, "right": BOUND, "bottom": -BOUND, "top": BOUND}
    return rational_quadratic_spline(
        torch.tensor(x),
        *raw,
        rows(inverse_softplus(slopes), x),
        inverse=inverse,
        **box,
        **NO_FLOORS,
    )


def circular(w, h, slopes, x, inverse):
    """normflows, tails='circular'."""
    raw = [rows(np.log(a), x) for a in (w, h)] + [rows(inverse_softplus(slopes[:-1]), x)]
    return unconstrained_rational_quadratic_spline(
        torch.tensor(x), *raw, inverse=inverse, tails="circular", tail_bound=BOUND, **NO_FLOORS
    )


def splines():
    rng = np.random.default_rng(0)
    x = rng.uniform(-BOUND, BOUND, size=(10, 24))
    arrays = {"x": x}
    for name, size, library in (("free", 3 * BINS + 1, free), ("circular", 3 * BINS, circular)):
        raw = np.concatenate([scale * rng.normal(size=(5, size)) for scale in (1.0, 3.0)])
        arrays[f"{name}_raw"] = raw
        for inverse in (False, True):
            out = [
                library(*knots(r, name == "circular"), row, inverse)
                for r, row in zip(raw, x, strict=True)
            ]
            for key, values in zip(("y", "log_slope"), zip(*out, strict=True), strict=True):
                arrays[f"{name}_{'back_' * inverse}{key}"] = np.stack([v.numpy() for v in values])
    return arrays


def integral():
    """zuko's monotone integral of exp(v), v = sum_j c_j cos w_j t + s_j sin w_j t, by 400 nodes."""
    rng = np.random.default_rng(1)
    coefficients, x = 0.25 * rng.normal(size=(4, 8)), rng.uniform(-5, 5, size=(4, 20))
    frequencies = torch.arange(1, 5) * torch.pi / 10
    y = []
    for c, row in zip(torch.tensor(coefficients), torch.tensor(x), strict=True):

        def g(t, c=c):
            angles = t[..., None] * frequencies
            return torch.exp(torch.cos(angles) @ c[:4] + torch.sin(angles) @ c[4:])

        y.append(zuko.transforms.UnconstrainedMonotonicTransform(g, n=400, phi=())(row).numpy())
    return {"integral_coefficients": coefficients, "integral_x": x, "integral_y": np.stack(y)}


def linear():
    torch.manual_seed(0)
    x = torch.tensor(np.random.default_rng(2).normal(size=(6, 5)))
    reflections, qr = HouseholderSequence(5, 4), QRLinear(5, 4)
    qr.bias.data = torch.randn(5)
    for sequence in (reflections, qr.orthogonal):  # nflows starts at the identity
        sequence.q_vectors.data = torch.randn(4, 5)
    with torch.no_grad():
        y, log_det = qr(x)
        arrays = {
            "linear_x": x,
            "householder_vectors": reflections.q_vectors,
            "householder_y": reflections(x)[0],
            "qr_vectors": qr.orthogonal.q_vectors,
            "qr_upper": qr._create_upper(),
            "qr_shift": qr.bias,
            "qr_y": y,
            "qr_log_det": log_det,
        }
    return {name: a.detach().numpy() for name, a in arrays.items()}


if __name__ == "__main__":
    np.savez_compressed(HERE / "transformers.npz", **splines(), **integral(), **linear())
