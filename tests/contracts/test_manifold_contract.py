"""Every manifold against every promise of `types.Manifold`, in float64, where its functions are
differentiated too, and in float32 at the points where formulas are 0 / 0."""

import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import manifolds, solvers
from jflow.types import Manifold

HALF_TURN = np.diag([1.0, -1.0, -1.0])


class Row(NamedTuple):
    manifold: Manifold
    opposite: Any = None  # x -> a point as far from x as can be
    special: tuple = ()  # points where eigenvalues meet, or on an edge
    isometric: bool = True  # whether log_volume_element is that of the coordinates' Euclidean one
    log_volume: float = math.inf
    off: float = 1.0  # how large a number added to the first coordinate leads off it
    shown: tuple[int, ...] | None = None  # the shape of embed(x), where it is not that of x


TABLE = {
    "euclidean": Row(manifolds.euclidean(2), off=np.nan),
    "hyperboloid": Row(manifolds.hyperboloid(2), isometric=False),
    "poincare_ball": Row(manifolds.poincare_ball(2), special=(np.zeros(2),)),
    "product": Row(
        manifolds.product(manifolds.sphere(2), manifolds.torus(1), manifolds.euclidean(1)),
        lambda x: np.concatenate([-x[:, :3], x[:, 3:4] + np.pi, x[:, 4:]], axis=1),
        shown=(6,),
    ),
    "simplex": Row(
        manifolds.simplex(3),
        special=(np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.5, 0.5])),
        log_volume=np.log(2 * np.pi),  # an eighth of a sphere of radius 2
    ),
    "so3": Row(manifolds.so3(), lambda x: x @ HALF_TURN, log_volume=np.log(8 * np.pi**2)),
    "spd": Row(manifolds.spd(2), special=(np.eye(2), 1e-3 * np.eye(2)), off=-1e3),
    "spd_log_euclidean": Row(manifolds.spd_log_euclidean(2), special=(np.eye(2),), off=-1e3),
    "sphere": Row(
        manifolds.sphere(2),
        lambda x: -x,
        (np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, -1.0]), np.array([0.0, 1.0, 0.0])),
        log_volume=np.log(4 * np.pi),
    ),
    "sphere of one": Row(manifolds.sphere(1), lambda x: -x, log_volume=np.log(2 * np.pi)),
    "torus": Row(
        manifolds.torus(2),
        lambda x: x + np.pi,
        log_volume=2 * np.log(2 * np.pi),
        off=2 * np.pi,
        shown=(4,),
    ),
}
EXCUSED = {
    "check": "in this file, with bad input",
    "tangent": "tests/solvers/test_manifold_solvers.py",
    **dict.fromkeys(
        "from_latitude_longitude to_latitude_longitude to_hyperboloid to_poincare_ball".split(),
        "changes of coordinates, in this file",
    ),
    **dict.fromkeys(
        ("from_quaternion", "to_quaternion"),
        "coordinates, tests/flows/test_rotations.py",
    ),
    **dict.fromkeys(
        "LieGroup frechet_mean lie_batch_norm log_euclidean_group rotation_group running_mean"
        " spd_group".split(),
        "batch normalization on groups: tests/manifolds/test_batch_norm.py",
    ),
    **dict.fromkeys(
        "Mesh biharmonic commute diffusion laplacian mesh mesh_bijector raviart_thomas read_obj"
        " surface".split(),
        "triangle meshes, whose log is none of exp: tests/manifolds/test_mesh.py",
    ),
}
N = 6


def test_every_public_name_is_in_the_table():
    assert set(manifolds.__all__) == {name.split()[0] for name in TABLE} | set(EXCUSED)


def points(name, n=2 * N):
    """n points in float64, and as many arrays of numbers of the same shape."""
    manifold, rng = TABLE[name].manifold, np.random.default_rng(0)
    with jax.enable_x64(True):
        x = np.asarray(jax.jit(manifold.random, static_argnums=1)(KEYS[0], n), np.float64)
    return x, rng.normal(size=x.shape)


@pytest.mark.parametrize("name", TABLE)
def test_geometry(name, x64):
    """In float64: exp and log are inverse, distances are lengths and symmetric, the geodesic has
    constant speed; projections are idempotent; bases are orthonormal, and volumes those of the
    metric; jit is no jit and leading axes are rows."""
    row = TABLE[name]
    manifold, rank = row.manifold, len(row.manifold.shape)
    assert isinstance(manifold, Manifold)
    some, noise = points(name)
    x, y, noise = some[:N], some[N:], noise[:N]
    column = (-1, *[1] * rank)
    traces = []

    @jax.jit
    def run(x, y, noise):
        traces.append(1)
        v, u = manifold.log(x, y), manifold.to_tangent(x, noise)
        basis = manifold.tangent_basis(x)
        e = jnp.moveaxis(basis, 1, 0)
        along = lambda s: manifold.exp(x, s.reshape(column) * v)  # noqa: E731
        pairs = jax.vmap(jax.vmap(lambda a, b: manifold.inner(x, a, b), (None, 0)), (0, None))
        ends = jnp.moveaxis(manifold.tangent_basis(y), 1, 0)
        columns = jax.vmap(lambda a: jax.jvp(lambda w: manifold.exp(x, w), (v,), (a,))[1])(e)
        jacobian = jax.vmap(jax.vmap(lambda a, b: manifold.inner(y, a, b), (None, 0)), (0, None))(
            ends, columns
        )
        one = jnp.ones(N)
        middle, speed = jax.jvp(along, (0.5 * one,), (one,))
        flat = e.reshape(manifold.dim, N, -1)
        radial = solvers.riemannian_divergence(manifold)
        return {
            "y": manifold.exp(x, v),
            "x": manifold.exp(x, 0 * v),
            "v": v,
            "length": jnp.sqrt(manifold.inner(x, v, v)),
            "dist": manifold.dist(x, y),
            "back": manifold.dist(y, x),
            "speed": jnp.sqrt(manifold.inner(middle, speed, speed)),
            "half": manifold.dist(x, middle),
            "start": jax.jvp(along, (0 * one,), (one,))[1],
            "projected": manifold.project(x),
            "brought": manifold.project(x + 0.3 * noise),
            "again": manifold.project(manifold.project(x + 0.3 * noise)),
            "u": u,
            "u again": manifold.to_tangent(x, u),
            "u moved": jax.jvp(manifold.project, (x,), (u,))[1],
            "normal": manifold.inner(x, u - noise, u) if row.isometric else 0 * one,
            "basis": manifold.to_tangent(x[:, None], basis),
            "gram": pairs(e, e),
            "log_det": jnp.linalg.slogdet(jnp.moveaxis(jacobian, 2, 0))[1],
            "log_det_exp": manifold.log_det_exp(x, v),
            "volume": manifold.log_volume_element(x)
            + 0.5 * jnp.linalg.slogdet(jnp.einsum("dbi,ebi->bde", flat, flat))[1],
            "divergence": radial.apply(lambda y: -manifold.log(y, x), y, None)[1],
            "growth": manifold.dim
            + jax.jvp(lambda s: manifold.log_det_exp(x, s.reshape(column) * v), (one,), (one,))[1],
            "embed": manifold.embed(x),
        }

    found = jax.device_get(run(x, y, noise))
    run(y, x, noise)
    assert len(traces) == 1
    close = lambda a, b, **more: np.testing.assert_allclose(  # noqa: E731
        *np.broadcast_arrays(found[a], found[b] if isinstance(b, str) else b),
        rtol=1e-8,
        atol=1e-8,
        err_msg=f"{a} {b if isinstance(b, str) else ''}",
        **more,
    )
    close("y", y)
    close("x", x)
    close("projected", x)
    for same in ("dist", "back", "speed"):
        close(same, "length")
    close("half", found["length"] / 2)
    close("start", "v")
    close("again", "brought")
    close("u again", "u")
    close("u moved", "u")
    if name not in ("simplex", "spd", "spd_log_euclidean"):  # orthogonal in the metric or not
        close("normal", 0.0)
    close("basis", np.asarray(jax.jit(manifold.tangent_basis)(x)))
    close("gram", np.eye(manifold.dim)[:, :, None])
    close("log_det", "log_det_exp")
    close("divergence", "growth")  # of the field whose flow grows the distance from x
    if row.isometric:
        close("volume", found["volume"][0])
    assert found["embed"].shape == (N, *(row.shown or manifold.shape))
    if name not in ("product", "euclidean", "torus"):
        np.testing.assert_allclose(manifold.log_volume, row.log_volume, rtol=1e-12)
    # without jit, with two leading axes, and with one point for all
    np.testing.assert_allclose(manifold.exp(x, found["v"]), y, rtol=1e-8, atol=1e-8)
    shape = (2, N // 2, *manifold.shape)
    grid = jax.jit(manifold.dist)(x.reshape(shape), y.reshape(shape))
    np.testing.assert_allclose(grid.reshape(-1), found["dist"], rtol=1e-12)
    one = jax.jit(manifold.dist)(x[0], y)
    np.testing.assert_allclose(one[0], found["dist"][0], rtol=1e-12)
    assert one.shape == (N,)


def hard_pairs(name):
    """(x, y) in float32: equal, one ulp beside, opposite, and one ulp beside that."""
    row = TABLE[name]
    x = points(name)[0][:2]
    x = np.concatenate([x, *(s[None] for s in row.special)]) if row.special else x
    pairs = [(x, x)]
    if row.opposite is not None:
        x_ = points(name)[0][:2]
        pairs.append((x_, row.opposite(x_)))
    if row.special:
        pairs.append((x[:1], row.special[0][None]))
    a, b = (np.concatenate(side).astype(np.float32) for side in zip(*pairs, strict=True))
    a = np.concatenate([a, a])
    b = np.concatenate([b, np.nextafter(b, np.float32(9))])
    return a, b


@pytest.mark.parametrize("name", TABLE)
def test_hard_points(name):
    """In float32, at equal points, at antipodes, and one ulp beside: values and gradients are
    finite, exp(log) is the other point, and its length is the distance."""
    manifold = TABLE[name].manifold
    x, y = hard_pairs(name)

    @jax.jit
    def run(x, y):
        weight = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        total = lambda f: lambda *a: jnp.sum(weight * f(*a))  # noqa: E731
        v = manifold.log(x, y)
        grads = {
            "log": jax.grad(total(manifold.log), (0, 1))(x, y),
            "exp": jax.grad(total(manifold.exp), (0, 1))(x, v),
            "exp of 0": jax.grad(total(manifold.exp), (0, 1))(x, 0 * v),
            "dist": jax.grad(lambda x, y: jnp.sum(manifold.dist(x, y)), (0, 1))(x, y),
            "inner": jax.grad(lambda x, v: jnp.sum(manifold.inner(x, v, v)), (0, 1))(x, v),
            "basis": jax.grad(lambda x: jnp.sum(jnp.sin(manifold.tangent_basis(x))))(x),
            "project": jax.grad(total(manifold.project))(x),
            "log_det_exp": jax.grad(lambda v: jnp.sum(manifold.log_det_exp(x, 0.5 * v)))(v),
            "element": jax.grad(lambda x: jnp.sum(manifold.log_volume_element(x)))(x),
        }
        along = lambda s: manifold.exp(x, s * v)  # noqa: E731
        values = {
            "reached": manifold.exp(x, v),
            "dist": manifold.dist(x, y),
            "length": jnp.sqrt(manifold.inner(x, v, v)),
            "target": jax.jvp(along, (jnp.ones(()) / 2,), (jnp.ones(()),))[1],
        }
        return grads, values

    grads, values = jax.device_get(run(x, y))
    for path, leaf in jax.tree_util.tree_leaves_with_path((grads, values)):
        assert np.all(np.isfinite(leaf)), (jax.tree_util.keystr(path), leaf)
    apart = values["reached"] - y
    if name in ("torus", "product"):  # angles
        apart = apart - 2 * np.pi * np.round(apart / (2 * np.pi))
    assert np.max(np.abs(apart) / np.maximum(1, np.abs(y))) < 5e-6, apart
    np.testing.assert_allclose(values["dist"], values["length"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", TABLE)
def test_types_keys_and_shapes(name):
    """What is in coordinates keeps the type of x, numbers are float32 at least; a key is consumed
    once; a wrong shape is an error in the name of the function."""
    manifold = TABLE[name].manifold
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        wide = jnp.float32 if dtype == jnp.bfloat16 else dtype
        with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
            x = jax.ShapeDtypeStruct((3, *manifold.shape), dtype)
            for function in ("exp", "log", "to_tangent", "project", "tangent_basis", "embed"):
                two = (x, x) if function in ("exp", "log", "to_tangent") else (x,)
                assert jax.eval_shape(getattr(manifold, function), *two).dtype == dtype, function
            assert jax.eval_shape(manifold.dist, x, x).dtype == wide
            assert jax.eval_shape(manifold.inner, x, x, x).dtype == wide
            assert jax.eval_shape(manifold.log_det_exp, x, x).dtype == wide
            assert jax.eval_shape(manifold.log_volume_element, x).dtype == wide
    assert not keys_consumed_twice(lambda key: manifold.random(key, 2), KEYS[0])
    pytest.importorskip("cloudpickle")
    again = pickle.loads(pickle.dumps(manifold))
    assert type(again) is Manifold and again.shape == manifold.shape
    zeros = np.zeros((1, *manifold.shape), np.float32)
    assert jax.eval_shape(again.log, zeros, zeros).shape == zeros.shape
    bad = jnp.zeros((3, *manifold.shape[:-1], manifold.shape[-1] + 1))
    function = name.split()[0]
    expected = rf"{function}.exp: expected v of shape \[\.\.\., "
    with pytest.raises(ValueError, match=expected):
        manifold.exp(bad[..., 1:], bad)
    with pytest.raises(
        TypeError, match=rf"{function}.exp: expected x, v|{function}.exp: expected p"
    ):
        manifold.exp(bad[..., 1:])


@pytest.mark.parametrize("name", TABLE)
def test_points_off_the_manifold_are_named(name):
    row = TABLE[name]
    x = points(name)[0][:4].astype(np.float32)
    manifolds.check(row.manifold, x)
    moved = x.copy()
    moved.reshape(4, -1)[2, 0] += row.off
    with pytest.raises(ValueError, match=r"manifolds.check: .* got 1 of 4 rows .*, row 2 by "):
        manifolds.check(row.manifold, moved)
    with pytest.raises(ValueError, match=r"manifolds.check: expected x of shape \[b, "):
        manifolds.check(row.manifold, x[0])


def test_degrees_are_told_from_radians():
    """On a torus, and of the earth, where rows outside are named."""
    torus = manifolds.torus(2)
    with pytest.raises(ValueError, match="angles up to 170 seem to be degrees: numpy.radians"):
        manifolds.check(torus, np.array([[0.5, 1.0], [170.0, -60.0]]))
    with pytest.raises(ValueError, match="radians in .*, which manifold.project"):
        manifolds.check(torus, np.array([[0.5, 1.5 * np.pi]]))
    with pytest.raises(ValueError, match="from_latitude_longitude makes points"):
        manifolds.check(manifolds.sphere(2), np.zeros((4, 2)))
    degrees = np.array([[45.0, 170.0], [-90.0, 0.0], [12.5, -180.0], [0.0, 0.0]])
    x = manifolds.from_latitude_longitude(degrees)
    manifolds.check(manifolds.sphere(2), x, tolerance=1e-6)
    np.testing.assert_allclose(x[3], [1, 0, 0])
    np.testing.assert_allclose(x[0, 2], np.sqrt(0.5))
    back = manifolds.to_latitude_longitude(x)
    np.testing.assert_allclose(back[[0, 1, 3]], degrees[[0, 1, 3]], atol=1e-12)
    np.testing.assert_allclose(np.abs(back[2]), [12.5, 180])
    for rows, said in (
        ([[0, 0], [91, 0]], r"got 1 rows outside, row 1: \[91, 0\]"),
        ([[0, 0], [0, 181], [0, np.nan]], "got 2 rows outside"),
        ([[-122.0, 37.0]], "the columns seem to be in the other order"),
    ):
        with pytest.raises(ValueError, match=said):
            manifolds.from_latitude_longitude(rows)


def test_two_models_of_hyperbolic_space(x64):
    """The map between them keeps distances, and carries geodesics."""
    ball, sheet = TABLE["poincare_ball"].manifold, TABLE["hyperboloid"].manifold
    x, y = np.split(points("poincare_ball")[0], 2)
    up = manifolds.to_hyperboloid
    np.testing.assert_allclose(manifolds.to_poincare_ball(up(x)), x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ball.dist(x, y), sheet.dist(up(x), up(y)), rtol=1e-9)
    middle = ball.exp(x, 0.3 * ball.log(x, y))
    other = sheet.exp(up(x), 0.3 * sheet.log(up(x), up(y)))
    np.testing.assert_allclose(up(middle), other, rtol=1e-9, atol=1e-9)


def test_symmetries(x64):
    """The affine-invariant distance under X -> A X A', that of rotations from both sides, and the
    Fisher distance of two coins."""
    x, y = np.split(points("spd")[0], 2)
    a = np.array([[1.0, 2.0], [-0.5, 0.3]])
    dist = TABLE["spd"].manifold.dist
    np.testing.assert_allclose(dist(a @ x @ a.T, a @ y @ a.T), dist(x, y), rtol=1e-8)
    r, s = np.split(points("so3")[0], 2)
    dist = TABLE["so3"].manifold.dist
    np.testing.assert_allclose(dist(r[0] @ r @ s[0], r[0] @ s @ s[0]), dist(r, s), rtol=1e-9)
    p, q = np.array([0.3, 0.7]), np.array([0.9, 0.1])
    expected = 2 * np.arccos(np.sqrt(p * q).sum())
    np.testing.assert_allclose(manifolds.simplex(2).dist(p, q), expected, rtol=1e-12)


def test_far_points_of_a_projection():
    """The nearest rotation and the nearest positive matrix, by hand; zero goes to some point."""
    so3, spd, sphere = (TABLE[name].manifold for name in ("so3", "spd", "sphere"))
    rotation = points("so3")[0][0]
    stretch = np.diag([3.0, 2.0, 0.5])
    np.testing.assert_allclose(so3.project(rotation @ stretch), rotation, atol=1e-5)
    flipped = so3.project(rotation @ np.diag([3.0, 2.0, -0.5]))
    np.testing.assert_allclose(flipped, rotation, atol=1e-5)
    np.testing.assert_allclose(spd.project(np.diag([2.0, -1.0])), np.diag([2.0, 0.0]), atol=2e-6)
    assert np.all(np.linalg.eigvalsh(spd.project(np.diag([2.0, -1.0]))) > 0)
    np.testing.assert_allclose(np.linalg.norm(sphere.project(np.zeros(3))), 1)
    np.testing.assert_allclose(
        manifolds.poincare_ball(2).project(np.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-5
    )


def test_bad_options_fail_at_construction():
    for name in "sphere torus euclidean hyperboloid poincare_ball spd spd_log_euclidean".split():
        for size in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"manifolds.{name}: expected"):
                getattr(manifolds, name)(size)
    with pytest.raises(ValueError, match="manifolds.simplex: .* at least 2, got 1"):
        manifolds.simplex(1)
    with pytest.raises(ValueError, match="manifolds.product: expected at least one"):
        manifolds.product()
    with pytest.raises(TypeError, match="manifolds.product: expected a Manifold, got 3"):
        manifolds.product(manifolds.sphere(2), 3)
    with pytest.raises(TypeError, match="manifolds.check: expected a Manifold"):
        manifolds.check(manifolds.sphere, np.zeros((1, 3)))


PEERS = Path(__file__).parents[1] / "peers"
GEOMSTATS, GEOOPT = (np.load(PEERS / f"{name}.npz") for name in ("manifolds", "geoopt"))
LARGER = {  # those of make_geoopt_fixtures.py
    "hyperboloid": manifolds.hyperboloid(3),
    "poincare_ball": manifolds.poincare_ball(3),
    "product": manifolds.product(manifolds.sphere(3), manifolds.poincare_ball(2)),
    "spd": manifolds.spd(3),
    "sphere": manifolds.sphere(4),
}


def equals_peer(manifold, peer, name):
    """exp, log and distance to 1e-6."""
    x, y, v, exp, log, dist = (
        peer[f"{name}.{part}"] for part in ("x", "y", "v", "exp", "log", "dist")
    )

    @jax.jit
    def run(x, y, v):
        return manifold.exp(x, v), manifold.log(x, y), manifold.dist(x, y)

    for found, expected in zip(run(x, y, v), (exp, log, dist), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted({key.split(".")[0] for key in GEOMSTATS.files}))
def test_geomstats(name, x64):
    """In float64 (make_manifold_fixtures.py)."""
    equals_peer(TABLE[name].manifold, GEOMSTATS, name)


@pytest.mark.parametrize("name", LARGER)
def test_geoopt(name, x64):
    """In float64 (make_geoopt_fixtures.py)."""
    equals_peer(LARGER[name], GEOOPT, name)
