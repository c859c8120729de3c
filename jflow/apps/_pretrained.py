"""Pictures of a published model, which is read from a folder one part after another."""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jflow import adapters, convert, guidance, solvers
from jflow.types import Array, Condition, PyTree, Velocity


def pictures(
    folder: Path,
    prompts: Sequence[str],
    *,
    num: int = 1,
    seed: int = 0,
    negative: str | None = None,
    scale: float | None = None,
    steps: int | None = None,
    shift: float | None = None,
    height: int | None = None,
    width: int | None = None,
    cut: bool = False,
    dtype: str | None = None,
    sharding: Callable[[PyTree], PyTree] | None = None,
    loras: Sequence[Path] = (),
    progress: bool = True,
) -> Iterator[np.ndarray]:
    """Pictures [H, W, 3] of bytes, `num` for each prompt, in the order of the prompts.

    The encoders of text are read, and freed before the velocity is read, and that before the
    decoder: memory is that of the largest part. The i-th picture of every prompt starts from the
    noise of key(seed + i), whatever else is drawn. LoRAs act beside the layers of the velocity, one
    added to another, and its weights are not copied.
    """
    read = partial(convert.load_pipeline, folder, dtype=dtype, sharding=sharding)
    plan = read(parts=())  # mistakes are found before anything large is read
    shape, grid = plan.shape(height, width), plan.grid(steps, height, width, shift=shift)
    scale = _scale(folder, plan.settings, scale, negative)
    null = plan.settings.get("null") if negative is None else negative
    guided = null is not None and scale != 1
    total = len(prompts) * num
    with tqdm(total=total * (len(grid) - 1), unit="step", disable=not progress) as bar:
        bar.set_description("text")
        nulls = [] if null is None or not guided else [null]
        conds = _conditions(read, [*prompts, *nulls], cut)
        bar.set_description("reading")
        embedded = None if "null" in plan.settings else scale
        model = _adapted(read(parts=("velocity",), guidance=embedded), loras)
        step, latents = _euler(model.velocity, scale if guided else None), []
        for i in range(total):
            bar.set_description(f"picture {i + 1} of {total}")
            prompt, j = divmod(i, num)
            cond = (conds[prompt], conds[-1]) if guided else conds[prompt]
            x = jax.random.normal(jax.random.key(seed + j), (1, *shape))
            for t0, t1 in zip(grid[:-1], grid[1:], strict=True):
                x = jax.block_until_ready(step(model.params["velocity"], x, cond, t0, t1))
                bar.update()
            latents.append(np.asarray(x))
        del model, step
        gc.collect()
        bar.set_description("decoding")
        model = read(parts=("autoencoder",))
        for latent in latents:
            yield _bytes(model.decode(model.params["autoencoder"], jnp.asarray(latent))[0])


def _scale(folder: Path, settings: dict, scale: float | None, negative: str | None) -> float | None:
    """The scale of guidance, checked."""
    if scale is not None and "guidance" not in settings:
        raise ValueError(f"--guidance: the model of {folder} was distilled and takes none")
    scale = settings.get("guidance") if scale is None else scale
    if negative is not None and "null" not in settings:
        raise ValueError(
            f"--negative-prompt: the model of {folder} is not guided by a second prompt and takes "
            "none"
        )
    if negative is not None and scale == 1:
        raise ValueError("--negative-prompt has no influence with --guidance 1")
    return scale


def _adapted(model: convert.Pipeline, loras: Sequence[Path]) -> convert.Pipeline:
    """The model with its velocity adapted, over params {'base', 'adapter'}."""
    if not loras or model.net is None:
        return model
    base = model.params["velocity"]
    own = {str(i): convert.lora(file, model.net, base)[1] for i, file in enumerate(loras)}
    beside = adapters.combine({name: adapters.lora_activations(1) for name in own})
    velocity = adapters.wrap(model.velocity, beside)
    return model._replace(velocity=velocity, params={"velocity": {"base": base, "adapter": own}})


def _conditions(read, prompts: Sequence[str], cut: bool) -> list[Condition]:
    """One of a row for each prompt. The encoders are freed at the end."""
    model = read(parts=("text",))
    conds = model.cond(model.params["text"], prompts, cut=cut)
    return [
        jax.tree.map(partial(jnp.take, indices=jnp.array([i]), axis=0), conds)
        for i in range(len(prompts))
    ]


def _euler(velocity: Velocity, scale: float | None):
    """One step, jitted: the loop over steps stays outside, so that it can be watched.

    With a scale its condition is a pair (towards, away)."""
    if scale is not None:
        velocity = guidance.negative(velocity, guidance.scaled(scale))

    @jax.jit
    def step(params, x, cond, t0, t1):
        method = solvers.fixed(1, diffrax.Euler())
        return solvers.sample(velocity, params, x, cond, method=method, t0=t0, t1=t1)[0]

    return step


def _bytes(image: Array) -> np.ndarray:
    """An image in [-1, 1] as bytes."""
    numbers = np.asarray(image, np.float32)
    if not np.isfinite(numbers).all():
        raise FloatingPointError("the picture is not finite: try --dtype float32")
    return np.rint(np.clip(numbers / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
