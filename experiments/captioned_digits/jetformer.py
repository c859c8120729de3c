"""Digits and their captions as one sequence with an exact likelihood: JetFormer.

Train, evaluate and sample (no download):

    jflow train experiments/captioned_digits/jetformer.py --workdir runs/jetformer
    jflow evaluate runs/jetformer
    jflow sample runs/jetformer --num 100 --out samples.png

prior=none is what stands beside it: Jet given the digit, over a normal base, with as many
parameters. `short=True` shrinks either to seconds, for CI. The numbers are in README.md beside this
file.

Method: Tschannen, Pinto, Kolesnikov, *JetFormer: An Autoregressive Generative Model of Raw Images
and Text* (2024): log p(caption) + log p(image | caption), noise on the pixels that is annealed,
captions dropped for guidance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from captions import CAPTIONS, LENGTH, NULL, SYMBOLS, captioned, labels_of, support_vectors

from jflow import data, distributions, flows, losses, metrics, nets, train
from jflow.apps import Experiment

SHAPE, LEVELS = (8, 8, 1), 17


def config(
    *,
    prior: str = "text",
    patch_size: int = 2,
    kept: int = 3,
    components: int = 8,
    width: int = 48,
    depth: int = 6,
    layers: int = 1,
    prior_width: int = 64,
    prior_layers: int = 2,
    noise: float = 0.2,
    anneal: float = 0.7,
    drop: float = 0.1,
    guidance_scale: float = 1.5,
    steps: int = 800,
    batch: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-2,
    ema: float = 0.995,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        prior: text, or none for Jet over a normal base
        patch_size: side of the patch that is a token
        kept: numbers of a token that the prior models
        components: normals of the mixture of a token
        width: of the networks of Jet
        depth: couplings of Jet
        layers: of the network of a coupling
        prior_width: of the causal transformer
        prior_layers: of the causal transformer
        noise: standard deviation of the noise on pixels in [0, 1] at first
        anneal: share of the updates after which there is none
        drop: share of the rows without a caption
        guidance_scale: 1 is without
        steps: updates
        batch: rows of an update
        learning_rate: of Adam, at its highest
        weight_decay: of Adam
        ema: decay of the average of the parameters
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        width, depth, prior_width, prior_layers, components = 16, 2, 16, 1, 2
        steps, batch = 20, 32
    if prior not in ("text", "none"):
        raise ValueError(f"unknown prior {prior!r}: expected text or none")
    sizes = {"patch_size": patch_size, "width": width, "depth": depth, "num_layers": layers}
    transformer = nets.CausalTransformer(
        features=prior_width, width=prior_width, num_layers=prior_layers
    )
    net = nets.WithText(transformer, len(SYMBOLS), length=LENGTH, width=prior_width)
    head = distributions.categorical(len(SYMBOLS))
    text = distributions.causal(nets.OfText(net), head, (LENGTH,))

    def jetformer(net, guide=None):
        return flows.jetformer(
            SHAPE, net, kept=kept, components=components, guide=guide, min_std=1e-2, **sizes
        )

    if prior == "text":
        flow, read = jetformer(net), jnp.asarray
    else:  # the digit that the caption names, and 10 for none
        flow, read = flows.jet(SHAPE, num_classes=10, **sizes), digit_of

    def of_text(params):
        """The params of the law of the text: the network is that of the images."""
        return {"net": params["image"]["base"]["base"]["net"], "token": params["text"]}

    def init(key, rows):
        image_key, text_key = jax.random.split(key)
        params = {"image": flow.init(image_key, rows["x"], read(rows["cond"]))}
        if prior == "text":
            h = jnp.zeros((1, prior_width))
            params["text"] = head.init(text_key, jnp.zeros(1, jnp.int32), h)
        return params

    def given(key, batch, frozen=None):
        return {**batch, "cond": read(batch["cond"])}

    schedule = optax.linear_schedule(noise, 0.0, max(1, round(anneal * steps)))
    image = losses.chain(
        losses.noised(schedule),
        losses.drop_cond(drop, null=NULL),
        given,
        losses.selected(losses.nll(flow), params=lambda params: params["image"]),
    )
    parts = {"image": image}
    if prior == "text":
        parts["text"] = losses.selected(
            losses.nll(text), params=of_text, batch=lambda batch: {"x": batch["cond"]}
        )

    @functools.cache
    def sampler(scale):
        guided = flow
        if scale != 1 and prior == "text":
            contrast = lambda law: distributions.contrasted(law, scale)  # noqa: E731
            guided = jetformer(nets.Contrasted(net, NULL), contrast)
        return jax.jit(
            lambda params, key, cond: guided.sample(params["image"], key, len(cond), read(cond))
        )

    def sample(params, key, n, *, word=None, guidance=guidance_scale):
        cond = CAPTIONS[np.arange(n) % 10] if word is None else np.tile(word, (n, 1))
        return {"x": sampler(float(guidance))(params, key, cond), "cond": cond}

    @jax.jit
    def log_probs(params, x, caption):
        return flow.log_prob(params["image"], x, read(jnp.tile(caption[None], (len(x), 1))))

    @jax.jit
    def text_log_prob(params, captions):
        return text.log_prob(of_text(params), captions)

    def evaluate(params, state, key, splits):
        scores = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
        for name, rows in {"train": splits.train, "test": splits.test}.items():
            rows = data.take(rows, slice(360))
            pixels = data.dequantize(LEVELS)
            x = pixels.apply(state, rows, np.random.default_rng(0))
            each = np.stack([log_probs(params, x["x"], c) for c in CAPTIONS], axis=1)
            each = each + np.asarray(pixels.log_det(state, x))[:, None]
            labels = labels_of(rows["cond"])
            own = np.take_along_axis(each, labels[:, None], axis=1)[:, 0]
            scores |= {
                f"{name}_bpd_given": metrics.bits_per_dim(own, 64),
                f"{name}_bpd": metrics.bits_per_dim(np.logaddexp.reduce(each, 1) - np.log(10), 64),
                f"{name}_classified": float(np.mean(np.argmax(each, axis=1) == labels)),
            }
        if prior == "text":
            scores["caption_nats"] = -float(np.mean(text_log_prob(params, splits.test["cond"])))
        judge, cond = support_vectors(splits), splits.test["cond"]
        for scale in sorted({1.0, float(guidance_scale)} if prior == "text" else {1.0}):
            x = np.asarray(sampler(scale)(params, jax.random.clone(key), cond))
            drawn = data.dequantize(LEVELS).undo(state, {"x": x})["x"]
            name = "agreement" if scale == 1 else "guided_agreement"
            scores[name] = float(np.mean(judge(drawn) == labels_of(cond)))
        return scores

    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20 + 1, steps)
    return Experiment(
        model=flow,
        init=init,
        loss=losses.sum_losses(parts),
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=weight_decay)
        ),
        data=functools.partial(captioned, short),
        preprocess=data.dequantize(LEVELS),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(ema),
        frozen=lambda params, key, batch: {"step": jnp.int32(0)},
        refresh=losses.count_steps,
        sample=sample,
        evaluate=evaluate,
        picture=lambda rows: data.image_grid(rows["x"], 0, LEVELS - 1, zoom=5),
        picture_rows=100,
        save_every=max(1, steps // 2),
    )


def digit_of(caption):
    """The digit [n] that each caption [n, LENGTH] names, 10 for none."""
    same = jnp.all(jnp.asarray(caption)[:, None] == CAPTIONS[None], axis=2)
    return jnp.where(jnp.any(same, axis=1), jnp.argmax(same, axis=1), 10)
