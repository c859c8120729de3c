"""Torsion angles of proteins: Riemannian flow matching on the flat torus, with its likelihood.

Train and report (README.md has the minutes; JFLOW_DATA/riemannian/torsions, or data_dir=FOLDER):

    jflow train experiments/torsions --workdir runs/gln
    jflow train experiments/torsions residue=cispro --workdir runs/cispro
    jflow train experiments/torsions angles=5 --workdir runs/gln5
    jflow evaluate runs/gln
    python experiments/torsions/picture.py runs/gln --out ramachandran.png

`short=True` trains on two clouds of made-up angles in seconds, for CI. The expected numbers are in
README.md beside this file.

The data are the angles (phi, psi), or (phi, psi, chi1, chi2, chi3), of glutamine or cis-proline in
the Top8000 proteins, split once into 80%, 10% and 10% (2000 rows at most are judged). Source:
uniform angles; path: the shortest way around; network: of cosines and sines. Reported is the
negative log-likelihood of the test rows in nats, by the ODE and its exact divergence, beside a
product von Mises kernel density whose kappa is chosen on the validation rows.
"""

import functools
import os
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torsions

import jflow
from jflow import (
    couplings,
    data,
    distributions,
    losses,
    manifolds,
    nets,
    paths,
    solvers,
    times,
    train,
)
from jflow.apps import Experiment

LATE = times.logit_normal(1.0, 1.5, draws=times.low_discrepancy())  # where peaks are sharp


def config(
    *,
    residue: str = "gln",
    angles: int = 2,
    data_dir: str = "",
    width: int = 256,
    depth: int = 4,
    steps: int = 12_000,
    batch: int = 512,
    learning_rate: float = 2e-3,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        residue: gln or cispro
        angles: 2, the backbone, to 5, with the side chain
        data_dir: folder of the files; riemannian/torsions in JFLOW_DATA if empty
        width: of the network
        depth: layers of the network
        steps: updates
        batch: rows of an update
        learning_rate: of Adam, at its highest
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if residue not in ("gln", "cispro"):
        raise ValueError(f"unknown residue {residue!r}: expected gln or cispro")
    if not 2 <= angles <= len(torsions.NAMES):
        raise ValueError(f"angles: expected 2 to {len(torsions.NAMES)}, got {angles}")
    if short:
        width, depth, steps, batch = 16, 2, 40, 32
    torus = manifolds.torus(angles)
    velocity = manifolds.tangent(jflow.velocity(nets.TimeMLP((width,) * depth)), torus)
    base = distributions.uniform_on(torus)
    loss = losses.chain(
        couplings.with_source(couplings.from_distribution(base)),
        losses.flow_matching(velocity, path=paths.geodesic(torus), time=LATE),
    )
    method = 5 if short else solvers.adaptive(diffrax.Tsit5(), rtol=1e-4, atol=1e-4)

    def rows():
        if short:
            return torsions.splits(torsions.toy(angles))
        folder = data_dir or os.path.join(os.environ.get("JFLOW_DATA", ""), "riemannian/torsions")
        return torsions.splits(torsions.read(Path(folder) / f"rota8000-{residue}.csv.gz", angles))

    log_prob = jax.jit(
        lambda params, x: solvers.log_prob(
            velocity, params, x, lambda x0: base.log_prob({}, x0), method=method
        )[0]
    )

    @functools.cache
    def sampler(steps):
        return jax.jit(
            lambda params, x0: torus.project(solvers.sample(velocity, params, x0, method=steps)[0])
        )

    def sample(params, key, n, *, steps=5 if short else 100):
        return {"x": sampler(int(steps))(params, base.sample({}, key, n))}

    def density(params, x):
        """[n] nats, in parts of one size, so that one program does."""
        parts = len(x) // 1024 + 1
        whole = np.resize(x, (parts * 1024 if not short else len(x), x.shape[1]))
        parts = parts if not short else 1
        found = [np.asarray(log_prob(params, jnp.asarray(p))) for p in np.array_split(whole, parts)]
        return np.concatenate(found)[: len(x)]

    def evaluate(params, state, key, splits):
        nats = -density(params, splits.test["x"]).astype(np.float64)
        valid = -density(params, splits.valid["x"]).astype(np.float64)
        kernel, kappa = torsions.kernel_nll(splits)
        return {
            "test_nll": float(nats.mean()),
            "standard_error": float(nats.std() / np.sqrt(len(nats))),
            "valid_nll": float(valid.mean()),
            "kernel_density_nll": float(kernel.mean()),
            "gain": float((kernel - nats).mean()),
            "gain_standard_error": float((kernel - nats).std() / np.sqrt(len(nats))),
            "kappa": kappa,
            "uniform_nll": torus.log_volume,
        }

    often = lambda times: 10 * max(1, steps // (10 * times))  # noqa: E731
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20 + 1, steps, 1e-6)
    return Experiment(
        model=velocity,
        init=lambda key, rows: velocity.init(
            key, jnp.asarray(rows["x"]), jnp.zeros(len(rows["x"]))
        ),
        loss=loss,
        optimizer=optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule)),
        data=rows,
        preprocess=data.identity(),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(0.999),
        sample=sample,
        evaluate=evaluate,
        eval_every=often(2),
        save_every=often(4),
        monitor="valid_nll",
        log_every=often(8),
        inner=10,
    )
