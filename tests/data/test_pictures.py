import numpy as np
import pytest

from jflow import data


def test_each_image_stands_at_its_place_and_the_range_is_clipped():
    x = np.array([0.0, 16.0, 8.0, 99.0, -5.0]).reshape(5, 1, 1, 1) * np.ones((1, 2, 3, 1))
    sheet = data.image_grid(x, 0, 16, columns=2, zoom=2, gap=1)
    assert sheet.shape == (2 * (3 * 3 + 1), 2 * (2 * 4 + 1)) and sheet.dtype == np.uint8
    corners = [sheet[2 * (1 + 3 * r), 2 * (1 + 4 * c)] for r in range(3) for c in range(2)]
    assert corners == [0, 255, 128, 255, 0, 96]


def test_color_keeps_three_channels_and_other_shapes_are_errors():
    assert data.image_grid(np.zeros((1, 2, 2, 3)), 0, 1, gap=0).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="image_grid"):
        data.image_grid(np.zeros((4, 8, 8)), 0, 1)
