"""Rows as pictures."""

import numpy as np


def image_grid(
    x: np.ndarray, low: float, high: float, *, columns: int = 10, zoom: int = 1, gap: int = 1
) -> np.ndarray:
    """Images side by side in one picture.

    Args:
        x: [n, h, w, c], c = 1 or 3, filled in row by row.
        low: The value that becomes black; what lies below is clipped.
        high: The value that becomes white; what lies above is clipped.
        columns: Images in a row of the picture.
        zoom: How often each pixel is repeated, both ways.
        gap: Pixels between images, before the zoom.

    Returns:
        uint8 [H, W] or [H, W, 3].

    Raises:
        ValueError: For other shapes.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> data.image_grid(np.zeros((6, 8, 8, 1)), -1, 1, columns=3).shape
        (19, 28)
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or len(x) == 0:
        raise ValueError(
            f"image_grid: expected images of shape [n, h, w, 1 or 3], got {list(x.shape)}"
        )
    n, h, w, c = x.shape
    columns = min(columns, n)
    lines = -(-n // columns)
    levels = np.clip((x - low) / (high - low), 0, 1) * 255
    sheet = np.full((lines * (h + gap) + gap, columns * (w + gap) + gap, c), 96, np.uint8)
    for i, image in enumerate(np.rint(levels).astype(np.uint8)):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = image
    sheet = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return sheet[..., 0] if c == 1 else sheet
