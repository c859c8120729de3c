"""A small training to be killed.

It takes lines 'WORKDIR WHERE N' from stdin, and trains for each in a process forked for it, which
holds there until it gets a signal (`hold_in`), or else trains to the end and writes
WORKDIR/final.npz, every leaf of the state. Then it prints the exit code. Forked, because to import
JAX is most of the cost.
"""

import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from subprocesses import hold

from jflow import data, train

STEPS, SAVE_EVERY, LOG_EVERY = 30, 6, 4


def hold_in(where: str, n: int) -> None:
    """Hold once this process comes there; nowhere if it is to end by itself.

    step: its n-th batch is being made, while the device may still compute. arrays: those of the
    checkpoint of step n are in orbax's temporary folder. manifest: that of step n is written, but
    has not taken its name yet. deletion: the checkpoint of step n has lost its manifest and still
    has its arrays.
    """

    def held_before(owner, name, comes):
        function = getattr(owner, name)

        def holding(*args, **kwargs):
            if comes(*map(str, args)):
                hold(f"held {os.getpid()}")
            return function(*args, **kwargs)

        setattr(owner, name, holding)

    folder = f"checkpoints/{n:08d}"
    if where == "step":
        drawn = iter(range(1, STEPS + 1))
        held_before(sys.modules[__name__], "noisy", lambda *_: next(drawn) == n)
    elif where == "arrays":
        held_before(
            orbax.checkpoint.PyTreeCheckpointHandler,
            "finalize",
            lambda _, path: f"{folder}/params." in path,
        )
    elif where == "manifest":
        held_before(os, "replace", lambda _, path: path.endswith(f"{folder}/manifest.json"))
    elif where == "deletion":
        held_before(shutil, "rmtree", lambda path: path.endswith(folder) and os.path.exists(path))


def noisy(batch, rng):
    return {**batch, "x": batch["x"] + 0.01 * rng.normal(size=batch["x"].shape).astype(np.float32)}


def loss(params, key, batch, frozen=None):
    """Flow matching of a two-layer network, rows weighted: noise, pairs and times all come from the
    key."""
    k0, kt = jax.random.split(key)
    x1 = batch["x"]
    x0, t = jax.random.normal(k0, x1.shape), jax.random.uniform(kt, (len(x1), 1))
    h = jnp.tanh(jnp.concatenate([(1 - t) * x0 + t * x1, t], 1) @ params["in"])
    h = h * frozen["base"]["gain"][None]
    error = jnp.mean((h @ params["out"] - (x1 - x0)) ** 2, axis=1)
    return jnp.sum(batch["weight"] * error) / jnp.sum(batch["weight"]), {}


def main(workdir: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {
        "x": rng.normal(size=(200, 2)).astype(np.float32),
        "weight": rng.random(200).astype(np.float32),
    }
    k0, k1, key = jax.random.split(jax.random.key(0), 3)
    params = {"in": jax.random.normal(k0, (3, 32)), "out": jax.random.normal(k1, (32, 2)) / 32}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.01, STEPS))
    )
    average = train.ema.warmup(0.99)
    frozen = {"base": {"gain": jnp.linspace(0.5, 2.0, 32)}, "other": jnp.arange(3)}
    fitted = train.fit(
        train.init_state(params, optimizer, key, ema=average, frozen=frozen),
        train.make_step(loss, optimizer, ema=average),
        data.batches(rows, 32, seed=1, transform=lambda batch, rng: noisy(batch, rng)),
        steps=STEPS,
        workdir=workdir,
        log_every=LOG_EVERY,
        save_every=SAVE_EVERY,
        unsaved=["base"],
        eval_every=10,
        evaluate=lambda state: {"size": jnp.sum(state.ema["out"] ** 2)},
        monitor="size",
        progress=False,
    )
    state = fitted.state._replace(key=jax.random.key_data(fitted.state.key))
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    leaves |= {f"best{name}": leaf for name, leaf in fitted.best.params.items()}
    np.savez(workdir / "final.npz", **leaves)


def serve() -> None:
    for line in sys.stdin:
        workdir, where, n = line.split()
        child = (
            os.fork()
        )  # nothing has touched a device yet: there are no threads of JAX that a fork would lose
        if not child:
            hold_in(where, int(n))
            return main(Path(workdir))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
