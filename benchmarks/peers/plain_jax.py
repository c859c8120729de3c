"""Flow matching written out in plain JAX, without jflow, Flax or a loss that knows options: what
flow_matching_step.py compares with. The functions read the params of jflow's networks, so that both
can be held to the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def step_of(velocity, optimizer):
    """(params, opt_state, key, x1) -> (params, opt_state, key, loss): one update on the linear
    path."""

    def loss(params, key, x1):
        noise_key, time_key = jax.random.split(key)
        x0 = jax.random.normal(noise_key, x1.shape, x1.dtype)
        t = jax.random.uniform(time_key, (x1.shape[0],))
        wide = t.reshape(-1, *(1,) * (x1.ndim - 1))
        return jnp.mean((velocity(params, (1 - wide) * x0 + wide * x1, t) - (x1 - x0)) ** 2)

    def step(params, opt_state, key, x1):
        key, step_key = jax.random.split(key)
        value, grads = jax.value_and_grad(loss)(params, step_key, x1)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, key, value

    return step


def dense(layer, x):
    return x @ layer["kernel"].astype(x.dtype) + layer["bias"].astype(x.dtype)


def mlp(params, x, t):
    """3 SELU layers on x and t side by side."""
    h = jnp.concatenate([x, t[:, None]], axis=1)
    for name in sorted(params["MLP_0"]):
        h = jax.nn.selu(dense(params["MLP_0"][name], h))
    return dense(params["Dense_0"], h)


def layer_norm(x):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    var = jnp.square(x32 - mean).mean(-1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(var + 1e-6)).astype(x.dtype)


def dit(patch_size, heads, dtype=jnp.float32, *, scanned, time_scale=100.0):
    """DiT of Peebles and Xie (2023), its blocks in a Python loop or scanned: velocity(params, x,
    t)."""
    p = patch_size

    def block(h, c, params):
        b, n, width = h.shape
        modulation = jnp.split(dense(params["modulation"], c)[:, None], 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        y = layer_norm(h) * (1 + scale_a) + shift_a
        q, k, v = jnp.split(
            dense(params["attention"]["qkv"], y).reshape(b, n, 3 * heads, -1), 3, axis=2
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5).astype(h.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, width)
        h = h + gate_a * dense(params["attention"]["out"], y)
        y = layer_norm(h) * (1 + scale_m) + shift_m
        return h + gate_m * dense(params["out"], jax.nn.gelu(dense(params["in"], y)))

    def velocity(params, x, t):
        b, height, side, channels = x.shape
        rows, columns = height // p, side // p
        tokens = (
            x.reshape(b, rows, p, columns, p, channels)
            .swapaxes(2, 3)
            .reshape(b, rows * columns, -1)
        )
        h = dense(params["patches"], tokens.astype(dtype))
        h = h + jnp.asarray(positions(rows, columns, h.shape[-1]), dtype)[None]
        frequencies = time_scale * 10_000.0 ** (-np.arange(128) / 128)
        angles = t[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
        c = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(dtype)
        c = dense(params["embed"]["time_out"], jax.nn.silu(dense(params["embed"]["time_in"], c)))
        c = jax.nn.silu(c)
        if scanned:
            h, _ = jax.lax.scan(lambda h, layer: (block(h, c, layer), None), h, params["blocks"])
        else:
            for i in range(params["blocks"]["in"]["bias"].shape[0]):
                h = block(h, c, jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]))
        shift, scale = jnp.split(dense(params["modulation"], c)[:, None], 2, axis=-1)
        h = dense(params["head"], (layer_norm(h) * (1 + scale) + shift).astype(jnp.float32))
        return h.reshape(b, rows, columns, p, p, channels).swapaxes(2, 3).reshape(x.shape)

    return velocity


def positions(rows, columns, width):
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = np.concatenate([np.outer(column, frequencies), np.outer(row, frequencies)], axis=1)
    quarters = np.split(angles, 2, axis=1)
    return np.concatenate([f(q) for q in quarters for f in (np.sin, np.cos)], axis=1)
