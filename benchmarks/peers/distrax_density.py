"""The distrax side of density.py: answers requests on stdin, a JSON line each, with the seconds
that one call took.

    PYTHON benchmarks/peers/distrax_density.py

Requests are those of torch_density.py. distrax needs tensorflow-probability, which needs an older
jax: an environment of its own (pip install jax==0.5.3 distrax==0.1.5 tensorflow-probability==0.25
optax).
"""

import argparse
import functools
import json
import sys
import time

import numpy as np

try:
    import distrax
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:
    sys.exit(f"{error}: this script needs distrax, tensorflow-probability and optax")

HIDDEN = (128, 128)


@functools.cache
def calls(library, kind, features, batch, depth):
    del library
    half = features // 2
    size = 3 * 8 + 1 if kind == "spline" else 2
    rng = np.random.default_rng(0)
    orders = [rng.permutation(features) for _ in range(depth)]
    back = [np.argsort(order) for order in orders]
    params = []
    for _ in range(depth):
        widths = (half, *HIDDEN)
        layers = [
            (rng.normal(size=(i, o)) / np.sqrt(i), np.zeros(o))
            for i, o in zip(widths, HIDDEN, strict=False)
        ] + [(np.zeros((HIDDEN[-1], size * half)), np.zeros(size * half))]
        params.append(jax.tree.map(jnp.float32, layers))

    def conditioner(layers, x):
        for weight, bias in layers[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        raw = (x @ layers[-1][0] + layers[-1][1]).reshape(*x.shape[:-1], features - half, size)
        return raw if kind == "spline" else (raw[..., 0], raw[..., 1])

    def inner(raw):
        if kind == "spline":
            return distrax.RationalQuadraticSpline(raw, -5.0, 5.0, boundary_slopes="identity")
        return distrax.ScalarAffine(shift=raw[0], log_scale=raw[1])

    def flow(params):
        steps = []
        for layers, order, undo in zip(params, orders, back, strict=True):
            coupling = distrax.SplitCoupling(half, 1, functools.partial(conditioner, layers), inner)
            permute = distrax.Lambda(
                forward=lambda x, o=order: x[..., o],
                inverse=lambda y, o=undo: y[..., o],
                forward_log_det_jacobian=lambda x: jnp.zeros(x.shape[:-1]),
                inverse_log_det_jacobian=lambda y: jnp.zeros(y.shape[:-1]),
                event_ndims_in=1,
                is_constant_jacobian=True,
            )
            steps += [coupling, permute]
        base = distrax.Independent(distrax.Normal(jnp.zeros(features), jnp.ones(features)), 1)
        return distrax.Transformed(base, distrax.Inverse(distrax.Chain(steps)))

    x = jnp.asarray(rng.normal(size=(batch, features)), jnp.float32)
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, x):
        value, grads = jax.value_and_grad(lambda p: -flow(p).log_prob(x).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    log_prob = jax.jit(lambda params, x: flow(params).log_prob(x))
    sample = jax.jit(lambda params, key: flow(params).sample(seed=key, sample_shape=(batch,)))
    return {
        "log_prob": lambda: log_prob(params, x),
        "train": lambda: step(params, opt_state, x),
        "sample": lambda: sample(params, jax.random.PRNGKey(0)),
    }


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    for line in sys.stdin:
        request = json.loads(line)
        call = calls(**{key: value for key, value in request.items() if key != "what"})[
            request["what"]
        ]
        start = time.perf_counter()
        jax.block_until_ready(call())
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
