r"""Class-conditional flow matching on the latents of an autoencoder: MNIST at 28x28 as 7x7x4.

    jflow train experiments/latent_flow part=autoencoder --workdir runs/autoencoder
    jflow train experiments/latent_flow autoencoder=runs/autoencoder --workdir runs/latents
    jflow sample runs/latents --num 100 --out samples.png

part=pixels trains the flow on the images themselves, to compare; measure.py beside this file
judges both. JFLOW_DATA, or data_dir=, is the folder that holds images/mnist.npz; dataset=digits,
scikit-learn's 8x8 as 2x2x4, needs none, and `short=True` shrinks that to seconds, for CI. Numbers
are in README.md.

Method: Dao, Phung, Nguyen, Tran, *Flow Matching in Latent Space* (2023), with an autoencoder that
is trained here; labels are dropped for 10% of the rows, so that the network can be guided.
"""

import functools
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import data, guidance, losses, nets, solvers, train
from jflow.apps import Experiment

CLASSES = 10  # the label 10 is the null label
HIGH = {"mnist": 255, "digits": 16}  # the largest level; the least is 0


class SmallAutoencoder(nn.Module):
    """Images [b, H, W, 1] to latents [b, H / 4, W / 4, c] and back, with few operations at full
    resolution: a small `nets.AutoencoderKL` without norms and attention."""

    width: int = 32
    channels: int = 4

    def setup(self):
        conv, wide = functools.partial(nn.Conv, kernel_size=(3, 3)), 2 * self.width
        self.down = [conv(self.width, strides=(2, 2)), conv(wide, strides=(2, 2))]
        self.encoder, self.to_latents = conv(wide), nn.Dense(2 * self.channels)
        self.from_latents, self.decoder = conv(wide), conv(wide)
        self.up = [nn.Dense(4 * self.width), nn.Dense(2 * self.width)]
        self.after = [conv(self.width), conv(self.width // 2)]
        self.head = conv(1)

    def encode(self, x):
        for layer in self.down:
            x = nn.silu(layer(x))
        mean, log_variance = jnp.split(self.to_latents(x + nn.silu(self.encoder(x))), 2, axis=-1)
        return mean, jnp.clip(log_variance, -20.0, 5.0)

    def decode(self, z):
        h = nn.silu(self.from_latents(z))
        h = h + nn.silu(self.decoder(h))
        for up, after in zip(self.up, self.after, strict=True):
            h = nn.silu(after(nn.silu(doubled(up(h)))))
        return self.head(h)

    def __call__(self, x):
        return self.decode(self.encode(x)[0])


def doubled(h):
    """[b, H, W, 4 c] -> [b, 2 H, 2 W, c]."""
    b, height, width, c = h.shape
    h = h.reshape(b, height, width, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(b, 2 * height, 2 * width, c // 4)


def config(
    *,
    part: str = "latents",
    autoencoder: str = "",
    dataset: str = "mnist",
    data_dir: str = "",
    sigma: float = 0.05,
    steps: int = 0,
    batch: int = 64,
    learning_rate: float = 1e-3,
    ema: float = 0.998,
    drop: float = 0.1,
    solver_steps: int = 8,
    guidance_scale: float = 1.0,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        part: autoencoder, latents or pixels: what is trained
        autoencoder: the workdir of part=autoencoder, whose latents the flow is trained on
        dataset: mnist or digits
        data_dir: folder of the data; JFLOW_DATA if empty
        sigma: deviation of the decoder's noise in the autoencoder's loss; images span -1 to 1
        steps: updates; 0: what README.md compares
        batch: rows of an update
        learning_rate: of Adam, at its highest
        ema: decay of the average of the parameters, which samples are drawn with
        drop: share of the rows whose label is dropped
        solver_steps: steps of Heun's method, where --steps says nothing
        guidance_scale: scale of classifier-free guidance, where --guidance says nothing; 1 is
        without
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if part not in STEPS:
        raise ValueError(f"unknown part {part!r}: expected one of {', '.join(STEPS)}")
    if dataset not in HIGH:
        raise ValueError(f"unknown dataset {dataset!r}: expected one of {', '.join(HIGH)}")
    steps = steps or STEPS[part]
    if short:
        dataset, steps, batch, solver_steps = "digits", 20, 64, 2
    load = functools.partial(images, dataset, data_dir)
    high = HIGH[dataset]
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 20), steps, 0.01 * learning_rate
    )
    common = {
        "optimizer": optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4)
        ),
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "ema": train.ema.warmup(ema),
        "picture": lambda rows: data.image_grid(rows["x"], 0, high, zoom=1 + (high < 255)),
        "picture_rows": 100,
        "eval_every": steps,
        "save_every": max(1, steps // 4),
    }
    if part == "autoencoder":
        return Experiment(**autoencoding(load, high, sigma), **common)
    if part == "pixels":
        shape = (8, 8, 1) if dataset == "digits" else (28, 28, 1)
        net, rows, preprocess = pixel_net(short), load, data.scale(0, high)
    else:
        if not autoencoder:
            raise ValueError(
                "part=latents: set autoencoder=DIR, the workdir of `jflow train"
                " experiments/latent_flow part=autoencoder --workdir DIR`"
            )
        encoder = jflow.load(autoencoder)
        encode, decode = between(encoder.model, high)
        shape = (2, 2, 4) if dataset == "digits" else (7, 7, 4)
        net = latent_net(short)
        preprocess = data.standardize_latents(decode, encoder.params)

        @functools.cache
        def rows():
            keys = jax.random.split(jax.random.key(seed))
            parts = (load().train, load().test)
            made = [
                data.latents(encode, encoder.params, part, key=key, progress=not short)
                for part, key in zip(parts, keys, strict=True)
            ]
            return data.Splits(made[0], None, made[1])

    return Experiment(
        **flow(jflow.velocity(net), shape, drop, solver_steps, guidance_scale),
        data=rows,
        preprocess=preprocess,
        **common,
    )


STEPS = {"autoencoder": 1000, "latents": 1600, "pixels": 640}


def latent_net(short: bool):
    """Of 7x7x4, one resolution."""
    return nets.UNet(
        channels=32 if short else 64,
        multipliers=(1,),
        num_blocks=1 if short else 3,
        attention=(True,),
        num_heads=4,
        num_classes=CLASSES,
    )


def pixel_net(short: bool):
    """Of 28x28x1, three resolutions."""
    return nets.UNet(
        channels=16 if short else 32,
        multipliers=(1, 2, 2),
        num_blocks=1,
        attention=(False, False, True),
        num_heads=4,
        num_classes=CLASSES,
    )


def images(dataset: str, data_dir: str) -> data.Splits:
    """uint8 images with labels."""
    if dataset == "digits":
        return data.digits()
    folder = data_dir or os.environ.get("JFLOW_DATA", "")
    if not folder:
        raise FileNotFoundError(
            "dataset=mnist: set data_dir=FOLDER or JFLOW_DATA to a folder with images/mnist.npz;"
            " dataset=digits needs none"
        )
    return data.mnist(Path(folder) / "images" / "mnist.npz")


def between(net: nn.Module, high: int):
    """(encode, decode) between levels 0 .. high and latents, with the params of the net."""
    autoencoder = nets.autoencoder(net)

    def encode(params, x, *, key=None):
        return autoencoder.encode(params, 2 * x.astype(jnp.float32) / high - 1, key=key)

    def decode(params, z):
        return high * (jnp.clip(autoencoder.decode(params, z), -1, 1) + 1) / 2

    return encode, decode


def autoencoding(load, high: int, sigma: float) -> dict:
    """What an `Experiment` of the autoencoder has of its own."""
    net = SmallAutoencoder()
    loss, preprocess = losses.reconstruction(net, sigma=sigma), data.scale(0, high)
    judged = jax.jit(loss)
    seen = jax.jit(lambda params, x: net.apply({"params": params}, x))

    def evaluate(params, state, key, splits):
        rows = preprocess.apply(state, data.take(splits.test, slice(1000)), None)
        return judged(params, key, rows)[1]

    def sample(params, key, n):
        """Test images in rows of ten, each above what is decoded of its latent."""
        rows = data.take(load().test, slice(-(-n // 20) * 10))
        x = preprocess.apply({}, rows, None)["x"]
        pairs = np.stack([x, np.clip(seen(params, x), -1, 1)], axis=1)
        pairs = pairs.reshape(-1, 10, 2, *x.shape[1:]).swapaxes(1, 2)
        return {"x": pairs.reshape(-1, *x.shape[1:])[:n]}

    return {
        "model": net,
        "init": lambda key, rows: net.init(key, rows["x"])["params"],
        "loss": loss,
        "data": load,
        "preprocess": preprocess,
        "sample": sample,
        "evaluate": evaluate,
    }


def flow(velocity, shape, drop: float, solver_steps: int, guidance_scale: float) -> dict:
    """What an `Experiment` of a flow has of its own, in pixels as in latents."""
    matching = losses.flow_matching(velocity)

    @functools.cache
    def sampler(steps, scale):
        guided = velocity if scale == 1.0 else guidance.cfg(velocity, scale, null=CLASSES)
        return jax.jit(
            lambda params, x0, cond: solvers.sample(guided, params, x0, cond, method=steps)[0]
        )

    def sample(params, key, n, *, label=None, steps=solver_steps, guidance=guidance_scale):
        cond = np.broadcast_to(np.arange(n) % CLASSES if label is None else label, (n,))
        if cond.min() < 0 or cond.max() >= CLASSES:
            raise ValueError(f"expected labels from 0 to {CLASSES - 1}, got {label}")
        x0 = jax.random.normal(key, (n, *shape))
        return {"x": sampler(steps, float(guidance))(params, x0, cond), "cond": cond}

    return {
        "model": velocity,
        "init": lambda key, rows: velocity.init(
            key, rows["x"], jnp.zeros(len(rows["x"])), rows["cond"]
        ),
        "loss": losses.chain(losses.drop_cond(drop, null=CLASSES), matching),
        "sample": sample,
    }
