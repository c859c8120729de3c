"""A flow of digits tuned by a reward, the ink of a digit: five methods in one table.

    python experiments/reward_digits/run.py --out runs/reward_digits    # 8x8 digits, no download
    python experiments/reward_digits/run.py --out runs/short --short    # seconds, for CI

A class-conditional rectified flow of scikit-learn's digits is trained, and then tuned, or guided,
towards more ink, the mean of the pixels between 0 and 1. `losses.grpo`, `losses.reward_weights` and
the resampling of best-of-n ask for the reward of samples alone, `losses.dpo` and
`losses.preference_reward` for which of two samples has more; `guidance.reward_guidance` needs no
training of the flow. OUT gets table.md and samples.png; README.md beside this file has the results.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import image
from sklearn.svm import SVC

import jflow
from jflow import data, guidance, losses, metrics, nets, solvers, train
from jflow.solvers import grids, noises
from jflow.types import Field

BETA = 0.05  # the weight of the KL, in the unit of the reward


def ink(x, cond=None):
    """The mean pixel of digits [b, 8, 8, 1] between -1 and 1, of which what is outside counts as
    its bound; between 0 and 1."""
    return jnp.mean((jnp.clip(x, -1, 1) + 1) / 2, axis=(1, 2, 3))


def run_updates(loss, optimizer, params, key, batches, updates, frozen=None, ema=None):
    """The params, or their average, after so many updates, in one program; batches is (state, key)
    -> batch."""
    step = train.make_step(loss, optimizer, ema=ema)
    state_key, run_key = jax.random.split(key)
    copied = jax.tree.map(jnp.copy, params)
    state = train.init_state(copied, optimizer, state_key, frozen=frozen, ema=ema)

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(lambda state, key: step(state, batches(state, key)), state, keys)

    state, history = run(state, jax.random.split(run_key, updates))
    return (state.params if ema is None else state.ema), jax.device_get(history)


def rows_of(table, batch):
    """Random rows of a dict of arrays, as batches."""
    table = jax.tree.map(jnp.asarray, table)
    n = len(jax.tree.leaves(table)[0])

    def draw(state, key):
        at = jax.random.randint(key, (batch,), 0, n)
        return jax.tree.map(lambda a: a[at], table)

    return draw


def pairs_of(x, cond, reward, rng):
    """Pairs of one class, {'x' the preferred one, 'worse', 'cond'}: the one with more ink by a
    difference d is preferred with probability sigmoid(d / BETA), as Bradley and Terry have it."""
    better, worse = [], []
    for c in range(10):
        rows = np.flatnonzero(cond == c)
        first, second = rows[: len(rows) // 2], rows[len(rows) // 2 : len(rows) // 2 * 2]
        more = rng.logistic(size=len(first)) < (reward[first] - reward[second]) / BETA
        better.append(np.where(more, first, second))
        worse.append(np.where(more, second, first))
    better, worse = np.concatenate(better), np.concatenate(worse)
    return {"x": x[better], "worse": x[worse], "cond": cond[better]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of table and picture")
    parser.add_argument("--steps", type=int, default=3000, help="updates of the flow")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--grpo", type=int, default=300, help="updates of GRPO")
    parser.add_argument("--tune", type=int, default=500, help="updates of each other method")
    parser.add_argument("--bank", type=int, default=8000, help="samples for RWR, DPO and NRG")
    parser.add_argument("--samples", type=int, default=100, help="samples of a class in the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds: to see that it runs")
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.grpo, args.tune = 100, 32, 3, 10
        args.bank, args.samples = 200, 10
    args.out.mkdir(parents=True, exist_ok=True)
    keys = dict(
        zip(
            "init base bank grpo rwr dpo nrg samples".split(),
            jax.random.split(jax.random.key(args.seed), 8),
            strict=True,
        )
    )

    splits = data.digits()
    scale = lambda x: np.asarray(x, np.float32) / 8 - 1  # noqa: E731
    train_rows = {"x": scale(splits.train["x"]), "cond": splits.train["cond"].astype(np.int32)}
    judge = SVC(gamma=0.001, C=10.0).fit(
        splits.train["x"].reshape(-1, 64).astype(float), splits.train["cond"]
    )
    real = {c: scale(splits.test["x"][splits.test["cond"] == c]) for c in range(10)}

    velocity = jflow.velocity(nets.ResidualMLP(width=args.width, num_blocks=3, num_classes=10))
    start = velocity.init(keys["init"], jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, int))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, args.steps // 20, args.steps)
    began, seconds = time.process_time(), {}

    def clocked(name):
        nonlocal began
        seconds[name], began = time.process_time() - began, time.process_time()

    base, history = run_updates(
        losses.flow_matching(velocity),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4)),
        start,
        keys["base"],
        rows_of(train_rows, 256),
        args.steps,
        ema=train.ema.warmup(0.998),
    )
    clocked("base")
    print(
        f"base: loss {history['loss'][-100:].mean():.4f}, {seconds['base']:.0f} CPU s", flush=True
    )

    def sampler(field):
        method = solvers.fixed(20)
        return jax.jit(lambda p, x0, cond: solvers.sample(field, p, x0, cond, method=method)[0])

    noise_key, more_key = jax.random.split(keys["samples"])
    labels = np.arange(10 * args.samples) % 10
    noise = jax.random.normal(noise_key, (len(labels), 8, 8, 1))
    plain = sampler(velocity)
    drawn = {"base": plain(base, noise, labels)}

    # 1. GRPO: 10 stochastic steps, groups of 16 samples of one class.
    step = solvers.euler_maruyama(velocity, noises.grpo(0.7))
    rollouts = losses.group_rollouts(
        step,
        ink,
        source=lambda key, n: jax.random.normal(key, (n, 8, 8, 1)),
        grid=grids.uniform(10),
        groups=16,
        group_size=16,
        conds=lambda key, n: jax.random.randint(key, (n,), 0, 10),
        future_kl=True,
    )
    frozen = {"reference": base}
    began = time.process_time()
    tuned, history = run_updates(
        losses.grpo(step, kl=BETA),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4)),
        base,
        keys["grpo"],
        rollouts,
        args.grpo,
        frozen,
    )
    clocked("GRPO")
    print(
        f"GRPO: largest log-ratio {history['log_ratio'].max():.1e}, ink of rollouts"
        f" {history['reward'][:20].mean():.4f} -> {history['reward'][-20:].mean():.4f}",
        flush=True,
    )
    drawn["GRPO"] = plain(tuned, noise, labels)

    # 2. and 3.: one bank of samples of the base, with their rewards.
    bank_labels = np.arange(args.bank) % 10
    bank = plain(base, jax.random.normal(keys["bank"], (args.bank, 8, 8, 1)), bank_labels)
    rewards = ink(bank)
    table = {"x": bank, "cond": bank_labels.astype(np.int32)}
    # the reward beside the mean of the class, so that every class counts alike
    own = np.asarray(rewards)
    means = np.array([own[bank_labels == c].mean() for c in range(10)])
    adam = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-4, args.tune))
    )
    began = time.process_time()
    tuned, _ = run_updates(
        losses.chain(losses.reward_weights(BETA), losses.flow_matching(velocity)),
        adam,
        base,
        keys["rwr"],
        rows_of({**table, "reward": own - means[bank_labels]}, 256),
        args.tune,
    )
    clocked("RWR")
    drawn["RWR"] = plain(tuned, noise, labels)

    rng = np.random.default_rng(args.seed)
    pairs = pairs_of(np.asarray(bank), table["cond"], own, rng)
    tuned, history = run_updates(
        losses.dpo(velocity, 256.0),
        adam,
        base,
        keys["dpo"],
        rows_of(pairs, 256),
        args.tune,
        frozen,
    )
    clocked("DPO")
    print(f"DPO: accuracy {history['accuracy'][-50:].mean():.3f}", flush=True)
    drawn["DPO"] = plain(tuned, noise, labels)

    # 4. NRG: a reward of noisy digits, learned from the pairs, guides the base.
    net = jflow.velocity(nets.ResidualMLP(width=64, num_blocks=2, num_classes=10))

    def of_noisy(params, x, t, cond=None, *, key=None):
        """t times a network: at t=0 it says nothing of the data, and the guidance stays finite."""
        return t * losses.mean_event(net.apply(params, x, t, cond, key=key))

    noisy = Field(net.init, of_noisy)
    fast = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, args.tune))
    )
    init_key, fit_key = jax.random.split(keys["nrg"])
    untrained = noisy.init(init_key, bank[:1], jnp.zeros(1), jnp.zeros(1, int))
    reward, history = run_updates(
        losses.preference_reward(noisy), fast, untrained, fit_key, rows_of(pairs, 256), args.tune
    )
    clocked("NRG")
    print(f"NRG: accuracy {history['accuracy'][-50:].mean():.3f}", flush=True)
    guided = guidance.reward_guidance(velocity, noisy, 1.0, start=0.1)
    drawn["NRG"] = sampler(guided)({"velocity": base, "reward": reward}, noise, labels)
    field = guidance.denoised_reward(velocity, lambda x, cond: ink(x) / BETA)
    guided = guidance.reward_guidance(velocity, field, 1.0, start=0.1)
    both = {"velocity": base, "reward": base}
    drawn["NRG, ink of the predicted digit"] = sampler(guided)(both, noise, labels)

    # 5. best of 4, and the law that GRPO and RWR aim for: the bank, resampled
    rest = jax.random.normal(more_key, (3, *noise.shape))
    four = jnp.stack([drawn["base"], *(plain(base, z, labels) for z in rest)])
    best = jnp.argmax(jax.vmap(ink)(four), axis=0)
    drawn["best of 4"] = four[best, jnp.arange(len(labels))]
    chosen = np.empty(len(labels), int)
    for c in range(10):
        weight = np.exp((own - own.max()) / BETA) * (bank_labels == c)
        chosen[labels == c] = rng.choice(args.bank, (labels == c).sum(), p=weight / weight.sum())
    drawn[f"the base times exp(ink / {BETA})"] = bank[chosen]

    def score(x):
        x = np.clip(np.asarray(x), -1, 1)
        energy = np.mean([metrics.energy_distance(x[labels == c], real[c]) for c in range(10)])
        pixels = np.round((x.reshape(-1, 64) + 1) * 8)
        return float(ink(x).mean()), float(judge.score(pixels, labels)), energy

    floor = score(drawn["base"])[2]
    lines = [
        "| samples of | ink | agreement | energy distance / base | CPU s of training |",
        "|---|---|---|---|---|",
    ]
    for name, x in drawn.items():
        amount, agreement, energy = score(x)
        spent = seconds.get(name)
        cost = "" if spent is None else f"{spent:.0f}"
        lines.append(f"| {name} | {amount:.4f} | {agreement:.3f} | {energy / floor:.2f} | {cost} |")
    test = np.concatenate([real[c] for c in range(10)])
    lines.append(f"| test digits | {float(ink(test).mean()):.4f} | | | |")
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")

    shown = ["base", "GRPO", "RWR", "DPO", "NRG", "best of 4"]
    rows = np.concatenate([np.asarray(drawn[name][:20]) for name in shown])
    picture = data.image_grid(rows, -1, 1, columns=20, zoom=4)
    image.imsave(args.out / "samples.png", picture, cmap="gray")


if __name__ == "__main__":
    main()
