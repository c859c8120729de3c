# %% [markdown]
# # Digits on demand: labels and guidance
#
# A class-conditional velocity for scikit-learn's 8x8 digits, trained with dropped labels, and
# sampled with classifier-free guidance of growing scale.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jflow
from jflow import data, guidance, losses, nets, solvers, train

STEPS = 20 if "--short" in sys.argv else 2000
digits = data.digits().train  # {'x': uint8 [n, 8, 8, 1] of 0 .. 16, 'cond': labels [n]}
images = {"x": digits["x"].reshape(-1, 64).astype("float32") / 8 - 1, "cond": digits["cond"]}

# %% [markdown]
# A tenth of the labels is replaced by the null label 10, so that one network learns both
# velocities, given the class and given nothing.

# %%
velocity = jflow.velocity(nets.ResidualMLP(width=256, num_blocks=2, num_classes=10))
loss = losses.chain(losses.drop_cond(0.1, null=10), losses.flow_matching(velocity))
params = velocity.init(jax.random.key(0), images["x"][:1], jnp.zeros(1), jnp.zeros(1, int))

optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, STEPS))
step = jax.jit(train.make_step(loss, optimizer, ema=0.995), donate_argnums=0)
state = train.init_state(params, optimizer, jax.random.key(1), ema=0.995)
for _, batch in zip(range(STEPS), data.batches(images, 128)):
    state, metrics = step(state, batch)
print(f"loss of the last batch: {metrics['loss']:.3f}")

# %% [markdown]
# Guidance is a function from a velocity to a velocity, so that every solver takes it. Scale 1 is
# the conditional velocity itself; larger scales give up variety for clear shapes.

# %%
labels = jnp.tile(jnp.arange(10), 50)
noise = jax.random.normal(jax.random.key(2), (500, 64))


def draw(scale):
    guided = guidance.cfg(velocity, scale, null=10)
    return jax.jit(lambda x: solvers.sample(guided, state.ema, x, labels, method=20)[0])(noise)


figure, axes = plt.subplots(1, 3, figsize=(11, 2.6))
for axis, scale in zip(axes, (0.0, 1.0, 3.0)):
    x = np.asarray(draw(scale))[:40].reshape(4, 10, 8, 8)
    axis.imshow(x.transpose(0, 2, 1, 3).reshape(32, 80), cmap="gray_r", vmin=-1, vmax=1)
    axis.set(title=f"scale {scale:g}", xticks=[], yticks=[])
plt.tight_layout()
plt.show()

# %% [markdown]
# How often a nearest-neighbor classifier reads the class that was asked for:

# %%
from sklearn.neighbors import KNeighborsClassifier

judge = KNeighborsClassifier(5).fit(images["x"], images["cond"])
for scale in (0.0, 1.0, 2.0, 3.0):
    agree = np.mean(judge.predict(np.asarray(draw(scale))) == np.asarray(labels))
    print(f"scale {scale:g}: {agree:.0%} as asked")
