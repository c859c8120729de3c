"""A small training in a process of its own, to be killed: python kill_worker.py WORKDIR.

Prints a line as each batch is drawn. At the end it writes WORKDIR/final.npz, every leaf of the state.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jflow import data, train

STEPS, SAVE_EVERY = 90, 6


def loss(params, key, batch, frozen=None):
    """Flow matching of a two-layer network, rows weighted: noise, pairs and times all come from the key."""
    k0, kt = jax.random.split(key)
    x1 = batch["x"]
    x0, t = jax.random.normal(k0, x1.shape), jax.random.uniform(kt, (len(x1), 1))
    h = jnp.tanh(jnp.concatenate([(1 - t) * x0 + t * x1, t], 1) @ params["in"])
    error = jnp.mean((h @ params["out"] - (x1 - x0)) ** 2, axis=1)
    return jnp.sum(batch["weight"] * error) / jnp.sum(batch["weight"]), {}


def main(workdir: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {"x": rng.normal(size=(200, 2)).astype(np.float32), "weight": rng.random(200).astype(np.float32)}

    def transform(batch, rng):
        print("batch", flush=True)
        time.sleep(0.01)  # so that whoever listens can act before the end
        return {**batch, "x": batch["x"] + 0.01 * rng.normal(size=batch["x"].shape).astype(np.float32)}

    k0, k1, key = jax.random.split(jax.random.key(0), 3)
    params = {"in": jax.random.normal(k0, (3, 32)), "out": jax.random.normal(k1, (32, 2)) / 32}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.01, STEPS)))
    average = train.ema.warmup(0.99)
    fitted = train.fit(
        train.init_state(params, optimizer, key, ema=average),
        train.make_step(loss, optimizer, ema=average),
        data.batches(rows, 32, seed=1, transform=transform),
        steps=STEPS,
        workdir=workdir,
        log_every=5,
        save_every=SAVE_EVERY,
        eval_every=10,
        evaluate=lambda state: {"size": jnp.sum(state.ema["out"] ** 2)},
        monitor="size",
        progress=False,
    )
    state = fitted.state._replace(key=jax.random.key_data(fitted.state.key))
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    leaves |= {f"best{name}": leaf for name, leaf in fitted.best.params.items()}
    np.savez(workdir / "final.npz", **leaves)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
