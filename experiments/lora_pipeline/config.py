r"""A LoRA on a folder of Stable Diffusion 3 or FLUX.1, as diffusers writes it.

    jflow train experiments/lora_pipeline folder=stable-diffusion-3-medium images=my_pictures \
        --workdir runs/lora
    python experiments/lora_pipeline/export.py runs/lora --out style.safetensors
    jflow sample --pretrained stable-diffusion-3-medium --lora style.safetensors \
        --prompt "a red square" --out square.png

images is a folder of pictures (.png, .jpg), each with a caption in a .txt file of the same name;
without it squares in four colors are made here. Captions and pictures are encoded once, before the
training, by the folder's own encoders, which are then freed. The network of the folder is the base
of the LoRA, in frozen['base']: no gradient, optimizer or checkpoint of it is held, and it is read
from the folder again where a run goes on. `jflow sample runs/lora --num 4 --out pictures.png` draws
the captions in turn. `short=True` shrinks the run to seconds, for a tiny folder in CI.

Method: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models* (2021); flow matching with
logit-normal times as in Esser et al., *Scaling Rectified Flow Transformers for High-Resolution
Image Synthesis* (2024).
"""

import functools
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageOps

from jflow import adapters, convert, data, guidance, losses, solvers, times
from jflow.apps import Experiment
from jflow.types import Condition

COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "gray": (128,) * 3}


def config(
    *,
    folder: str = "",
    images: str = "",
    height: int = 0,
    width: int = 0,
    rank: int = 4,
    where: str = "*block*kernel",
    steps: int = 1000,
    batch: int = 4,
    learning_rate: float = 1e-4,
    drop: float = 0.1,
    dtype: str = "",
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        folder: with model_index.json in it
        images: folder of pictures and captions; squares in four colors if empty
        height: of the pictures, in pixels; 0: as published
        width: likewise
        rank: of the LoRA
        where: which kernels of the network have one, a glob pattern
        steps: updates
        batch: rows of an update
        learning_rate: of Adam, at its highest
        drop: share of the rows whose caption is dropped, for models that are guided by an empty one
        dtype: of the weights, float32 or bfloat16; as in the files if empty
        seed: of the parameters, the latents and the batches
        short: shrink the run to seconds, for CI
    """
    if not folder:
        raise ValueError("set folder=FOLDER, of a published model as diffusers writes it")
    if short:
        steps, batch, height, width = 4, 2, 16, 24
    read = functools.partial(convert.load_pipeline, folder, dtype=dtype or None)
    model = read(parts=("velocity",))
    base, settings = model.params["velocity"], model.settings
    size = height or settings["height"], width or settings["width"]
    guided = "null" in settings
    lora = adapters.lora_activations(rank, where=where)
    velocity = adapters.wrap(model.velocity, lora)

    @functools.cache
    def pictures():
        return read_pictures(images, *size)

    @functools.cache
    def conditions():
        """Of the captions, and last of the empty one."""
        text = read(parts=("text",))
        made = text.cond(text.params["text"], [*pictures()[1], ""])
        return {"context": np.asarray(made.context), "vector": np.asarray(made.vector)}

    @functools.cache
    def rows():
        coder = read(parts=("autoencoder",))
        seen = {"x": pictures()[0]} | {name: x[:-1] for name, x in conditions().items()}
        made = data.latents(
            coder.encode,
            coder.params["autoencoder"],
            seen,
            key=jax.random.key(seed),
            batch=batch,
            progress=not short,
        )
        return data.Splits(made, None, None)

    def with_cond(key, batch, frozen=None):
        """The batch with its condition in one piece, and for some rows that of no caption."""
        own = {name: batch[name] for name in ("context", "vector")}
        if guided and drop:
            gone = jax.random.bernoulli(key, drop, (len(batch["x"]),))
            own = {
                name: jnp.where(
                    gone.reshape(-1, *[1] * (x.ndim - 1)), frozen["null"][name][None], x
                )
                for name, x in own.items()
            }
        return {"x": batch["x"], "cond": Condition(**own)}

    def frozen(params, key, batch):
        null = {"null": {name: x[-1] for name, x in conditions().items()}} if guided else {}
        return {"base": base, **null}

    @functools.cache
    def step():
        drawn = velocity
        if guided:
            drawn = guidance.negative(velocity, guidance.scaled(settings["guidance"]))

        def one(own, base, x, cond, t0, t1):
            params, method = {"base": base, "adapter": own}, solvers.fixed(1, diffrax.Euler())
            return solvers.sample(drawn, params, x, cond, method=method, t0=t0, t1=t1)[0]

        return jax.jit(one)

    def sample(params, key, n, *, steps=None):
        """Pictures in [-1, 1], of the captions in turn."""
        made = conditions()
        towards = {name: x[np.arange(n) % (len(x) - 1)] for name, x in made.items()}
        away = {name: np.repeat(x[-1:], n, axis=0) for name, x in made.items()}
        cond = (Condition(**towards), Condition(**away)) if guided else Condition(**towards)
        x = jax.random.normal(key, (n, *model.shape(*size)))
        grid = model.grid(2 if short else steps, *size)
        for t0, t1 in zip(grid[:-1], grid[1:], strict=True):
            x = step()(params, base, x, cond, t0, t1)
        coder = read(parts=("autoencoder",))
        decode = jax.jit(lambda params, z: coder.decode(params, z[None])[0])
        return {"x": np.stack([decode(coder.params["autoencoder"], z) for z in x])}

    matching = losses.flow_matching(velocity, time=times.logit_normal())
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), steps)
    return Experiment(
        model=model.net,
        init=lambda key, batch: lora.init(key, base),
        loss=losses.chain(with_cond, adapters.adapter_loss(matching)),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
        data=rows,
        preprocess=data.identity(),
        steps=steps,
        batch=batch,
        seed=seed,
        sample=sample,
        picture=lambda rows: data.image_grid(rows["x"], -1, 1, columns=4),
        picture_rows=4,
        frozen=frozen,
        unsaved=("base",),
    )


def read_pictures(folder: str, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """(images [n, height, width, 3] in [-1, 1], captions): cut to the shape at the middle."""
    if not folder:
        squares = [square(color, height, width) for color in COLORS.values()]
        return as_numbers(squares), [f"a {color} square" for color in COLORS]
    files = sorted(
        path for path in Path(folder).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg")
    )
    if not files:
        raise ValueError(f"{folder} holds no pictures: expected files .png or .jpg")
    lost = [path.name for path in files if not path.with_suffix(".txt").is_file()]
    if lost:
        raise ValueError(f"{folder}: expected a caption beside {lost[0]}, in a .txt of its name")
    found = []
    for path in files:
        with Image.open(path) as image:
            found.append(np.asarray(ImageOps.fit(image.convert("RGB"), (width, height))))
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in files]
    return as_numbers(found), captions


def square(color: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    image = np.full((height, width, 3), 255, np.uint8)
    image[height // 4 : -height // 4, width // 4 : -width // 4] = color
    return image


def as_numbers(images: list[np.ndarray]) -> np.ndarray:
    return np.stack(images).astype(np.float32) / 127.5 - 1
