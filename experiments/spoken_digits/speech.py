"""Spoken digits as frames of log-mel energies, and the linear models of such frames."""

import io
import wave
import zipfile

import numpy as np

RATE, FRAME, HOP, BANDS = 8000, 256, 128, 16
SPEAKERS = ("jackson", "nicolas", "yweweler")


def read(path, seed: int) -> list[dict]:
    """The recordings of fsdd_dev300.zip: 'frames' [n, BANDS], 'label', 'speaker', 'take'."""
    found, draw = [], np.random.default_rng(seed)
    with zipfile.ZipFile(path) as files:
        for name in sorted(files.namelist()):
            digit, speaker, take = name.removesuffix(".wav").split("_")
            with wave.open(io.BytesIO(files.read(name))) as sound:
                sound = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(float)
            # integers are a lattice, and silence is exactly zero: noise of one step
            frames = log_mel(sound + draw.uniform(-0.5, 0.5, sound.shape))
            found.append(said(frames, int(digit), SPEAKERS.index(speaker), int(take)))
    return found


def invented(seed: int) -> list[dict]:
    """Noise about a line of each digit, for a short run without the data."""
    draw, found = np.random.default_rng(seed), []
    ends = draw.normal(size=(10, 2, BANDS))
    for k in range(120):
        n, digit = int(draw.integers(4, 9)), k % 10
        along = np.linspace(0, 1, n)[:, None]
        line = (1 - along) * ends[digit, :1] + along * ends[digit, 1:]
        found.append(said(line + 0.3 * draw.normal(size=line.shape), digit, k % 3, k // 10))
    return found


def said(frames, label, speaker, take):
    return {
        "frames": frames.astype(np.float32),
        "label": label,
        "speaker": speaker,
        "take": take,
    }


def log_mel(sound: np.ndarray) -> np.ndarray:
    """[n, BANDS]: log energies of triangular bands that are evenly spaced in mel."""
    sound = np.pad(sound, (0, max(0, FRAME - len(sound))))
    pieces = np.lib.stride_tricks.sliding_window_view(sound, FRAME)[::HOP] * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(pieces, axis=1)) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = np.fft.rfftfreq(FRAME, 1 / RATE)[None]
    rise = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    return np.log(power @ np.maximum(0, np.minimum(rise, fall)).T)


def padded(rows: list[dict], length: int) -> dict[str, np.ndarray]:
    """The frames [b, length, BANDS] with zeros behind them, and which of them exist [b, length]."""
    x = np.zeros((len(rows), length, BANDS), np.float32)
    for out, row in zip(x, rows, strict=True):
        out[: len(row["frames"])] = row["frames"]
    lengths = np.array([len(row["frames"]) for row in rows])
    valid = np.arange(length)[None] < lengths[:, None]
    label = np.array([row["label"] for row in rows], np.int32)
    speaker = np.eye(len(SPEAKERS), dtype=np.float32)[[row["speaker"] for row in rows]]
    return {"x": x, "valid": valid, "label": label, "speaker": speaker}


class Autoregression:
    """x_i ~ N(c + A x_{i-1}, S), by least squares, and a normal law of the first frame."""

    def __init__(self, rows: list[dict]):
        before = np.concatenate([row["frames"][:-1] for row in rows]).astype(float)
        after = np.concatenate([row["frames"][1:] for row in rows]).astype(float)
        given = np.column_stack([np.ones(len(before)), before])
        self.coefficients = np.linalg.lstsq(given, after, rcond=None)[0]
        first = np.stack([row["frames"][0] for row in rows]).astype(float)
        self.first = first.mean(0), covariance(first - first.mean(0))
        self.rest = covariance(after - given @ self.coefficients)

    def log_prob(self, frames: np.ndarray) -> np.ndarray:
        """Of each frame given the one before it, [n], in nats."""
        x = frames.astype(float)
        mean = np.column_stack([np.ones(len(x) - 1), x[:-1]]) @ self.coefficients
        first = normal_log_prob(x[:1] - self.first[0], self.first[1])
        return np.concatenate([first, normal_log_prob(x[1:] - mean, self.rest)])


def covariance(x: np.ndarray) -> np.ndarray:
    """Of centered rows, a little towards its diagonal."""
    found = x.T @ x / len(x)
    return 0.99 * found + 0.01 * np.diag(np.diag(found))


def normal_log_prob(x: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    z = np.linalg.solve(np.linalg.cholesky(covariance), x.T)
    return -0.5 * (z**2).sum(0) - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]


def along(frames: np.ndarray, count: int = 12) -> np.ndarray:
    """[count * BANDS]: frames at as many times for every length, what a classifier reads."""
    at = np.linspace(0, len(frames) - 1, count)
    each = [np.interp(at, np.arange(len(frames)), band) for band in frames.T]
    return np.ravel(each)
