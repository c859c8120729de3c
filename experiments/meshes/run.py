"""Densities on the bunny and on spot: flow matching along the biharmonic distance.

    python experiments/meshes/run.py --out runs/spot --mesh spot
    python experiments/meshes/run.py --out runs/bunny --mesh bunny
    python experiments/meshes/run.py --out runs/short --short  # CI: numbers mean nothing

The meshes are JFLOW_DATA/riemannian/mesh/*.obj.gz, or in --data-dir, scaled to an area of 4 pi. The
target is the positive part of an eigenfunction of the Laplacian, as in the paper, as a density: it
is linear on every face, so that it is drawn from exactly. Uniform points, in training paired with
near rows of data, are carried to it by the fluxes through edges of a network, which sees
coordinates, eigenfunctions and time (`manifolds.mesh_bijector`).

Prints how often a two-sample test tells samples from as many new draws from the target, each test
of its own samples and draws. Its statistic is the squared difference of the means of the first
eigenfunctions, weighted by exp(-time eigenvalue), here as a multiple of its mean under the
hypothesis that both are of one law; its p-value is by 999 permutations. Beside it the same for
uniform points and for a second set of draws. Then the nats of held-out draws under the flow, under
the target, whose mean is its entropy, and under the uniform law. Writes results.json and
samples.png. README.md has the results.
"""

import argparse
import functools
import io
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from PIL import Image

import jflow
from jflow import couplings, distributions, flows, losses, manifolds, nets, paths, times, train
from jflow.types import Velocity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VIEWS = {"spot": ([2, 1, 0], [-1, 1, 1]), "bunny": ([0, 1, 2], [1, 1, 1])}
INNER = 20  # updates between two visits of the host
THRESHOLD = 0.01  # of a p-value: the share of false alarms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--mesh", choices=("spot", "bunny"), default="spot")
    parser.add_argument("--data-dir", default="", help="folder that holds riemannian/mesh")
    parser.add_argument("--eigenfunction", type=int, default=20, help="whose positive part it is")
    parser.add_argument("--features", type=int, default=48, help="eigenfunctions that it sees")
    parser.add_argument("--steps", type=int, default=6000, help="updates, 256 rows each")
    parser.add_argument("--path-steps", type=int, default=48, help="of the simulated path")
    parser.add_argument("--sampler-steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=2000, help="samples in a test")
    parser.add_argument("--tests", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=10_000, help="draws whose nats are taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="shrink it to seconds")
    args = parser.parse_args()
    width = 256
    if args.short:
        args.steps, args.path_steps, args.sampler_steps, args.rows, width = 40, 4, 4, 100, 16
        args.held_out, args.tests = 100, 2
        args.eigenfunction = args.features = 4
    args.out.mkdir(parents=True, exist_ok=True)
    mesh = sphere() if args.short else load(args)
    metric = manifolds.biharmonic(mesh)
    surface = manifolds.surface(metric)
    values = np.maximum(mesh.eigenfunctions[:, args.eigenfunction - 1], 0)
    keys = jax.random.split(jax.random.key(args.seed), 2)
    base = distributions.uniform_on(surface)
    functions = mesh.eigenfunctions[:, : args.features] * np.sqrt(mesh.areas.sum())
    velocity = on_features(
        jflow.velocity(nets.TimeMLP((width,) * 4)), surface, at_points(mesh, functions)
    )
    loss = losses.chain(
        couplings.with_source(couplings.from_distribution(base)),
        couplings.pair(nearest(metric)),
        losses.flow_matching(
            velocity,
            path=paths.premetric(metric, steps=args.path_steps),
            time=times.uniform(0.0, 0.99),
        ),
    )
    rows = draw(mesh, values, 50_000, args.seed + 1).astype(np.float32)
    params = trained(velocity, loss, rows, args.steps, keys[0])

    flow = flows.flow(manifolds.mesh_bijector(velocity, mesh, args.sampler_steps), base)
    params = {"bijector": params, "base": {}}
    count = args.tests * args.rows
    samples = np.asarray(jax.jit(flow.sample, static_argnums=2)(params, keys[1], count))
    target, again = (draw(mesh, values, count, args.seed + i) for i in (2, 3))
    uniform = draw(mesh, np.ones_like(values), count, args.seed + 4)
    results = {"mesh": args.mesh, "eigenfunction": args.eigenfunction, "rows": args.rows}
    for name, x in (("samples", samples), ("uniform", uniform), ("target", again)):
        pairs = zip(np.split(x, args.tests), np.split(target, args.tests), strict=True)
        ratios, p_values = zip(*(two_sample(mesh, *pair, args.seed) for pair in pairs), strict=True)
        results[name] = {
            "ratio": round(float(np.mean(ratios)), 3),
            "rejected": sum(p <= THRESHOLD for p in p_values),
            "p_values": p_values,
        }
        print(name, results[name], flush=True)
    held_out = draw(mesh, values, args.held_out, args.seed + 5).astype(np.float32)
    nats = {
        "flow": -np.asarray(jax.jit(flow.log_prob)(params, held_out), np.float64),
        "target": -log_density(mesh, values, held_out),
        "uniform": np.full(len(held_out), surface.log_volume),
    }
    excess = nats["flow"] - nats["target"]
    results["nats"] = {name: round(float(of.mean()), 4) for name, of in nats.items()}
    results["nats"]["flow_over_target"] = round(float(excess.mean()), 4)
    results["nats"]["standard_error"] = round(float(excess.std() / np.sqrt(len(excess))), 4)
    print(results["nats"], flush=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    shown = target[: args.rows], samples[: args.rows]
    picture(mesh, values, *shown, args.out / "samples.png", VIEWS[args.mesh])


def load(args):
    folder = Path(args.data_dir or os.environ.get("JFLOW_DATA", "")) / "riemannian/mesh"
    vertices, faces = manifolds.read_obj(folder / f"{args.mesh}.obj.gz")
    vertices = vertices - vertices.mean(0)
    area = manifolds.laplacian(vertices, faces)[1].diagonal().sum()
    vertices = vertices * np.sqrt(4 * np.pi / area)
    return manifolds.mesh(vertices, faces, num_eigenfunctions=100)


def sphere():
    """An octahedron on the sphere, split once: for runs without the data."""
    vertices = [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]
    faces = [[a, b, c] for a in (0, 1) for b in (2, 3) for c in (4, 5)]
    faces = [f if np.linalg.det(np.array(vertices)[f]) > 0 else f[::-1] for f in faces]
    vertices, middle, split = [list(v) for v in vertices], {}, []

    def half(a, b):
        if (min(a, b), max(a, b)) not in middle:
            middle[min(a, b), max(a, b)] = len(vertices)
            m = np.add(vertices[a], vertices[b])
            vertices.append(list(m / np.linalg.norm(m)))
        return middle[min(a, b), max(a, b)]

    for a, b, c in faces:
        ab, bc, ca = half(a, b), half(b, c), half(c, a)
        split += [[a, ab, ca], [b, bc, ab], [c, ca, bc], [ab, bc, ca]]
    return manifolds.mesh(vertices, split, num_eigenfunctions=12)


def at_points(mesh, functions):
    """x [b, 3] -> [b, k], of functions given at the vertices [V, k]."""

    def evaluate(x):
        face, weights = mesh.locate(x)
        corners = jnp.asarray(functions, x.dtype)[jnp.asarray(mesh.faces)[face]]
        return jnp.sum(weights[..., None] * corners, axis=1)

    return evaluate


def on_features(velocity, surface, functions):
    """A network that sees coordinates and eigenfunctions, in units of their spread: these tell
    apart what is near in space and far along the surface. Its first three numbers are the
    velocity."""
    shown = lambda x: jnp.concatenate([surface.embed(x), functions(x)], axis=1)  # noqa: E731

    def init(key, x, t, cond=None):
        return velocity.init(key, shown(x), t, cond)

    def apply(params, x, t, cond=None, *, key=None):
        return velocity.apply(params, shown(x), t, cond, key=key)[:, :3]

    return Velocity(init, apply)


def nearest(metric):
    """Uniform points are paired with rows of data so that their squared distances add up to the
    least."""
    place = at_points(metric.mesh, metric.mesh.eigenfunctions * np.sqrt(metric.weights))
    return couplings.optimal_transport(
        lambda x0, x1, cond: couplings.squared_euclidean(place(x0), place(x1), cond)
    )


def draw(mesh, values, n, seed):
    """n exact draws [n, 3] from the density that is proportional to `values` at the vertices and
    linear between: a face by its integral, then on it a mixture of Dirichlet(2, 1, 1) laws, one a
    corner."""
    rng = np.random.default_rng(seed)
    corners = values[mesh.faces]
    mass = mesh.areas * corners.sum(1)
    face = rng.choice(len(mass), n, p=mass / mass.sum())
    share = np.cumsum(corners[face] / corners[face].sum(1, keepdims=True), axis=1)
    corner = np.minimum((rng.random((n, 1)) > share).sum(1), 2)
    e = rng.exponential(size=(n, 3))
    e[np.arange(n), corner] += rng.exponential(size=n)
    weights = e / e.sum(1, keepdims=True)
    return np.einsum("ni,nij->nj", weights, mesh.vertices[mesh.faces[face]])


def trained(velocity, loss, rows, steps, key):
    """The averaged params after `steps` updates."""
    init_key, state_key, batch_key = jax.random.split(key, 3)
    schedule = optax.cosine_decay_schedule(2e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    params = velocity.init(init_key, jnp.asarray(rows[:2]), jnp.zeros(2))
    state = train.init_state(params, optimizer, state_key, ema=0.999)
    step = train.make_step(loss, optimizer, ema=train.ema.warmup(0.999))
    rows = jnp.asarray(rows)

    @functools.partial(jax.jit, donate_argnums=0)
    def some(state, key):
        def one(state, key):
            at = jax.random.randint(key, (256,), 0, len(rows))
            state, metrics = step(state, {"x": rows[at]})
            return state, metrics["loss"]

        state, values = jax.lax.scan(one, state, jax.random.split(key, INNER))
        return state, jnp.mean(values)

    for i, of_these in enumerate(jax.random.split(batch_key, max(1, steps // INNER))):
        state, value = some(state, of_these)
        if i % 10 == 0:
            print(f"update {(i + 1) * INNER}: loss {float(value):.4f}", flush=True)
    return state.ema


def log_density(mesh, values, x):
    """[n] nats: of the density that is drawn from."""
    corners, (face, weights) = values[mesh.faces], located(mesh, x)
    mass = np.sum(mesh.areas * corners.mean(1))
    return np.log(np.sum(weights * corners[face], axis=1) / mass)


def located(mesh, x):
    face, weights = jax.jit(mesh.locate)(jnp.asarray(x, jnp.float32))
    return np.asarray(face), np.asarray(weights, np.float64)


def features(mesh, x, time=0.02):
    """[n, k]: the eigenfunctions at x, times exp(-time eigenvalue / 2)."""
    face, weights = located(mesh, x)
    functions = mesh.eigenfunctions * np.exp(-time * mesh.eigenvalues / 2)
    return np.einsum("ni,nik->nk", weights, functions[mesh.faces[face]])


def two_sample(mesh, x, y, seed, permutations=999):
    """The statistic as a multiple of its mean over permutations, and the p-value."""
    rng = np.random.default_rng(seed)
    both, n = np.concatenate([features(mesh, x), features(mesh, y)]), len(x)
    signs = np.repeat([1 / n, -1 / len(y)], [n, len(y)])
    null = [np.sum((rng.permutation(signs) @ both) ** 2) for _ in range(permutations)]
    statistic = np.sum((signs @ both) ** 2)
    p = (1 + np.sum(np.array(null) >= statistic)) / (permutations + 1)
    return float(statistic / np.mean(null)), round(float(p), 4)


def picture(mesh, values, target, samples, path, view):
    """The target, draws from it and samples, seen from two sides."""
    axes, signs = view
    turn = lambda x: x[..., axes] * signs  # noqa: E731 - right, up, towards the eye
    corners = turn(mesh.vertices)[mesh.faces]
    normals = np.cross(*np.moveaxis(np.diff(mesh.vertices[mesh.faces], axis=1), 1, 0))
    normals = turn(normals / np.linalg.norm(normals, axis=1, keepdims=True))
    low, high = corners.min((0, 1)), corners.max((0, 1))
    figure, grid = plt.subplots(2, 3, figsize=(8, 5.4))
    for row, (flip, side) in zip(grid, ((1, "one side"), (-1, "the other")), strict=True):
        seen = np.flatnonzero(flip * normals[:, 2] > 0)
        seen = seen[np.argsort(flip * corners[seen].mean(1)[:, 2])]
        for axis, (title, points) in zip(
            row, (("target", None), ("draws from it", target), ("samples", samples)), strict=True
        ):
            shade = values[mesh.faces[seen]].mean(1) / values.max()
            color = plt.get_cmap("viridis")(shade)
            if points is not None:
                color = np.full((len(seen), 4), 0.9)
            color[:, :3] *= 0.6 + 0.4 * np.abs(normals[seen, 2:])
            patches = matplotlib.collections.PolyCollection(
                corners[seen][:, :, :2] * [flip, 1], facecolors=color, edgecolors="face", lw=0.2
            )
            axis.add_collection(patches)
            if points is not None:
                face, _ = located(mesh, points)
                shown = turn(points)[flip * normals[face, 2] > 0.05]
                axis.scatter(flip * shown[:, 0], shown[:, 1], s=1.5, lw=0, c="tab:red")
            axis.set(xlim=sorted((flip * low[0], flip * high[0])), ylim=(low[1], high[1]))
            axis.set_aspect("equal")
            axis.set_title(f"{title}, {side}", fontsize=9)
            axis.axis("off")
    figure.tight_layout()
    with io.BytesIO() as file:
        figure.savefig(file, dpi=70)
        Image.open(file).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
