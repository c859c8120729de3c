"""The job that `test_train_processes.py` trains: a velocity of a scanned stack, fully sharded where
there is a mesh.

With HOLD=7 in the environment a process that starts from step 0 holds as it makes the batch of step
7, until it gets a signal; with HOLD=7:1 process 1 alone does.
"""

import itertools
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from subprocesses import hold

from jflow import apps, data, train
from jflow.data._preprocess import identity


def config(*, steps=12, width=32, rate=0.02) -> apps.Experiment:
    where, _, process = os.environ.get("HOLD", "0").partition(":")
    calls = (
        itertools.count()
    )  # the first one is for `init`: the others' numbers are those of the steps

    def load():
        x = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
        return data.Splits({"x": x[:64]}, {"x": x[64:]})

    def apply(state, rows, rng):
        if (
            rng is not None
            and next(calls) == int(where) > 0
            and process in ("", str(jax.process_index()))
        ):
            hold(f"held: process {jax.process_index()}, pid {os.getpid()}")
        return rows

    def init(key, batch):
        a, b, c = jax.random.split(key, 3)
        scale = width**-0.5
        return {
            "in": jax.random.normal(a, (5, width)),
            "layers": scale * jax.random.normal(b, (3, width, width)),
            "out": scale * jax.random.normal(c, (width, 4)),
        }

    def loss(params, key, batch, frozen=None):
        k0, kt = jax.random.split(key)
        x1 = batch["x"]
        x0, t = jax.random.normal(k0, x1.shape), jax.random.uniform(kt, (len(x1), 1))
        h = jnp.tanh(jnp.concatenate([(1 - t) * x0 + t * x1, t], 1) @ params["in"])
        h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, params["layers"])
        return jnp.mean((h @ params["out"] - (x1 - x0)) ** 2), {}

    @jax.jit
    def judge(params, key, x):
        return loss(params, key, {"x": x})[0]

    @partial(jax.jit, static_argnums=2)
    def sample(params, key, n):
        return {"x": jax.random.normal(key, (n, 4)) @ params["out"].T}

    return apps.Experiment(
        model=None,
        init=init,
        loss=loss,
        optimizer=optax.adam(rate),
        data=load,
        preprocess=identity()._replace(apply=apply),
        steps=steps,
        batch=16,
        ema=0.9,
        sample=sample,
        evaluate=lambda params, state, key, splits: {"loss": judge(params, key, splits.valid["x"])},
        picture=lambda rows: np.abs(rows["x"][:8]) % 1,
        log_every=1,
        save_every=4,
        eval_every=8,
        monitor="loss",
        rules=((".*", train.fsdp(min_size=0)),),
    )
