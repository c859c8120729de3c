"""Linear measurements against their matrices, read off one column at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.steering import Measurement, measurements

rng = np.random.default_rng(0)
SOME = rng.random((4, 6)) < 0.4
ONE_SIDED = np.arange(7) < 2  # the frequencies 0 and 1 of 0 1 2 3 -3 -2 -1
LOW_RANK = rng.normal(size=(5, 2)) @ rng.normal(size=(2, 4))
TABLE = {
    "matrix": (measurements.matrix(rng.normal(size=(2, 4))), (4,), (2,)),
    "matrix of low rank": (measurements.matrix(LOW_RANK), (4,), (5,)),
    "mask": (measurements.mask(SOME), (4, 6), (4, 6)),
    "mask of channels": (measurements.mask(np.stack([SOME, ~SOME], -1)), (4, 6, 2), (4, 6, 2)),
    "fourier": (measurements.fourier(ONE_SIDED), (7,), (7, 2)),
    "fourier of images": (measurements.fourier(np.stack([SOME] * 2, -1)), (4, 6, 2), (4, 6, 2, 2)),
    "blur": (measurements.blur([0.2, 0.7, 0.1], (6,)), (6,), (6,)),
    # the mean of two neighbors does not see the highest frequency at all
    "blur without some": (measurements.blur([0.5, 0.5], (6,)), (6,), (6,)),
    "blur of images": (measurements.blur(rng.random((3, 2)), (4, 6, 2)), (4, 6, 2), (4, 6, 2)),
    "downsample": (measurements.downsample(3, (6,)), (6,), (2,)),
    "downsample of images": (measurements.downsample(2, (4, 6, 2)), (4, 6, 2), (2, 3, 2)),
}
BY_HAND = {
    "blur": lambda x: 0.2 * np.roll(x, -1, 1) + 0.7 * x + 0.1 * np.roll(x, 1, 1),
    "downsample of images": lambda x: sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4,
    "mask": lambda x: x * SOME,
    "fourier": lambda x: np.stack(
        [part * ONE_SIDED / np.sqrt(7) for part in (np.fft.fft(x).real, np.fft.fft(x).imag)], -1
    ),
    "matrix of low rank": lambda x: x @ LOW_RANK.T,
}


@pytest.mark.parametrize("name", TABLE)
def test_against_its_matrix(name, x64):
    a, event, measured = TABLE[name]
    d, m = int(np.prod(event)), int(np.prod(measured))
    ridge, x = np.linspace(0.1, 2.0, m), rng.normal(size=(3, *event))

    @jax.jit
    def run(x, ridge):
        columns, rows = jnp.eye(d).reshape(d, *event), jnp.eye(m).reshape(m, *measured)
        inverses = a.pseudo_inverse(rows), a.pseudo_inverse(rows, ridge)
        unseen = measurements.null_space(a, x)
        return a.apply(columns), a.adjoint(rows), *inverses, a.apply(x), unseen

    full, adjoint, inverse, ridged, seen, unseen = jax.device_get(run(x, ridge))
    full = full.reshape(d, m).T
    back, inverse, ridged = (np.reshape(r, (m, d)).T for r in (adjoint, inverse, ridged))
    close = lambda got, want: np.testing.assert_allclose(got, want, atol=1e-12)  # noqa: E731
    close(back, full.T)  # <A x, y> = <x, A^T y> for all x and y
    close(full @ inverse @ full, full)  # the four identities of Penrose
    close(inverse @ full @ inverse, inverse)
    close((full @ inverse).T, full @ inverse)
    close((inverse @ full).T, inverse @ full)
    # a ridge for each row; row i is the image of the i-th unit vector
    want = [
        np.linalg.solve(full @ full.T + r * np.eye(m), e) @ full
        for r, e in zip(ridge, np.eye(m), strict=True)
    ]
    close(ridged, np.stack(want).T)
    close(seen.reshape(3, m), x.reshape(3, d) @ full.T)
    close(unseen.reshape(3, d) @ full.T, 0)
    close(unseen.reshape(3, d), x.reshape(3, d) @ (np.eye(d) - inverse @ full))
    if name in BY_HAND:
        close(seen, BY_HAND[name](x))


def test_consistent_with_a_measurement(x64):
    a, event, _ = TABLE["downsample of images"]
    x, truth = rng.normal(size=(2, 3, *event))
    y = a.apply(truth[:1])  # one row for all
    near = measurements.null_space(a, x, y)
    np.testing.assert_allclose(a.apply(near), np.repeat(y, 3, axis=0), atol=1e-12)
    # the nearest such point: the step is in the row space
    np.testing.assert_allclose(measurements.null_space(a, near - x), 0, atol=1e-12)


def test_the_floor_leaves_faint_frequencies_out(x64):
    """The gain of [0.26, 0.5, 0.24] at the highest frequency is 0."""
    kernel, event = [0.25, 0.501, 0.249], (6,)
    highest = np.array([[1.0, -1, 1, -1, 1, -1]])
    strict = measurements.blur(kernel, event, floor=1e-2)  # its gain there is 0.002
    loose = measurements.blur(kernel, event, floor=1e-4)
    np.testing.assert_allclose(strict.pseudo_inverse(highest), 0, atol=1e-12)
    np.testing.assert_allclose(loose.pseudo_inverse(highest), highest / 0.002, rtol=1e-9)


def test_types_are_kept():
    for a, event, measured in TABLE.values():
        x, y = jnp.ones((2, *event), jnp.bfloat16), jnp.ones((2, *measured), jnp.bfloat16)
        made = jax.eval_shape(
            lambda x, y, a=a: (a.apply(x), a.adjoint(y), a.pseudo_inverse(y)), x, y
        )
        assert [out.dtype for out in made] == [jnp.bfloat16] * 3
        assert [out.shape for out in made] == [y.shape, x.shape, x.shape]


def test_one_of_your_own():
    own = Measurement(lambda x: 2 * x, lambda y: 2 * y, lambda y, ridge=0.0: 2 * y / (4 + ridge))
    np.testing.assert_allclose(measurements.null_space(own, jnp.ones((2, 3))), 0, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: measurements.matrix([1.0]), r"finite matrix \[m, d\], got \[1\]"),
        (lambda: measurements.matrix([[np.nan]]), "finite matrix"),
        (lambda: measurements.matrix([[1.0]], floor=1.0), r"floor in \[0, 1\), got 1.0"),
        (lambda: measurements.mask([0.5]), "truth values"),
        (lambda: measurements.fourier(np.ones((1, 1, 1, 1))), r"got shape \[1, 1, 1, 1\]"),
        (lambda: measurements.blur(np.ones(5), (4,)), r"got \[5\] for \[4\]"),
        (lambda: measurements.blur(np.ones(2), (4, 4)), r"got \[2\] for \[4, 4\]"),
        (lambda: measurements.blur(np.zeros(2), (4,)), "finite kernel"),
        (lambda: measurements.downsample(3, (4, 6)), r"that 3 divides, got \[4, 6\]"),
        (lambda: measurements.downsample(0, (4,)), "factor to be a whole number"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_shapes():
    a = measurements.downsample(2, (4, 6))
    with pytest.raises(
        ValueError, match=r"downsample: expected x of shape \[b, 4, 6\], got \[2, 6"
    ):
        a.apply(jnp.ones((2, 6, 4)))
    for function in (a.adjoint, a.pseudo_inverse):
        with pytest.raises(ValueError, match=r"measurement of shape \[b, 2, 3\], got \[2, 4, 6\]"):
            function(jnp.ones((2, 4, 6)))
    with pytest.raises(ValueError, match=r"ridge to be a number or of shape \[2\], got \[3\]"):
        a.pseudo_inverse(jnp.ones((2, 2, 3)), jnp.ones(3))
    with pytest.raises(ValueError, match=r"shape \[3, 2, 3\], or one row for all, got \[2, 2, 3\]"):
        measurements.null_space(a, jnp.ones((3, 4, 6)), jnp.ones((2, 2, 3)))
