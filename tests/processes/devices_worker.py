"""Checks that need a process of their own, with eight fake devices; prints one JSON object: python
devices_worker.py DIR.

The limit on file sizes (a stand-in for a full disk) comes last, since it cannot be taken back.
"""

import json
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pipeline_worker import pipeline_checks
from sharding_worker import layout_checks

from jflow import data, losses, train
from jflow.train import checkpoint
from jflow.types import Velocity

OPTIMIZER = optax.adam(0.05)
ROWS = {"x": np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)}
PARAMS = {"w": jnp.eye(2), "b": jnp.zeros(2)}


def free(params, key, batch, frozen=None):
    """Needs no key: the negative log-likelihood of an affine flow."""
    z = batch["x"] @ params["w"] + params["b"][None]
    return jnp.mean(jnp.sum(z**2, 1)) / 2 - jnp.linalg.slogdet(params["w"])[1], {"top": jnp.mean(z)}


def keyed(params, key, batch, frozen=None):
    noise = jax.random.normal(key, batch["x"].shape)
    return jnp.mean((batch["x"] @ params["w"] - noise) ** 2), {"noise": jnp.mean(noise)}


def state(**options):
    return train.init_state(PARAMS, OPTIMIZER, jax.random.key(1), ema=0.9, **options)


def losses_of(step, state, place=lambda batch: batch, n=5):
    """The last state, and loss and gradient norm of each step (Adam alone would hide a gradient's
    scale)."""
    batches, out = data.batches(ROWS, 16, seed=2), []
    for _ in range(n):
        state, metrics = step(state, place(next(batches)))
        out += [float(jnp.ravel(metrics[name])[0]) for name in ("loss", "grad_norm")]
    return state, out


def flat(tree):
    return [float(x) for leaf in jax.tree.leaves(tree) for x in np.ravel(leaf)]


def spread(tree):
    """The largest difference between what the shards of a stacked tree hold."""
    return max(float(np.ptp(np.asarray(leaf), axis=0).max()) for leaf in jax.tree.leaves(tree))


def mesh_checks(mesh, sharded):
    out = {}
    for name, loss in (("free", free), ("keyed", keyed)):
        step = jax.jit(train.make_step(loss, OPTIMIZER, ema=0.9), donate_argnums=0)
        one, out[f"{name}_one"] = losses_of(step, state())
        spread_state = jax.device_put(state(), train.replicated(mesh))
        eight, out[f"{name}_mesh"] = losses_of(step, spread_state, lambda b: data.place(b, sharded))
        out[f"{name}_params_one"], out[f"{name}_params_mesh"] = (
            flat((one.params, one.ema)),
            flat((eight.params, eight.ema)),
        )
    return out


def mapped_checks(mesh):
    def split(batch):
        return jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)

    out = {}
    for name, loss in (("free", free), ("keyed", keyed)):
        step = train.make_step(loss, OPTIMIZER, ema=0.9, axis_name="data")
        mapped = jax.pmap(step, axis_name="data", donate_argnums=0)
        stacked, out[f"{name}_pmap"] = losses_of(mapped, train.stack_for_pmap(state(), 8), split)
        out[f"{name}_pmap_spread"] = spread(
            (stacked.params, stacked.opt_state, stacked.ema, stacked.step)
        )
        out[f"{name}_params_pmap"] = flat(
            jax.tree.map(lambda x: x[0], (stacked.params, stacked.ema))
        )
        shard = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
        after, out[f"{name}_shard_map"] = losses_of(shard, state())
        out[f"{name}_params_shard_map"] = flat((after.params, after.ema))

    # an ODE is solved inside the loss: diffrax's buffers need check_vma=False
    velocity = Velocity(
        lambda *a: PARAMS, lambda p, x, t, cond=None, *, key=None: x @ p["w"] + p["b"]
    )
    taught = dict(frozen={"teacher": jax.tree.map(lambda leaf: leaf + 0.3, PARAMS)})
    step = train.make_step(
        losses.perflow(velocity, velocity, method=1), OPTIMIZER, ema=0.9, axis_name="data"
    )
    _, out["ode_pmap"] = losses_of(
        jax.pmap(step, axis_name="data"), train.stack_for_pmap(state(**taught), 8), split, n=2
    )
    shard = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    )
    _, out["ode_shard_map"] = losses_of(shard, state(**taught), n=2)

    def refresh(params, frozen, key, batch):
        mean = 0.5 * frozen["mean"] + 0.5 * jnp.mean(batch["x"])
        return {**frozen, "mean": mean, "noise": jax.random.normal(key)}

    frozen = {"mean": jnp.float32(0), "noise": jnp.float32(0), "teacher": jnp.ones(3)}
    step = train.make_step(free, OPTIMIZER, ema=0.9, refresh=refresh, axis_name="data")
    stacked, _ = losses_of(
        jax.pmap(step, axis_name="data"), train.stack_for_pmap(state(frozen=frozen), 8), split, n=1
    )
    out["refresh_spread"] = spread(stacked.frozen)
    out["refresh_mean"] = [
        float(stacked.frozen["mean"][0]),
        0.5 * float(next(data.batches(ROWS, 16, seed=2))["x"].mean()),
    ]
    shard = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    out["refresh_shard_map"] = float(losses_of(shard, state(frozen=frozen), n=1)[0].frozen["mean"])
    # What the eight shards draw in the first step: each folds its index into the step's key.
    noise = jax.pmap(lambda s, b: keyed(s.params, fold(s.key), b)[1], axis_name="data")
    fold = lambda key: jax.random.fold_in(jax.random.fold_in(key, 0), jax.lax.axis_index("data"))  # noqa: E731
    drawn = noise(train.stack_for_pmap(state(), 8), split(next(data.batches(ROWS, 16, seed=2))))[
        "noise"
    ]
    first = train.make_step(keyed, OPTIMIZER, ema=0.9, axis_name="data")
    _, metrics = jax.pmap(first, axis_name="data")(
        train.stack_for_pmap(state(), 8), split(next(data.batches(ROWS, 16, seed=2)))
    )
    out["noise"] = [float(x) for x in drawn]
    out["noise_mean"] = float(metrics["noise"][0])
    return out


def fit_checks(folder, mesh, sharded):
    """fit over the mesh, in one go and in two; and with params sharded while the step count lies on
    one device."""

    def go(steps, workdir, start):
        step = train.make_step(keyed, OPTIMIZER, ema=0.9)
        batches = data.batches(ROWS, 16, seed=2)
        fitted = train.fit(
            start, step, batches, steps=steps, workdir=workdir, progress=False, sharding=sharded
        )
        assert len(fitted.state.params["w"].sharding.device_set) == 8
        return fitted.state

    def everywhere():
        return jax.device_put(state(), train.replicated(mesh))

    whole = go(6, folder / "whole", everywhere())
    go(3, folder / "parts", everywhere())
    parts = go(6, folder / "parts", everywhere())
    rows = NamedSharding(mesh, P("data"))
    wide = jax.device_put({"w": jnp.ones((16, 2)), "b": jnp.zeros(8)}, rows)
    mixed = train.init_state(wide, OPTIMIZER, jax.random.key(0), ema=0.9)
    loss = lambda p, k, b, f: (jnp.mean((b["x"] @ p["w"].T) ** 2) + jnp.sum(p["b"] ** 2), {})  # noqa: E731
    step, n = train.make_step(loss, OPTIMIZER, ema=0.9), 0
    for n in (2, 4):  # a resume in between
        batches = data.batches(ROWS, 16)
        fitted = train.fit(
            mixed,
            step,
            batches,
            steps=n,
            workdir=folder / "mixed",
            progress=False,
            sharding=sharded,
        )
        mixed = train.init_state(wide, OPTIMIZER, jax.random.key(0), ema=0.9)
    kept = (
        fitted.state.params["w"].sharding == rows
        and fitted.state.opt_state[0].mu["w"].sharding == rows
    )
    loaded = checkpoint.restore_params(folder / "mixed")["w"]
    return {
        "fit_same": flat(whole._replace(key=None)) == flat(parts._replace(key=None)),
        "fit_sharding_kept": kept,
        "fit_loaded": loaded.shape == (16, 2) and len(loaded.sharding.device_set) == 1,
    }


def disk_checks(folder):
    big = train.init_state(
        {"w": jax.random.normal(jax.random.key(0), (200, 200))}, OPTIMIZER, jax.random.key(1)
    )
    checkpoint.save(folder, 1, big)
    out = []
    for limit in (0, 400, 4000, 40_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            checkpoint.save(folder, 2, big)
        except OSError as error:
            there = sorted(p.name for p in (folder / "checkpoints").iterdir())
            whole = np.array_equal(
                checkpoint.restore(folder, big).state.params["w"], big.params["w"]
            )
            out.append([str(error), checkpoint.steps(folder), there, bool(whole)])
    return {"disk": out}


def main(folder: Path) -> None:
    mesh = train.data_mesh()
    sharded = train.data_sharding(mesh)
    out = {"devices": len(jax.devices())} | mesh_checks(mesh, sharded) | mapped_checks(mesh)
    out |= {"layouts": layout_checks(), "pipelines": pipeline_checks()}
    out |= fit_checks(folder, mesh, sharded) | disk_checks(folder / "disk")
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
