import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import solvers
from jflow.nets._deepflow import DeepFlow, branch_field, last_velocity

NET = DeepFlow(patch_size=2, width=8, num_layers=6, branches=3, num_heads=2, num_classes=5)
FIELD = branch_field(NET)


def inputs(seed=0, b=2):
    key = jax.random.key(seed)
    return jax.random.normal(key, (b, 4, 4, 2)), jnp.linspace(0.2, 0.7, b), jnp.arange(b)


@pytest.fixture(scope="module")
def params():
    made = jax.jit(FIELD.init)(jax.random.key(0), *inputs())
    return jax.tree.map(
        lambda p: p + 0.2 * np.random.default_rng(p.size).standard_normal(p.shape, np.float32), made
    )


def test_shapes_and_zero_at_first():
    x, t, cond = inputs()
    made = jax.jit(FIELD.init)(jax.random.key(0), x, t, cond)
    out = jax.jit(FIELD.apply)(made, x, t, cond)
    assert out.velocity.shape == (2, 3, 4, 4, 2) and out.acceleration.shape == (2, 2, 4, 4, 2)
    assert not np.any(out.velocity) and not np.any(out.acceleration)
    # scanned: params of later branches and of blocks are stacked
    assert made["rest"]["branch"]["blocks"]["in"]["kernel"].shape[:2] == (2, 2)


def test_the_last_velocity_is_that_of_all_branches_at_one_point(params):
    x, t, cond = inputs()
    last = last_velocity(FIELD)
    spread = jax.jit(FIELD.apply)(params, jnp.stack([x] * 3, 1), jnp.stack([t] * 3, 1), cond)
    np.testing.assert_allclose(
        jax.jit(last.apply)(params, x, t, cond), spread.velocity[:, -1], atol=1e-5
    )
    x1, info = jax.jit(lambda x: solvers.sample(last, params, x, cond, method=2))(x)
    assert x1.shape == x.shape and np.all(info.evaluations == 4)


def test_a_branch_sees_its_own_point_and_those_before(params):
    x, t, cond = inputs()
    x, t = jnp.stack([x, x + 0.1, x - 0.2], 1), jnp.stack([t, t + 0.1, t + 0.15], 1)
    apply = jax.jit(FIELD.apply)
    base = apply(params, x, t, cond)
    for j in range(3):
        for changed in (
            apply(params, x.at[:, j].add(0.5), t, cond),
            apply(params, x, t.at[:, j].add(0.05), cond),
        ):
            moved = np.abs(changed.velocity - base.velocity).max(axis=(0, 2, 3, 4))
            assert np.all(moved[:j] == 0) and np.all(moved[j:] > 1e-5), (j, moved)
            pushed = np.abs(changed.acceleration - base.acceleration).max(axis=(0, 2, 3, 4))
            assert np.all(pushed[:j] == 0) and np.all(pushed[j:] > 1e-5), (j, pushed)


def test_rows_do_not_mix(params):
    x, t, cond = inputs()
    apply = jax.jit(FIELD.apply)
    both, other = apply(params, x, t, cond), apply(params, x.at[1].add(1.0), t, cond)
    np.testing.assert_allclose(both.velocity[0], other.velocity[0], atol=1e-6)
    assert np.max(np.abs(both.velocity[1] - other.velocity[1])) > 1e-3


def test_remat_and_dropout(params):
    x, t, cond = inputs()
    plain = jax.jit(FIELD.apply)(params, x, t, cond)
    again = jax.jit(branch_field(NET.clone(remat=True)).apply)(params, x, t, cond)
    np.testing.assert_allclose(plain.velocity, again.velocity, atol=1e-5)
    noisy = jax.jit(branch_field(NET.clone(dropout=0.5)).apply)
    assert (
        np.max(np.abs(noisy(params, x, t, cond, key=jax.random.key(0)).velocity - plain.velocity))
        > 1e-3
    )
    np.testing.assert_allclose(noisy(params, x, t, cond).velocity, plain.velocity, atol=1e-6)


def test_bad_input_says_so(params):
    with pytest.raises(
        ValueError, match="at least 2 branches that divide num_layers=4, got branches=3"
    ):
        DeepFlow(num_layers=4, branches=3)
    x, t, cond = inputs()
    with pytest.raises(
        ValueError,
        match=r"or x \[b, 3, H, W, C\] and t \[b, 3\].*got \[2, 2, 4, 4, 2\] and \[2, 2\]",
    ):
        FIELD.apply(params, jnp.stack([x] * 2, 1), jnp.stack([t] * 2, 1), cond)
