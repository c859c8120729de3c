"""Digits and their captions by one transformer: cross-entropy for the caption, flow matching for
the image.

Train, evaluate and sample (5 minutes at most on two CPU cores, no download):

    jflow train experiments/captioned_digits/joint.py --workdir runs/joint
    jflow evaluate runs/joint
    jflow sample runs/joint --num 100 --out samples.png

networks=2 gives each direction a network of its own, for comparison: both of width=44 have about as
many parameters as one of the default width. `short=True` shrinks either to seconds,
for CI. The numbers are in README.md beside this file.

Method: Ma et al., *JanusFlow: Harmonizing Autoregression and Rectified Flow for Unified Multimodal
Understanding and Generation* (2024); the attention is that of Show-o2 (Xie, Yang, Shou, 2025),
causal in the text and full in the image.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from captions import CAPTIONS, LENGTH, NULL, SYMBOLS, captioned, decode, labels_of, support_vectors

import jflow
from jflow import bijectors, data, distributions, guidance, losses, nets, solvers, train
from jflow.apps import Experiment

SHAPE = (8, 8, 1)


def config(
    *,
    networks: int = 1,
    patch_size: int = 2,
    width: int = 64,
    layers: int = 3,
    dropout: float = 0.1,
    drop: float = 0.1,
    noise: float = 0.3,
    text_weight: float = 0.2,
    solver_steps: int = 16,
    guidance_scale: float = 1.5,
    steps: int = 600,
    batch: int = 64,
    learning_rate: float = 2e-3,
    ema: float = 0.995,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        networks: 1, or 2 for one a direction
        patch_size: side of the patch that is a token
        width: of a transformer
        layers: of a transformer
        dropout: rate of dropout
        drop: share of the rows whose caption is dropped where the image is learned
        noise: standard deviation of the noise on images, which span -1 to 1, where the caption is
        learned
        text_weight: weight of the nats of a caption beside the squared error of a velocity
        solver_steps: Heun steps of a sample
        guidance_scale: of the caption; 1 is without
        steps: updates
        batch: rows of an update
        learning_rate: of Adam, at its highest
        ema: decay of the average of the parameters
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        width, layers, steps, batch, solver_steps = 16, 1, 20, 32, 2
    if networks not in (1, 2):
        raise ValueError(f"expected networks of 1 or 2, got {networks}")
    net = nets.TextImageTransformer(
        len(SYMBOLS), length=LENGTH, width=width, num_layers=layers, dropout=dropout
    )
    cut = bijectors.tokens(SHAPE, patch_size)
    tokens = lambda x: cut.inverse({}, x)[0]  # noqa: E731
    velocity = jflow.velocity(nets.TextToImage(net))
    head = distributions.categorical(len(SYMBOLS))
    text = distributions.causal(nets.ImageToText(net), head, (LENGTH,))
    reader = "image" if networks == 1 else "reader"  # whose network reads images

    def of_text(params):
        return {"net": params[reader], "token": params["text"]}

    def init(key, rows):
        image_key, reader_key, text_key = jax.random.split(key, 3)
        x, cond = tokens(jnp.asarray(rows["x"])), jnp.asarray(rows["cond"])
        params = {"image": velocity.init(image_key, x, jnp.zeros(len(x)), cond)}
        if networks == 2:
            params["reader"] = velocity.init(reader_key, x, jnp.zeros(len(x)), cond)
        return params | {"text": head.init(text_key, jnp.zeros(1, int), jnp.zeros((1, width)))}

    def turned(key, batch, frozen=None):
        """The caption as what is learned, the image as what is given."""
        return {"x": batch["cond"], "cond": batch["x"]}

    parts = {
        "image": losses.chain(
            losses.drop_cond(drop, null=NULL),
            losses.selected(losses.flow_matching(velocity), params=lambda p: p["image"]),
        ),
        "text": losses.chain(
            losses.noised(noise),
            turned,
            losses.selected(losses.nll(text), params=of_text, weight=text_weight),
        ),
    }

    def cut_up(key, batch, frozen=None):
        return {**batch, "x": tokens(batch["x"])}

    @functools.cache
    def sampler(scale):
        field = velocity if scale == 1 else guidance.cfg(velocity, scale, null=NULL)

        @jax.jit
        def draw(params, key, cond):
            x0 = tokens(jax.random.normal(key, (len(cond), *SHAPE)))
            x = solvers.sample(field, params["image"], x0, cond, method=solver_steps)[0]
            return jnp.clip(cut.forward({}, x)[0], -1, 1)

        return draw

    def sample(params, key, n, *, word=None, guidance=guidance_scale):
        cond = CAPTIONS[np.arange(n) % 10] if word is None else np.tile(word, (n, 1))
        return {"x": sampler(float(guidance))(params, key, cond), "cond": cond}

    @jax.jit
    def write(params, x):
        """The most likely caption, symbol by symbol."""
        image, made = tokens(x), jnp.zeros((len(x), 0), jnp.int32)
        for _ in range(LENGTH):
            padded = jnp.pad(made, ((0, 0), (0, LENGTH - made.shape[1])))
            h = nets.ImageToText(net).apply({"params": params[reader]}, padded, image)
            logits = params["text"]["logits"] + h[:, made.shape[1]] @ params["text"]["kernel"]
            made = jnp.concatenate([made, jnp.argmax(logits, axis=1)[:, None]], axis=1)
        return made

    def evaluate(params, state, key, splits):
        rows = splits.test
        x = data.scale(0, 16).apply(state, rows, None)["x"]
        written = decode(write(params, x))
        nats = -text.log_prob(of_text(params), jnp.asarray(rows["cond"]), tokens(jnp.asarray(x)))
        scores = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "image_to_text": float(np.mean(np.array(written) == decode(rows["cond"]))),
            "caption_nats": float(np.mean(nats)),
        }
        judge = support_vectors(splits)
        for scale in sorted({1.0, float(guidance_scale)}):
            drawn = np.asarray(sampler(scale)(params, jax.random.clone(key), rows["cond"]))
            drawn = data.scale(0, 16).undo(state, {"x": drawn})["x"]
            name = "text_to_image" if scale == 1 else "guided_text_to_image"
            scores[name] = float(np.mean(judge(drawn) == labels_of(rows["cond"])))
        return scores

    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20 + 1, steps)
    return Experiment(
        model=velocity,
        init=init,
        loss=losses.chain(cut_up, losses.sum_losses(parts)),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2)),
        data=functools.partial(captioned, short),
        preprocess=data.scale(0, 16),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(ema),
        sample=sample,
        evaluate=evaluate,
        picture=lambda rows: data.image_grid(rows["x"], 0, 16, zoom=5),
        picture_rows=100,
        save_every=max(1, steps // 2),
    )
