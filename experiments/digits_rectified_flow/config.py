"""Class-conditional rectified flow on scikit-learn's digits (8x8, 1437 to train on, 360 to test):
the main job.

Train, sample and evaluate (3 minutes at most on two CPU cores, no download):

    jflow train experiments/digits_rectified_flow --workdir runs/digits
    jflow sample runs/digits --num 100 --out samples.png
    jflow evaluate runs/digits

`short=True` shrinks it to seconds, for CI. The expected numbers are in README.md beside this file.

Method: Liu, Gong, Liu, *Flow Straight and Fast* (2022), one rectified flow with uniform times;
labels are dropped for 10% of the rows so that the same network can be guided (Ho, Salimans,
*Classifier-Free Diffusion Guidance*, 2022).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.svm import SVC

import jflow
from jflow import data, guidance, losses, metrics, nets, solvers, train
from jflow.apps import Experiment

CLASSES = 10  # the label 10 is the null label


def config(
    *,
    steps: int = 3000,
    batch: int = 256,
    learning_rate: float = 2e-3,
    width: int = 256,
    depth: int = 3,
    dropout: float = 0.0,
    drop: float = 0.1,
    ema: float = 0.998,
    solver_steps: int = 20,
    guidance_scale: float = 1.0,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        steps: updates
        batch: rows of an update
        learning_rate: of Adam, at its highest
        width: of the network
        depth: how many residual blocks
        dropout: rate of dropout in the network
        drop: share of the rows whose label is dropped
        ema: decay of the average of the parameters, which samples are drawn with
        solver_steps: steps of the solver that samples, where --steps says nothing
        guidance_scale: scale of classifier-free guidance, where --guidance says nothing; 1 is
        without
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        steps, width, depth = 200, 64, 1
    net = nets.ResidualMLP(width=width, num_blocks=depth, num_classes=CLASSES, dropout=dropout)
    velocity = jflow.velocity(net)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4)
    )

    def init(key, rows):
        return velocity.init(key, rows["x"], jnp.zeros(len(rows["x"])), rows["cond"])

    @functools.cache
    def sampler(steps, scale):
        field = velocity if scale == 1.0 else guidance.cfg(velocity, scale, null=CLASSES)
        return jax.jit(
            lambda params, x0, cond: solvers.sample(field, params, x0, cond, method=steps)[0]
        )

    def sample(params, key, n, *, label=None, steps=solver_steps, guidance=guidance_scale):
        cond = np.broadcast_to(np.arange(n) % CLASSES if label is None else label, (n,))
        if cond.min() < 0 or cond.max() >= CLASSES:
            raise ValueError(f"expected labels from 0 to {CLASSES - 1}, got {label}")
        x = sampler(steps, float(guidance))(params, jax.random.normal(key, (n, 8, 8, 1)), cond)
        return {"x": jnp.clip(x, -1, 1), "cond": cond}

    def evaluate(params, state, key, splits):
        labels = splits.test["cond"]
        rows = sample(params, key, len(labels), label=labels)
        flow = data.scale(0, 16).undo(state, jax.tree.map(np.asarray, rows))["x"]
        judge = judge_of(splits)
        scores = judge(flow)
        scores |= {
            f"gaussian_{name}": score for name, score in judge(class_gaussian(splits)).items()
        }
        replay = splits.train["x"][replayed(splits)]
        return scores | {f"replay_{name}": score for name, score in judge(replay).items()}

    return Experiment(
        model=velocity,
        init=init,
        loss=losses.chain(losses.drop_cond(drop, null=CLASSES), losses.flow_matching(velocity)),
        optimizer=optimizer,
        data=data.digits,
        preprocess=data.scale(0, 16),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(ema),
        sample=sample,
        evaluate=evaluate,
        picture=lambda rows: data.image_grid(rows["x"], 0, 16, zoom=5),
        picture_rows=100,
        eval_every=max(1, steps // 3),
    )


def judge_of(splits):
    """images [360, 8, 8, 1] in 0 .. 16, with the test split's labels -> what README.md tabulates.

    agreement: the share that a support-vector classifier of the training digits gives their label.
    energy: energy distance to the test digits, over the mean of that of 20 random subsets of as
    many training digits. nearest: mean distance to the nearest training digit, over that of the
    test digits; far below 1 they are memorised.
    """
    train_x, test_x, labels = splits.train["x"], splits.test["x"], splits.test["cond"]
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)  # noqa: E731
    classifier = SVC(gamma=0.001, C=10.0).fit(flat(train_x), splits.train["cond"])
    rng = np.random.default_rng(0)
    subsets = [rng.choice(len(train_x), len(test_x), replace=False) for _ in range(20)]
    floor = np.mean([metrics.energy_distance(train_x[i], test_x) for i in subsets])
    held_out = metrics.nearest_distance(test_x, train_x)

    def judge(x):
        return {
            "agreement": float(classifier.score(flat(x), labels)),
            "energy": metrics.energy_distance(x, test_x) / float(floor),
            "nearest": metrics.nearest_distance(x, train_x) / held_out,
        }

    return judge


def class_gaussian(splits) -> np.ndarray:
    """A digit for each test label from the Gaussian of its class, clipped to the data's range."""
    rng = np.random.default_rng(0)
    x = np.empty(splits.test["x"].shape)
    for c in range(CLASSES):
        rows = splits.train["x"][splits.train["cond"] == c].reshape(-1, 64).astype(np.float64)
        index = splits.test["cond"] == c
        draws = rng.multivariate_normal(
            rows.mean(0), np.cov(rows.T), index.sum(), check_valid="ignore", method="eigh"
        )
        x[index] = np.clip(draws, 0, 16).reshape(-1, 8, 8, 1)
    return x


def replayed(splits) -> np.ndarray:
    """For each test label the index of a training digit of its class."""
    rng = np.random.default_rng(0)
    return np.array(
        [rng.choice(np.flatnonzero(splits.train["cond"] == c)) for c in splits.test["cond"]]
    )
