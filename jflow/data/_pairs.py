"""Reflow: pairs (x0, x1) that a trained velocity connects, on which the next one is trained.

The k-rectified flow, as a loop (`source` draws noise, or rows of another data set):

    rows = {"x": data}  # 1-rectified: noise and data are paired at random
    for k, (train_key, pairs_key) in enumerate(jax.random.split(key, (rounds, 2)), 1):
        step = train.make_step(losses.flow_matching(velocity), optimizer)
        state = train.init_state(params, optimizer, train_key)
        batches = data.batches(rows, 256)
        state = train.fit(state, step, batches, steps=20_000, workdir=runs / f"{k}").state
        params = state.params
        folder = runs / f"pairs-{k}"
        generate_reflow_pairs(folder, velocity, params, source, 10**6, key=pairs_key)
        rows = read_shards(folder)  # {'x0', 'x'}: what flow_matching reads
    one_step = losses.distillation(velocity)  # ... and the last pairs into one step

One round is enough where the second is trained as in Lee, Lin, Fanti, *Improving the Training of
Rectified Flows*, 2024, arXiv:2405.20320: from the params of the first, on times at both ends
(`times.u_shaped()`) and with an error that forgives outliers
(`losses.pseudo_huber(0.00054 * math.sqrt(dimensions))`, or `losses.perceptual_huber` for images);
`losses.fresh_source` before the loss mixes real rows in.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from jflow import solvers
from jflow._core.times import partition
from jflow.data._placement import place
from jflow.data._shards import Draw, write_shards
from jflow.data._splits import Rows, count, take
from jflow.solvers import Method
from jflow.types import Array, Cond, Key, Params, Velocity


def truncate_pairs(rows: Rows, share: float) -> dict[str, np.ndarray]:
    """Pairs of a reflow without the share of them that lie farthest apart.

    Long pairs are where the rectified flow is still curved, and `losses.mean_flow` learns badly.
    What is lost is that part of the data too. The paper's code drops pairs beyond a fixed distance;
    a share needs no scale, and is a fixed distance for given rows.

    Args:
        rows: {'x0', 'x', ...} of `generate_reflow_pairs`.
        share: The share that is left out by |x - x0|, 0 <= share < 1.

    Returns:
        The rows that are kept, in their order, read into memory.

    Raises:
        ValueError: For another share, and for rows without 'x0' and 'x' of one shape.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> rows = {"x0": np.zeros((4, 1)), "x": np.array([[1.0], [9.0], [2.0], [3.0]])}
        >>> data.truncate_pairs(rows, 0.25)["x"][:, 0].tolist()
        [1.0, 2.0, 3.0]

    References:
        Zhang et al., *Flow Straighter and Faster: Efficient One-Step Generative Modeling via
        MeanFlow on Rectified Trajectories*, 2025, arXiv:2511.23342.
    """
    if not 0 <= share < 1:
        raise ValueError(f"truncate_pairs: expected share in [0, 1), got {share}")
    if not {"x0", "x"} <= set(rows):
        raise ValueError(
            f"truncate_pairs: expected pairs, 'x0' beside 'x', got the keys {sorted(rows)}"
        )
    x0, x = rows["x0"], rows["x"]
    if x0.shape != x.shape:
        raise ValueError(
            f"truncate_pairs: expected 'x0' of the shape of 'x', {list(x.shape)}, got"
            f" {list(x0.shape)}"
        )
    n, part = count(rows), 65536  # so many rows are looked at together
    square = lambda at: np.square(np.subtract(x[at], x0[at], dtype=np.float64))  # noqa: E731
    far = [
        square(slice(i, i + part)).reshape(min(part, n - i), -1).sum(axis=1)
        for i in range(0, n, part)
    ]
    kept = np.argsort(np.concatenate(far), kind="stable")[: n - round(share * n)]
    return take(rows, np.sort(kept))


Source = Callable[[Key, int], Mapping[str, Any]]
"""(key, n) -> {'x0': [n, *event]} to carry forward or {'x': [n, *event]} to carry backward.

'cond' [n, ...], if any, is one array. Split the key where noise and conditions are both drawn: from
one key they would depend on each other."""


_PAIRS, _SEGMENT = solvers.fixed(100, diffrax.Heun()), solvers.fixed(25, diffrax.Heun())


def generate_reflow_pairs(
    folder: str | Path,
    velocity: Velocity,
    params: Params,
    source: Source,
    n: int,
    *,
    key: Key,
    method: Method | int | None = None,
    batch: int = 1024,
    shard: int = 65536,
    about: Mapping[str, Any] | None = None,
    share: tuple[int, int] = (0, 1),
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = True,
) -> None:
    """Reflow: writes pairs of noise and data that a trained velocity connects.

    Also known as: reflow, rectified flow pairs, 2-rectified flow, generate pairs for reflow,
    rectification.

    `read_shards` gives the rows {'x0', 'x'} (and 'cond'), which `losses.flow_matching` reads for
    the next rectified flow and `losses.distillation` for one step. After a kill, the same call goes
    on where it was and writes the same bytes. The manifest of the folder holds the method and a
    digest of params; what the velocity and the source close over (a guidance scale, a data set) is
    not seen: name it in `about`, so that a change of it is refused.

    Args:
        folder: Where the shards go; made if it is not there.
        velocity: The trained velocity.
        params: The velocity's params.
        source: (key, n) -> {'x0': [n, *event]} and perhaps 'cond', from which the ODE runs from t=0
            to 1 (`normal_source`, `rows_source`); or {'x': ...}, real data whose noise is wanted,
            from which it runs from 1 to 0.
        n: How many pairs.
        key: Of the source's draws.
        method: How the ODE is solved, as in `solvers.sample`, a grid rising from 0 to 1; 100 steps
            of Heun by default.
        batch: Rows that are solved at once.
        shard: Rows in a file, a multiple of batch.
        about: JSON that names what made the rows.
        share: (i, workers) writes each workers-th shard from the i-th on, for several processes
            that write to one folder.
        sharding: Where a batch lies, such as train.data_sharding(mesh): its devices share the rows.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: For a folder that was made with other options, which it names; for counts below
            1; for a source that gives neither or both of 'x0' and 'x', or names of its own.
        FloatingPointError: For rows that are not finite, such as those of a failed solve.

    Examples:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp
        >>> from jflow import data, types
        >>> double = lambda p, x, t, cond=None, *, key=None: jnp.log(2.0) * x
        >>> velocity, folder = types.Velocity(lambda *a: {}, double), tempfile.mkdtemp()
        >>> data.generate_reflow_pairs(
        ...     folder, velocity, {}, data.normal_source((2,)), 8,
        ...     key=jax.random.key(0), batch=4, shard=4, progress=False,
        ... )
        >>> rows = data.read_shards(folder)
        >>> bool(jnp.allclose(rows["x"][:], 2 * rows["x0"][:], rtol=1e-3))
        True

    References:
        Liu, Gong, Liu, *Flow Straight and Fast: Learning to Generate and Transfer Data with
        Rectified Flow*, 2022, arXiv:2209.03003.
        Lee, Lin, Fanti, *Improving the Training of Rectified Flows*, 2024, arXiv:2405.20320 (pairs
        from real data).
    """
    there = solvers.as_method("generate_reflow_pairs", method, _PAIRS)
    options = {
        name: value for name, value in there._asdict().items() if name not in ("grid", "adjoint")
    }
    grid = there.grid
    if grid is not None:
        grid = np.asarray(grid, np.float64)
        if (grid[0], grid[-1]) != (0.0, 1.0):
            raise ValueError(
                f"generate_reflow_pairs: expected a grid that rises from 0 to 1, got {grid}"
            )
        there = there._replace(grid=grid)

    def carry(params, start, cond, backward):
        t0, t1 = (1.0, 0.0) if backward and grid is None else (0.0, 1.0)
        how = solvers.reverse(there) if backward else there
        end, _ = solvers.sample(velocity, params, start, cond, method=how, t0=t0, t1=t1)
        return {"x0": end, "x": start} if backward else {"x0": start, "x": end}

    write_shards(
        folder,
        taught("generate_reflow_pairs", carry, params, source, sharding),
        n,
        key=key,
        batch=batch,
        shard=shard,
        about=described(
            params, {**options, "grid": None if grid is None else grid.tolist()}, about
        ),
        share=share,
        progress=progress,
    )


def normal_source(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Source:
    """Standard normal rows, the source of `generate_reflow_pairs`.

    Args:
        shape: Of an event.
        dtype: The type of the rows.

    Returns:
        (key, n) -> {'x0': [n, *shape]}.

    Examples:
        >>> import jax
        >>> from jflow import data
        >>> data.normal_source((2,))(jax.random.key(0), 3)["x0"].shape
        (3, 2)
    """
    return lambda key, n: {"x0": jax.random.normal(key, (n, *shape), dtype)}


def rows_source(rows: Rows) -> Source:
    """Rows of a data set, drawn with replacement, the source of `generate_reflow_pairs`.

    Args:
        rows: {'x0': [n, *event]} for data to data, or {'x': ...} for real data whose noise is
            wanted; 'cond' goes along.

    Returns:
        (key, n) -> n rows.
    """
    size = count(rows)

    def source(key, n):
        return take(
            rows,
            np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel()).integers(
                0, size, n
            ),
        )

    return source


def taught(
    name: str,
    carry: Callable[[Params, Array, Cond, bool], Rows],
    params: Params,
    source: Source,
    sharding: jax.sharding.Sharding | None,
) -> Draw:
    """The `Draw` of a teacher: rows of the source through carry(params, start, cond, backward),
    compiled once."""
    run = jax.jit(carry, static_argnums=3)
    if isinstance(sharding, jax.sharding.NamedSharding):
        params = jax.device_put(
            params, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        )

    def draw(key, n):
        given = dict(source(key, n))
        cond = given.pop("cond", None)
        if set(given) not in ({"x0"}, {"x"}):
            raise ValueError(
                f"{name}: expected source to give 'x0' or 'x', and 'cond' if any, got"
                f" {sorted(given)}"
            )
        if isinstance(cond, Mapping | tuple | list):
            raise ValueError(
                f"{name}: expected 'cond' of the source to be one array [n, ...], got a"
                f" {type(cond).__name__}"
            )
        (kind, start), *_ = given.items()
        start, cond = place((start, cond), sharding)
        rows = run(params, start, cond, kind == "x")
        return rows if cond is None else {**rows, "cond": cond}

    return draw


def described(
    params: Params, options: Mapping[str, Any], about: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a manifest says of a teacher: the user's words, the options, and 16 digits of the
    SHA-256 of params."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.asarray(leaf)
        digest.update(
            f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes()
        )
    taken = {"params", *options} & set(about or {})
    if taken:
        raise ValueError(f"about: the names {sorted(taken)} are taken")
    solver = re.sub(r" at 0x[0-9a-f]+", "", repr(options["solver"]))
    return {**(about or {}), **options, "solver": solver, "params": digest.hexdigest()[:16]}


def generate_reflow_trajectories(
    folder: str | Path,
    velocity: Velocity,
    params: Params,
    source: Source,
    n: int,
    knots: Sequence[float],
    *,
    key: Key,
    method: Method | int | None = None,
    batch: int = 1024,
    shard: int = 65536,
    about: Mapping[str, Any] | None = None,
    share: tuple[int, int] = (0, 1),
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = True,
) -> None:
    """Reflow with all that lies between: writes trajectories of a trained velocity at knots.

    `read_shards` gives the rows {'x': [n, K + 1, *event]} (and 'cond'), in rising time. What
    happens after a kill, the manifest and its digest are those of `generate_reflow_pairs`.

    Args:
        folder: Where the shards go; made if it is not there.
        velocity: The trained velocity.
        params: The velocity's params.
        source: (key, n) -> {'x0': [n, *event]}, which runs forward, or {'x': ...}, real data, which
            runs backward.
        n: How many trajectories.
        knots: K + 1 times from 0 to 1, rising strictly.
        key: Of the source's draws.
        method: The steps within each segment, `solvers.fixed(n, solver)` or n; 25 of Heun by
            default.
        batch: Rows that are solved at once.
        shard: Rows in a file, a multiple of batch.
        about: JSON that names what made the rows.
        share: (i, workers) writes each workers-th shard from the i-th on.
        sharding: Where a batch lies: its devices share the rows.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: For a folder that was made with other options, for knots that do not rise from 0
            to 1, and as `generate_reflow_pairs`.
        FloatingPointError: For rows that are not finite.
    """
    times = partition("generate_reflow_trajectories", knots)
    how = solvers.as_method(
        "generate_reflow_trajectories", method, _SEGMENT, accepts=(solvers.fixed,)
    )

    def carry(params, start, cond, backward):
        ends = times[::-1] if backward else times
        grids = np.stack(
            [np.linspace(a, b, how.steps + 1) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        )

        def segment(x, grid):
            on_grid = solvers.on_grid(grid, how.solver, adjoint=how.adjoint)
            x, _ = solvers.sample(velocity, params, x, cond, method=on_grid)
            return x, x

        _, states = jax.lax.scan(segment, start, jnp.asarray(grids))
        states = jnp.moveaxis(jnp.concatenate([start[None], states]), 0, 1)
        return {"x": states[:, ::-1] if backward else states}

    write_shards(
        folder,
        taught("generate_reflow_trajectories", carry, params, source, sharding),
        n,
        key=key,
        batch=batch,
        shard=shard,
        about=described(
            params, {"solver": how.solver, "steps": how.steps, "knots": times.tolist()}, about
        ),
        share=share,
        progress=progress,
    )
