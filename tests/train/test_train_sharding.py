"""Rules, meshes and what they give; training on eight fake devices is in
tests/processes/test_train_devices.py."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jflow import train

MESH = AbstractMesh((2, 4), ("data", "model"))
PARAMS = {
    "blocks": {"in": jnp.zeros((3, 8, 16)), "out": jnp.zeros((3, 16, 8))},
    "bias": jnp.zeros(6),
}


def test_rules_place_params_moments_and_average_alike():
    state = train.init_state(PARAMS, optax.adam(0.1), jax.random.key(0), ema=0.9)
    rules = [
        ("blocks/in$", P("data", "model")),
        (lambda path: path.endswith("out"), P(("data", "model"), None)),
    ]
    placed = train.shardings(state, MESH, rules)
    for tree in (placed.params, placed.ema, placed.opt_state[0].mu, placed.opt_state[0].nu):
        assert tree["blocks"]["in"].spec == P(
            None, "data", "model"
        )  # right-aligned: depth stays whole
        assert tree["blocks"]["out"].spec == P(None, ("data", "model"), None)
        assert tree["bias"].spec == P(None)
    assert placed.step.spec == placed.key.spec == placed.opt_state[0].count.spec == P()
    sizes = 3 * 8 * 16 * 4  # bytes of a block matrix
    assert (
        train.bytes_per_device(state, placed) == 4 * (2 * sizes // 8 + 6 * 4) + 4 + 4 + 8
    )  # two counts and a key


def test_the_first_rule_that_matches_decides():
    placed = train.shardings(
        PARAMS, MESH, [("bias", P("data")), (".*", train.fsdp("model", min_size=1))]
    )
    assert placed["bias"].spec == P(
        "data"
    )  # by the second rule it would be whole: 4 does not divide 6
    assert placed["blocks"]["in"].spec == P(None, None, "model")


@pytest.mark.parametrize(
    ("shape", "min_size", "spec"),
    [
        ((8, 16), 1, P(None, "model")),  # the largest
        ((16, 8), 1, P("model", None)),
        ((8, 8), 1, P(None, "model")),  # of two equals the later
        ((10, 8), 1, P(None, "model")),  # the largest that divides
        ((8, 3, 5), 1, P(None, None, None)),  # never the depth of a scan
        ((8, 16), 129, P(None, None)),  # small leaves stay whole
        ((6,), 1, P(None)),
    ],
)
def test_fsdp_takes_the_largest_axis_that_divides(shape, min_size, spec):
    rules = [(".*", train.fsdp("model", min_size=min_size))]
    assert train.shardings(jnp.zeros(shape), MESH, rules).spec == spec


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            [("blocks/in", P("model", None, None))],
            r"blocks/in: .* \[3, 8, 16\]: 3 over mesh axis model of size 4",
        ),
        (
            [("bias", P("model"))],
            r"bias: .* does not divide the shape \[6\]: 6 over mesh axis model of size 4",
        ),
        ([("bias", P(("data", "model")))], r"6 over mesh axis data x model of size 8"),
        ([("bias", P(None, "model"))], r"bias: .* names 2 axes, but the leaf has the shape \[6\]"),
        (
            [("bias", P("pipe"))],
            r"bias: .*the mesh has no axis 'pipe', only \{'data': 2, 'model': 4\}",
        ),
        ([(".*", train.fsdp("pipe"))], r"fsdp\(axis='pipe'\): the mesh has no axis 'pipe'"),
        (
            [("bias", P()), ("kernel", P())],
            r"rule 1, 'kernel', matches no leaf; there are bias, blocks/in",
        ),
    ],
)
def test_bad_rules(rules, said):
    with pytest.raises(ValueError, match=said):
        train.shardings(PARAMS, MESH, rules)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"data": 3}, "does not take 1 devices"),
        ({"data": 0}, "sizes >= 1"),
        ({"data": -1, "model": -1}, "one of them -1"),
        ({}, "got {}"),
    ],
)
def test_bad_meshes(axes, said):
    with pytest.raises(ValueError, match=said):
        train.make_mesh(axes, jax.devices()[:1])
