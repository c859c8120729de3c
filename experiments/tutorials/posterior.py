# %% [markdown]
# # A posterior from a simulator
#
# A simulator draws an observation y given parameters; we want the parameters given y. A conditional
# flow q(parameters | y) is trained on simulated pairs by maximum likelihood, and needs no
# likelihood of the simulator. `jflow.apps.sbi` does it. Here the exact posterior is known, so that
# we can see whether the answer is right.

# %%
import sys

import jax
import matplotlib.pyplot as plt
import numpy as np

from jflow import distributions
from jflow.apps import sbi

STEPS = 20 if "--short" in sys.argv else 2000

# %% [markdown]
# A prior of two parameters, and the simulator: a map with noise. In y = A theta + noise everything
# is Gaussian, and the posterior has covariance (1 + A' A / s^2)^-1 and mean covariance A' y / s^2.

# %%
A, NOISE = np.array([[1.0, 0.8], [-0.5, 1.0], [0.3, 0.3]], np.float32), 0.5
prior = sbi.as_prior(distributions.normal((2,)))


def simulator(key, theta):
    return theta @ A.T + NOISE * jax.random.normal(key, (len(theta), 3))


# %% [markdown]
# The posterior of every observation at once: the flow is trained on 20,000 simulations.

# %%
posterior = sbi.fit(
    jax.random.key(0), prior, simulator, num_simulations=20_000, steps=STEPS, progress=False
)

# %% [markdown]
# One observation, and many draws from its posterior.

# %%
observed = np.array([1.0, 0.5, 0.2], np.float32)
draws = np.asarray(posterior.sample(jax.random.key(1), 5000, observed))
covariance = np.linalg.inv(np.eye(2) + A.T @ A / NOISE**2)
mean = covariance @ A.T @ observed / NOISE**2
print("mean:       ", draws.mean(0).round(3), " exact:", mean.round(3))
print("deviations: ", draws.std(0).round(3), " exact:", np.sqrt(np.diag(covariance)).round(3))

# %% [markdown]
# Calibration: for fresh simulations, the rank of the true parameter among draws given its
# observation is uniform where the posterior is right, and so is the rank of its density. What an
# exact posterior would have in at most 1 case of 100 is rejected.

# %%
found = sbi.calibration(
    jax.random.key(2), posterior, simulator, num_simulations=500, progress=False
)
print({name: round(p, 3) for name, p in found.p_values.items()}, " rejected:", found.rejected)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
axes[0].plot(*draws.T, ".", markersize=1)
angle = np.linspace(0, 2 * np.pi, 100)
circle = np.linalg.cholesky(covariance) @ np.stack([np.cos(angle), np.sin(angle)])
for radius in (1, 2):
    axes[0].plot(*(mean[:, None] + radius * circle), color="black", linewidth=1)
axes[0].set(title="draws, and the exact posterior's ellipses", aspect="equal")
axes[1].hist(found.ranks, bins=10, range=(0, 100), label=["first", "second"])
axes[1].axhline(50, color="black", linewidth=1)
axes[1].set(title="ranks of the truth among 99 draws")
axes[1].legend()
plt.tight_layout()
plt.show()
