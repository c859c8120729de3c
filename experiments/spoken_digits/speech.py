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


def templates(rows: list[dict], learned: list[dict]) -> list[dict]:
    """The rows with 'template' [n, BANDS], the mean of the learned utterances of that digit and
    speaker, stretched to n frames; of other takes, so that no utterance is in its own."""

    def template(row):
        alike = [a for a in learned if all(a[k] == row[k] for k in ("label", "speaker"))]
        others = [stretched(a["frames"], 24) for a in alike if a["take"] != row["take"]]
        mean = np.mean(others, axis=0)
        return stretched(mean, len(row["frames"]))

    return [row | {"template": template(row).astype(np.float32)} for row in rows]


def known(row: dict) -> np.ndarray:
    """[n, k]: what is told of each frame: its template, how that differs from the one before, the
    speaker, whether it is the first, the share of the utterance that is over, and its length."""
    template, n = row["template"], len(row["template"])
    moved = np.diff(template, axis=0, prepend=template[:1])
    speaker = np.eye(len(SPEAKERS))[[row["speaker"]] * n]
    begins, over = np.arange(n) == 0, (np.arange(n) + 0.5) / n
    return np.column_stack([template, moved, speaker, begins, over, np.full(n, n / 30)])


def padded(rows: list[dict], length: int) -> dict[str, np.ndarray]:
    """The frames [b, length, BANDS] and what is known of them, with zeros behind, and which of them
    exist [b, length]."""

    def behind(each):
        return np.stack([np.pad(a, ((0, length - len(a)), (0, 0))) for a in each]).astype("f4")

    lengths = np.array([len(row["frames"]) for row in rows])
    return {
        "x": behind([row["frames"] for row in rows]),
        "known": behind([known(row) for row in rows]),
        "valid": np.arange(length)[None] < lengths[:, None],
        "label": np.array([row["label"] for row in rows], np.int32),
    }


class Autoregression:
    """x_i ~ N(c + A x_{i-1}, S), by least squares, and a normal law of the first frame.

    With `told` a linear function of what is known of the frame is added to the mean, and the first
    frame comes after its template and has a covariance of its own.
    """

    def __init__(self, rows: list[dict], told: bool = False):
        self.told = told
        given = np.concatenate([self.given(row) for row in rows])
        after = np.concatenate([row["frames"][0 if told else 1 :] for row in rows]).astype(float)
        self.coefficients = np.linalg.lstsq(given, after, rcond=None)[0]
        errors = [self.errors(row) for row in rows]
        first = np.stack([row["frames"][0] for row in rows]).astype(float)
        self.first = first.mean(0), covariance(first - first.mean(0))
        if told:
            self.first = None, covariance(np.stack([e[0] for e in errors]))
            errors = [e[1:] for e in errors]
        self.rest = covariance(np.concatenate(errors))

    def given(self, row: dict) -> np.ndarray:
        """[n, k], with `told`, or without the first frame [n - 1, k]."""
        x = row["frames"].astype(float)
        if not self.told:
            return np.column_stack([np.ones(len(x) - 1), x[:-1]])
        before = np.concatenate([row["template"][:1], x[:-1]])
        return np.column_stack([np.ones(len(x)), before, known(row)])

    def errors(self, row: dict) -> np.ndarray:
        x = row["frames"].astype(float)
        return x[0 if self.told else 1 :] - self.given(row) @ self.coefficients

    def log_prob(self, row: dict) -> np.ndarray:
        """Of each frame given the one before it, [n], in nats."""
        errors = self.errors(row)
        first = errors[:1] if self.told else row["frames"][:1] - self.first[0]
        return np.concatenate(
            [
                normal_log_prob(first, self.first[1]),
                normal_log_prob(errors[1:] if self.told else errors, self.rest),
            ]
        )

    def sample(self, row: dict, draw: np.random.Generator) -> np.ndarray:
        """Frames of an utterance of which as much is known as of this one, with `told`."""
        roots = [np.linalg.cholesky(a) for a in (self.first[1], self.rest)]
        x, frames = row["template"][0], []
        for i, told in enumerate(known(row)):
            mean = np.concatenate([[1.0], x, told]) @ self.coefficients
            x = mean + roots[min(i, 1)] @ draw.normal(size=BANDS)
            frames.append(x)
        return np.stack(frames)


def covariance(x: np.ndarray) -> np.ndarray:
    """Of centered rows, a little towards its diagonal."""
    found = x.T @ x / len(x)
    return 0.99 * found + 0.01 * np.diag(np.diag(found))


def normal_log_prob(x: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    z = np.linalg.solve(np.linalg.cholesky(covariance), x.T)
    return -0.5 * (z**2).sum(0) - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]


def stretched(frames: np.ndarray, count: int) -> np.ndarray:
    """[count, BANDS]: the frames at as many times, evenly from the first to the last."""
    at = np.linspace(0, len(frames) - 1, count)
    return np.stack([np.interp(at, np.arange(len(frames)), band) for band in frames.T], axis=1)


def along(frames: np.ndarray) -> np.ndarray:
    """[12 * BANDS]: what a classifier reads, frames at twelve times for every length."""
    return stretched(frames, 12).ravel()
