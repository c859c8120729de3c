import json

import numpy as np
import pytest

from jflow import data, metrics

RNG = np.random.default_rng(0)


def rows(x):
    return {"x": x, "cond": np.arange(len(x))}


SMOOTH = {
    "standardize": (data.standardize(), RNG.normal(3, 2, (6, 2, 3))),
    "standardize channels": (data.standardize(axis=(0, 1)), RNG.normal(3, 2, (6, 2, 3))),
    "standardize all": (data.standardize(axis=None), RNG.normal(3, 2, (6, 2, 3))),
    "scale": (data.scale(-2, 6), RNG.uniform(-2, 6, (6, 4))),
    "logit": (data.logit(0.05), RNG.uniform(0, 1, (6, 4))),
    "chain": (
        data.chain_preprocess(
            data.scale(-3, 5), data.scale(-3, 1), data.logit(0.1), data.standardize()
        ),
        RNG.uniform(-3, 5, (6, 4)),
    ),
    "identity": (data.identity(), RNG.normal(size=(6, 4))),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_undo_inverts_apply_and_log_det_is_that_of_finite_differences(name):
    pre, x = SMOOTH[name]
    state = json.loads(json.dumps(pre.fit(rows(x))))  # what a checkpoint keeps
    y = pre.apply(state, rows(x), None)
    np.testing.assert_array_equal(y["cond"], np.arange(6))
    np.testing.assert_allclose(pre.undo(state, y)["x"], x, rtol=1e-12, atol=1e-12)
    # Elementwise maps in float64: the central difference errs by h^2 = 1e-10 and by eps/h = 1e-11.
    h = 1e-5
    inside = np.clip(x, x.min() + 2 * h, x.max() - 2 * h)
    up, down = (pre.apply(state, rows(inside + s), None)["x"] for s in (h, -h))
    expected = np.log((up - down) / (2 * h)).sum(axis=tuple(range(1, x.ndim)))
    found = pre.log_det(state, pre.apply(state, rows(inside), None))
    assert found.shape == (6,)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_standardize_is_fitted_on_training_rows_alone():
    pre = data.standardize()
    train = RNG.normal(5, 3, (200, 4))
    state = pre.fit(rows(train))
    y = pre.apply(state, rows(train), None)["x"]
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-12)
    test = pre.apply(state, rows(train + 1), None)["x"]
    np.testing.assert_allclose(test - y, np.broadcast_to(1 / train.std(0), y.shape), atol=1e-10)


def test_standardize_keeps_float32_and_brings_long_numbers_back():
    pre, x = data.standardize(), np.array([[123456.78], [123456.79], [123458.0]])
    state = pre.fit({"x": x})
    assert pre.apply(state, {"x": x.astype(np.float32)}, None)["x"].dtype == np.float32
    y = pre.apply(state, {"x": x}, None)["x"].astype(
        np.float32
    )  # what a float32 model sees and returns
    np.testing.assert_allclose(pre.undo(state, {"x": y})["x"], x, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            np.array([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1]]),
            r"constant over the training rows at index \[1\]",
        ),
        (np.array([[1.0], [np.nan]]), "not finite in training row 1"),
        (np.array([[1.0]]), "at least 2"),
    ],
)
def test_standardize_errors(x, message):
    with pytest.raises(ValueError, match=message):
        data.standardize().fit({"x": x})


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("tail", [None, data.scale(0, 1), data.logit(0.05)])
def test_dequantized_levels_come_back(levels, tail):
    pre = (
        data.dequantize(levels)
        if tail is None
        else data.chain_preprocess(data.dequantize(levels), tail)
    )
    x = np.concatenate([np.arange(levels), RNG.integers(0, levels, 200_000 - levels)])[
        :, None
    ].astype(np.uint8)
    state = pre.fit(rows(x))
    for seed in range(2):
        y = pre.apply(state, rows(x), np.random.default_rng(seed))
        assert y["x"].dtype == np.float32
        back = pre.undo(state, y)["x"]
        assert back.dtype == np.uint8
        np.testing.assert_array_equal(back, x)


def test_dequantization_noise_is_uniform_and_comes_from_rng():
    pre, x = data.dequantize(4), np.full((20_000, 1), 2, np.uint8)
    y = pre.apply({}, {"x": x}, np.random.default_rng(0))["x"]
    u = np.sort(4 * y[:, 0].astype(np.float64) - 2)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by chance once in a thousand.
    assert np.abs(u - (np.arange(20_000) + 0.5) / 20_000).max() < 1.95 / np.sqrt(20_000)
    np.testing.assert_array_equal(y, pre.apply({}, {"x": x}, np.random.default_rng(0))["x"])
    with pytest.raises(ValueError, match="needs rng"):
        pre.apply({}, {"x": x}, None)


def test_a_uniform_model_of_bytes_has_eight_bits_a_dimension():
    """Whatever follows the dequantization: carry the uniform density on [0, 1) through it in closed
    form."""
    x = RNG.integers(0, 256, (50, 4, 4, 1)).astype(np.uint8)
    chains = [
        (data.dequantize(256), lambda y: np.zeros(y.shape)),
        (
            data.chain_preprocess(data.dequantize(256), data.scale(0, 1)),
            lambda y: np.full(y.shape, -np.log(2)),
        ),
        (
            data.chain_preprocess(
                data.dequantize(256), data.logit(0.05)
            ),  # p uniform on [alpha, 1 - alpha]
            lambda y: -np.logaddexp(0, y) - np.logaddexp(0, -y) - np.log(0.9),
        ),
    ]
    for pre, log_density in chains:
        state = pre.fit(rows(x))
        y = pre.apply(state, rows(x), np.random.default_rng(1))
        log_prob = log_density(y["x"].astype(np.float64)).sum((1, 2, 3)) + pre.log_det(state, y)
        assert metrics.bits_per_dim(log_prob, 16) == pytest.approx(
            8.0, abs=1e-6
        )  # exact but for float32 logits


def test_dequantize_refuses_other_levels():
    for bad in (np.array([[0, 17]]), np.array([[0.5]]), np.array([[-1]])):
        with pytest.raises(ValueError, match=r"integers in 0 \.\. 16"):
            data.dequantize(17).fit({"x": bad})


def test_a_row_outside_is_named_with_its_value_and_the_bound():
    x = np.full((5, 2, 3), 0.5)
    x[3, 1, 2] = 1.25
    with pytest.raises(
        ValueError, match=r"\[0, 1\], got 1\.25 in row 3, element \[1, 2\] \(1 such rows\)"
    ):
        data.logit().apply({}, {"x": x}, None)
    levels = np.zeros((4, 2))
    levels[2:] = 17
    for use in (
        data.dequantize(17).fit,
        lambda rows: data.dequantize(17).apply({}, rows, np.random.default_rng(0)),
    ):
        with pytest.raises(
            ValueError,
            match=r"integers in 0 \.\. 16, got 17\.0 in row 2, element \[0\] \(2 such rows\)",
        ):
            use({"x": levels})


def test_options_are_checked():
    for make in (lambda: data.dequantize(1), lambda: data.scale(1, 1), lambda: data.logit(0.5)):
        with pytest.raises(ValueError, match="expected"):
            make()
    with pytest.raises(ValueError, match=r"x in \[0, 1\]"):
        data.logit().apply({}, {"x": np.array([[1.5]])}, None)
    with pytest.raises(ValueError, match="2 parts"):
        data.chain_preprocess(data.scale(0, 1), data.scale(0, 1)).undo(
            {"parts": []}, {"x": np.zeros((1, 1))}
        )
