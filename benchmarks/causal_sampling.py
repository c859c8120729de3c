"""Samples of a causal law of sequences: with the cache of the network, and by parallel passes.

    python benchmarks/causal_sampling.py
    python benchmarks/causal_sampling.py --short

Draws `--rows` sequences of `--length` tokens of 8 numbers from `distributions.causal` with
`nets.CausalTransformer` (width 128, 4 layers) under a mixture of 4 normals, once with the cache,
one step a token, and once from the same network without a cache, one pass over the whole sequence a
token, both compiled. Printed: the median seconds of each over turns, their ratio, the largest
difference between the two samples under one key, and the seconds of one log-density, which is a
parallel pass. Params are random.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from clocks import interleaved, medians

from jflow import distributions, nets

FEATURES = 8
NETS = {
    "transformer": nets.CausalTransformer(features=64, width=128, num_layers=4, num_heads=4),
}


class Uncached(nn.Module):
    """A network without its cache."""

    net: nn.Module

    @nn.compact
    def __call__(self, x, cond=None):
        return self.net(x, cond)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--short", action="store_true", help="2 rows of 32 tokens, for CI")
    args = parser.parse_args()
    if args.short:
        args.rows, args.length, args.repeats = 2, 32, 2
    shape, key = (args.length, FEATURES), jax.random.key(2)
    print(
        f"{args.rows} sequences of {args.length} tokens, {jax.devices()[0].device_kind},"
        f" jax {jax.__version__}, medians of {args.repeats} turns, seconds"
    )
    print(
        f"{'network':14s}{'cached':>9s}{'uncached':>10s}{'ratio':>8s}{'off':>9s}{'log_prob':>10s}"
    )
    for name, net in NETS.items():
        token = distributions.conditional_mixture((FEATURES,), 4)
        law = distributions.causal(net, token, shape)
        passes = distributions.causal(Uncached(net), token, shape)
        x = jax.random.normal(jax.random.key(0), (args.rows, *shape))
        start = law.init(jax.random.key(1), x)
        draw = np.random.default_rng(0)
        params = jax.tree.map(
            lambda p, draw=draw: p + jnp.asarray(0.03 * draw.normal(size=p.shape), p.dtype), start
        )
        wrapped = {"net": {"net": params["net"]}, "token": params["token"]}
        calls = {
            "cached": lambda law=law, params=params: law.sample(params, key, args.rows),
            "uncached": lambda law=passes, params=wrapped: law.sample(params, key, args.rows),
            "log_prob": lambda law=law, params=params, x=x: law.log_prob(params, x),
        }
        found = {what: np.asarray(call()) for what, call in calls.items()}  # compiles
        times = medians(interleaved(calls, args.repeats))
        off = np.abs(found["cached"] - found["uncached"]).max()
        print(
            f"{name:14s}{times['cached']:9.3f}{times['uncached']:10.3f}"
            f"{times['uncached'] / times['cached']:8.1f}{off:9.1e}{times['log_prob']:10.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
