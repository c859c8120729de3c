"""What several processes, or one with eight fake devices, do: python processes_worker.py
one|two FOLDER.

Process 0 writes FOLDER/<its first argument>.json.
"""

import json
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from subprocesses import LIMIT

from jflow import apps, data, train
from jflow._core import processes
from jflow.train import checkpoint

CONFIG = Path(__file__).with_name("processes_config.py")


def run(workdir, mesh=None, **keys):
    experiment, values = apps.load_config(CONFIG, keys)
    fit = apps.run(
        experiment, workdir, config_source=CONFIG, resolved=values, progress=False, mesh=mesh
    )
    return [row["loss"] for row in fit.history]


def cut(source, target):
    """A copy as if the run had been killed after step 8."""
    if processes.is_main():
        shutil.copytree(source, target)
        checkpoint.discard(target, 12)
        lines = (target / "metrics.jsonl").read_text().splitlines()
        (target / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[:8]))
    processes.wait_for_all(f"copied {target.name}")


def said(action):
    """The error that every process raises, or None."""
    try:
        action()
    except ValueError as error:
        return str(error)


def disagreements(folder):
    """What processes are told whose jobs differ."""
    me = jax.process_index()
    mesh, optimizer = train.data_mesh(), optax.sgd(0.1)
    rows = {"x": np.ones((16, 2), np.float32)}

    def fit(width=2, scale=1.0, batch=8, **options):
        loss = lambda p, k, b, f: (scale * jnp.mean((b["x"] @ p["w"]) ** 2), {})  # noqa: E731
        state = train.init_state({"w": jnp.ones((2, width))}, optimizer, jax.random.key(0))
        batches = data.batches(rows, batch, share=(me, 2))
        options = {"steps": 2, "progress": False, "sharding": train.data_sharding(mesh)} | options
        train.fit(train.shard(state, mesh), train.make_step(loss, optimizer), batches, **options)

    return {
        "config": said(lambda: run(folder / "never", width=32 + 32 * me)),
        "steps": said(lambda: fit(steps=2 + me)),
        "state": said(lambda: fit(width=2 + me)),
        "batch": said(lambda: fit(batch=16 if me else 8)),
        "step": said(lambda: fit(scale=1.0 + me)),
        "agreed": said(fit),
        "rows": said(lambda: fit(batch=4)),
        "never": (folder / "never").exists(),
    }


def shares():
    """Which share of the rows this process reads: of rows over all devices, over two groups, and
    over none."""
    names = ("data", "model")
    found = []
    for shape, spec in [
        ((8, 1), P("data")),
        ((2, 4), P("data")),
        ((1, 8), P("data")),
        ((4, 2), P(names)),
    ]:
        mesh = train.make_mesh(dict(zip(names, shape, strict=True)))
        found.append(data.share(jax.sharding.NamedSharding(mesh, spec)))
    return found


def main(what: str, folder: Path) -> None:
    out = {}
    if what == "two":
        processes.initialize()
        out["losses"] = run(folder / "two")
        cut(folder / "two", folder / "two_at_8")
        out |= {name: run(folder / name) for name in ("killed", "terminated")}
        out["from_one"] = run(folder / "one_at_8")
        out |= {"devices": len(jax.devices()), "shares": shares(), "errors": disagreements(folder)}
    else:
        out["losses"] = run(folder / "one", train.make_mesh({"data": 8}))
        cut(folder / "one", folder / "one_at_8")
        print("cut", flush=True)
        sys.stdin.readline()  # until the two processes are done
        for n in (8, 4, 1):
            shutil.copytree(folder / "two_at_8", folder / f"on_{n}")
            mesh = None if n == 1 else train.data_mesh(jax.devices()[:n])
            out[f"on_{n}"] = run(folder / f"on_{n}", mesh)
    if processes.is_main():
        (folder / f"{what}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    signal.alarm(LIMIT)  # so that processes that wait for each other end
    main(sys.argv[1], Path(sys.argv[2]))
