"""Writes what FrEIA's Haar wavelets and nflows' squeeze make of one random image, in float64, to
images.npz.

    pip install torch FrEIA nflows
    python tests/peers/make_image_fixtures.py

Written with torch 2.13.0, FrEIA 0.2, nflows 0.14.
Both are channel first and order the squeezed channels by color, then by band or pixel: [b, c * 4 +
k, H/2, W/2].
"""

from pathlib import Path

import FrEIA
import FrEIA.modules
import numpy as np
import torch
from nflows.transforms import SqueezeTransform

torch.set_default_dtype(torch.float64)
x = torch.as_tensor(np.random.default_rng(0).normal(size=(2, 3, 4, 6)))
wavelets = FrEIA.modules.HaarDownsampling(
    [(3, 4, 6)], order_by_wavelet=False, rebalance=1.0
).double()
(haar,), log_det = wavelets([x])
squeezed, _ = SqueezeTransform(2)(x)
np.savez_compressed(
    Path(__file__).with_name("images.npz"),
    x=x.numpy(),
    haar=haar.detach().numpy(),
    haar_log_det=np.broadcast_to(np.asarray(torch.as_tensor(log_det).detach()), (2,)),
    squeeze=squeezed.numpy(),
)
