"""Forecasts of ETTh1 by the patch: a flow head and a Gaussian head on one causal transformer.

    # minutes on two CPU cores; JFLOW_DATA/timeseries/ETTh1.csv.gz, or --data FILE
    python experiments/forecasting/run.py --out runs/forecasting
    python experiments/forecasting/run.py --out runs/forecasting --seed 1
    # CI: a minute, on an invented series where there is no data; numbers mean nothing
    python experiments/forecasting/run.py --out runs/short --short

A causal transformer reads four patches of 24 hours of one column, standardized by their mean and
deviation, and forecasts the next four, patch after patch. (a) A flow head, trained by
`losses.causal_matching` (Sundial's TimeFlow); (b) a Gaussian head with as many params, trained by
likelihood. Both have the same transformer, batches, updates and average, and are stopped where
their loss on the four months of validation is least. Prints CRPS, coverage of the central 80%, and
the exact nats of a patch; writes results.json and forecasts.png. README.md has the results.
"""

import argparse
import json
import os
import time
from pathlib import Path

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import series

import jflow
from jflow import distributions, flows, losses, metrics, nets, solvers, train
from jflow.types import Condition

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATCH, CONTEXT, HORIZON = 24, 96, 96
LENGTH = CONTEXT + HORIZON
NAMES = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")


class WithHead(nn.Module):
    """A causal network and a network of each h_i behind it."""

    net: nn.Module
    head: nn.Module

    @nn.compact
    def __call__(self, x, cond=None, cache=None, first=0):
        if cache is None:
            return self.head(self.net(x, cond))
        h, cache = self.net(x, cond, cache=cache, first=first)
        return self.head(h), cache

    def empty_cache(self, x, rows):
        return self.net.empty_cache(x, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="ETTh1.csv.gz")
    parser.add_argument("--steps", type=int, default=1000, help="updates of each model")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--draws", type=int, default=100, help="of each forecast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--head", choices=("flow", "Gaussian"), help="one of the two alone")
    parser.add_argument("--short", action="store_true", help="shrink it to seconds")
    args = parser.parse_args()
    out = args.out / str(args.seed)
    out.mkdir(parents=True, exist_ok=True)
    file = args.data or Path(os.environ.get("JFLOW_DATA", "")) / "timeseries/ETTh1.csv.gz"
    x = series.invented(args.seed) if args.short else series.read(file, args.seed)
    batch, every, apart, exact = 256, 24, 100, 24
    if args.short:
        args.steps, args.width, args.draws = 20, 8, 4
        batch, every, apart, exact = 8, 240, 10, 2

    width = args.width
    trunk = nets.CausalTransformer(
        features=width, width=width, num_layers=2, num_heads=4, num_classes=7, rotary_period=100.0
    )
    head = jflow.velocity(nets.ResidualMLP(width=width, num_blocks=2))
    base = distributions.normal((PATCH,))
    flow = flows.cnf(head, base, method=solvers.fixed(8, diffrax.Midpoint()))
    wide = (4 * width, 4 * width)
    beside = WithHead(trunk, nets.MLP(hidden=wide))
    gaussian = distributions.conditional_mixture((PATCH,))
    of_patches = distributions.token_log_probs(beside, gaussian)
    matching = losses.causal_matching(trunk, head, base, draws=4)

    def likelihood(params, key, batch, frozen=None):
        log_p = of_patches(params, batch["x"], batch["cond"], key=key)
        return -jnp.sum(batch["weight"] * log_p) / jnp.sum(batch["weight"]), {}

    models = {
        "flow head": (trunk, flow, matching),
        "Gaussian head": (beside, gaussian, likelihood),
    }
    models = {name: model for name, model in models.items() if (args.head or "") in name}
    validation = batch_of(x, *every_window("validation", 2 * every))
    found, results = {}, {}
    for name, (net, token, loss) in models.items():
        begun = time.monotonic()
        best, last, curve = trained(
            net, token, loss, x, validation, args.steps, batch, args.seed, apart
        )
        found[name] = net, token, best
        if curve[-1] > min(curve):
            found[f"{name}, last update"] = net, token, last
        size = sum(p.size for p in jax.tree.leaves(best))
        print(
            f"{name}: {size} params, least validation loss {min(curve):.4f} at evaluation"
            f" {1 + int(np.argmin(curve))} of {len(curve)}, {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        results[name] = {"params": size, "validation": curve}

    first, column = every_window("test", every)
    window = series.windows(x, first, column, LENGTH)
    truth = window[:, CONTEXT:]
    forecasts = {
        name: forecast(*model, x, first, column, args.draws, args.seed)
        for name, model in found.items()
    }
    naive = series.seasonal(window, CONTEXT)
    forecasts["seasonal naive"] = naive[:, None]
    forecasts["seasonal naive with its errors"] = naive[:, None] + past_errors(
        x, column, args.draws, args.seed
    )
    scores = {name: metrics.crps(truth, draws) for name, draws in forecasts.items()}
    print(f"{'':32s}  CRPS, 96 h     24 h  coverage, 96 h  24 h  CRPS above the first")
    for name, draws in forecasts.items():
        by_time = lambda a: a.reshape(7, -1, a.shape[-1]).mean((0, 2))  # noqa: E731
        more, error = series.blocked(by_time(scores[name] - scores[next(iter(found))]), 4)
        low, high = np.quantile(draws, (0.1, 0.9), axis=1)
        inside = (truth >= low) & (truth <= high)
        results.setdefault(name, {}).update(
            crps=float(scores[name].mean()),
            crps_24=float(scores[name][:, :PATCH].mean()),
            coverage=float(inside.mean()),
            coverage_24=float(inside[:, :PATCH].mean()),
            crps_above_first=[more, error],
            crps_by_column=scores[name].reshape(7, -1).mean(1).tolist(),
        )
        print(
            f"{name:32s}{scores[name].mean():12.4f} {scores[name][:, :PATCH].mean():8.4f}"
            f"{inside.mean():16.3f} {inside[:, :PATCH].mean():5.3f}  {more:.4f} +- {error:.4f}"
        )

    some = np.linspace(0, len(first) - 1, exact).astype(int)
    few = batch_of(x, first[some], column[some])
    _, scale = series.mean_and_scale(window[some], CONTEXT)
    nats = {}
    for name, (net, token, params) in found.items():
        exact_token = token if token is gaussian else flows.cnf(head, base)
        log_p = distributions.token_log_probs(net, exact_token)(params, few["x"], few["cond"])
        nats[name] = np.asarray(log_p)[:, CONTEXT // PATCH :] - PATCH * np.log(scale)
        results[name]["nats_of_a_patch"] = float(nats[name].mean())
        print(f"{name}: {nats[name].mean():.2f} nats a patch of 24 hours, on {exact} windows")
        more = (nats[next(iter(found))] - nats[name]).mean(1)
        more = float(more.mean()), float(more.std(ddof=1) / exact**0.5)
        results[name]["nats_below_the_first"] = more
        print(f"    the first is above by {more[0]:.2f} +- {more[1]:.2f}")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    picture(out / "forecasts.png", window, forecasts, len(first) // 7)
    print(f"pictures and numbers: {out}")


def every_window(part: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    """First hour and column of each window, column by column."""
    first = series.starts(part, step, CONTEXT, HORIZON)
    return np.tile(first, 7), np.repeat(np.arange(7), len(first))


def batch_of(x, first, column):
    """Windows as patches in units of their contexts; the patches of the context are not learned."""
    window = series.windows(x, first, column, LENGTH)
    mean, scale = series.mean_and_scale(window, CONTEXT)
    patches = ((window - mean) / scale).reshape(len(window), -1, PATCH)
    learned = np.arange(LENGTH // PATCH) >= CONTEXT // PATCH
    weight = jnp.broadcast_to(learned.astype(np.float32)[None], patches.shape[:2])
    return {"x": patches, "cond": Condition(label=column), "weight": weight}


def trained(net, token, loss, x, validation, steps, batch, seed, apart):
    """The averaged params where the loss on the validation windows is least, the last ones, and
    these losses."""
    begin_key, key = jax.random.split(jax.random.key(seed))
    law = distributions.causal(net, token)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.01),
    )
    begin = law.init(
        begin_key,
        validation["x"][:batch],
        validation["cond"]._replace(label=validation["cond"].label[:batch]),
    )
    state = train.init_state(begin, optimizer, key, ema=0.99)
    step = train.make_step(loss, optimizer, ema=0.99)
    x, last = jnp.asarray(x), series.starts("train", 1, CONTEXT, HORIZON)[-1]

    def update(state, key):
        hour, column = jax.random.split(key)
        hour = jax.random.randint(hour, (batch,), 0, last + 1)
        column = jax.random.randint(column, (batch,), 0, 7)
        return step(state, batch_of(x, hour, column))[0], None

    advance = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys)[0], donate_argnums=0)
    judge = jax.jit(lambda params: loss(params, jax.random.key(0), validation)[0])
    best, curve = None, []
    for keys in jax.random.split(jax.random.key(seed + 1000), steps).reshape(-1, apart):
        state = advance(state, keys)
        curve.append(float(judge(state.ema)))
        if curve[-1] == min(curve):
            best = jax.device_get(state.ema)
    return best, jax.device_get(state.ema), curve


def forecast(net, token, params, x, first, column, draws, seed, rows=63):
    """[windows, draws, HORIZON], in the units of x."""
    run = jax.jit(distributions.continuation(net, token, (LENGTH // PATCH, PATCH)))
    found = []
    count = -(-len(first) // rows)
    keys = jax.random.split(jax.random.key(seed + 2000), count)
    for key, some in zip(keys, np.array_split(np.arange(len(first)), count), strict=True):
        at = np.resize(some, rows)  # one shape for all
        window = series.windows(x, first[at], column[at], LENGTH)
        mean, scale = series.mean_and_scale(window, CONTEXT)
        past = ((window - mean) / scale)[:, :CONTEXT].reshape(rows, -1, PATCH)
        label = np.repeat(column[at], draws)
        future = run(params, key, np.repeat(past, draws, axis=0), Condition(label=label))
        future = np.asarray(future)[:, CONTEXT // PATCH :].reshape(rows, draws, HORIZON)
        found.append((mean[:, None] + scale[:, None] * future)[: len(some)])
    return np.concatenate(found)


def past_errors(x, column, draws, seed):
    """[windows, draws, HORIZON]: errors of the seasonal forecast in the training year, drawn."""
    draw = np.random.default_rng(seed)
    first = draw.choice(series.starts("train", 1, CONTEXT, HORIZON), (len(column), draws))
    each = np.repeat(column, draws)
    window = series.windows(x, first.reshape(-1), each, LENGTH)
    error = window[:, CONTEXT:] - series.seasonal(window, CONTEXT)
    return error.reshape(len(column), draws, HORIZON)


def picture(path, window, forecasts, each):
    """Fans of the first two models: the median and the central 50% and 80%, for three columns."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 4.5), sharex=True, sharey="col")
    shown = list(forecasts)[:2]
    hours = np.arange(-CONTEXT, HORIZON)
    for row, name in zip(axes, shown, strict=True):
        for axis, column in zip(row, (0, 2, 6), strict=True):
            at = column * each + each // 3
            fan = np.quantile(forecasts[name][at], (0.1, 0.25, 0.5, 0.75, 0.9), axis=0)
            axis.fill_between(hours[CONTEXT:], fan[0], fan[4], color="tab:blue", alpha=0.2, lw=0)
            axis.fill_between(hours[CONTEXT:], fan[1], fan[3], color="tab:blue", alpha=0.35, lw=0)
            axis.plot(hours[CONTEXT:], fan[2], color="tab:blue", lw=1)
            axis.plot(hours, window[at], color="black", lw=0.8)
            axis.set_title(f"{name}, {NAMES[column]}", fontsize=8)
            axis.tick_params(labelsize=6)
    figure.supxlabel("hours after the forecast is made", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
