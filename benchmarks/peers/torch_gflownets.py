"""The torchgfn side of gflownets.py: answers requests on stdin, a JSON line each.

    PYTHON benchmarks/peers/torch_gflownets.py

A request is {kind: rows, "times": n}, answered with the CPU seconds of n of them, where a kind is
"rollout", "update" (with a rollout, the loss, its gradients and Adam) or "products" (those of the
network, for as many states), or {"train": updates, "rows": rows, "objective": one of OBJECTIVES},
answered with [seconds, the total variation to the rewards].
torchgfn needs numpy below 2: an environment of its own (pip install torch torchgfn).
"""

import functools
import itertools
import json
import sys
import time

import numpy as np

try:
    import torch
    from gfn.estimators import DiscretePolicyEstimator, ScalarEstimator
    from gfn.gflownet import (
        DBGFlowNet,
        FMGFlowNet,
        LogPartitionVarianceGFlowNet,
        ModifiedDBGFlowNet,
        SubTBGFlowNet,
        TBGFlowNet,
    )
    from gfn.gym import HyperGrid
    from gfn.preprocessors import KHotPreprocessor
    from gfn.samplers import Sampler
    from gfn.utils.modules import MLP
except ImportError as error:
    sys.exit(f"{error}: this script needs torch and torchgfn")

DIMENSION, SIDE, WIDTH, LENGTH = 3, 8, 256, 4  # LENGTH: of a trajectory, on average


OBJECTIVES = {
    "trajectory balance": lambda pf, pb, flow: TBGFlowNet(pf=pf, pb=pb),
    "log-partition variance": lambda pf, pb, flow: LogPartitionVarianceGFlowNet(pf=pf, pb=pb),
    "detailed balance": lambda pf, pb, flow: DBGFlowNet(pf=pf, pb=pb, logF=flow),
    "modified detailed balance": lambda pf, pb, flow: ModifiedDBGFlowNet(pf=pf, pb=pb),
    "sub-trajectory balance": lambda pf, pb, flow: SubTBGFlowNet(pf=pf, pb=pb, logF=flow),
    "flow matching": lambda pf, pb, flow: FMGFlowNet(pf),
}


def model(objective="trajectory balance"):
    torch.manual_seed(0)
    env = HyperGrid(ndim=DIMENSION, height=SIDE, store_all_states=True)
    features = KHotPreprocessor(height=SIDE, ndim=DIMENSION)
    forward = MLP(input_dim=features.output_dim, output_dim=env.n_actions, hidden_dim=WIDTH)
    backward = MLP(input_dim=features.output_dim, output_dim=env.n_actions - 1, trunk=forward.trunk)
    flow = MLP(input_dim=features.output_dim, output_dim=1, trunk=forward.trunk)
    pf = DiscretePolicyEstimator(forward, env.n_actions, preprocessor=features)
    pb = DiscretePolicyEstimator(backward, env.n_actions, preprocessor=features, is_backward=True)
    gfn = OBJECTIVES[objective](pf, pb, ScalarEstimator(flow, preprocessor=features))
    return env, forward, gfn, Sampler(estimator=pf)


def timed(call, times):
    """CPU seconds."""
    start = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - start


def rollout(rows):
    env, _, _, sampler = model()
    return torch.no_grad()(lambda: sampler.sample_trajectories(env, n=rows))


def products(rows):
    """The network's output at `rows` random observations, LENGTH times."""
    _, forward, _, _ = model()
    x = torch.randn(rows, DIMENSION * SIDE)

    def run():
        for _ in range(LENGTH):
            forward(x)

    return torch.no_grad()(run)


def update(rows):
    """At a rate of 0, so that all do the same."""
    env, _, gfn, sampler = model()
    optimizer = torch.optim.Adam(gfn.parameters(), lr=0.0)

    def run():
        made = sampler.sample_trajectories(env, n=rows, save_logprobs=True)
        optimizer.zero_grad()
        gfn.loss_from_trajectories(env, made, recalculate_all_logprobs=True).backward()
        optimizer.step()

    return run


def train(objective, updates, rows):
    env, forward, gfn, sampler = model(objective)
    log_z = [p for name, p in gfn.named_parameters() if name == "logZ"]
    others = [p for name, p in gfn.named_parameters() if name != "logZ"]
    optimizer = torch.optim.Adam(others, lr=2e-3)
    decay = [lambda n: (1 + np.cos(np.pi * n / updates)) / 2]
    if log_z:
        optimizer.add_param_group({"params": log_z, "lr": 0.1})
        decay.append(lambda n: 1.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    start = time.process_time()
    for _ in range(updates):
        made = sampler.sample_trajectories(env, n=rows, save_logprobs=True, epsilon=0.05)
        optimizer.zero_grad()
        gfn.loss(env, gfn.to_training_samples(made), recalculate_all_logprobs=True).backward()
        optimizer.step()
        rates.step()
    return [time.process_time() - start, variation(forward)]


def variation(forward):
    """Of the objects, by the probability of being at each position, in the order of the grid."""
    positions = np.array(list(itertools.product(range(SIDE), repeat=DIMENSION)))
    one_hot = np.eye(SIDE, dtype=np.float32)[positions].reshape(len(positions), -1)
    with torch.no_grad():
        logits = forward(torch.from_numpy(one_hot)).double().numpy()
    open_ = np.concatenate([positions < SIDE - 1, np.ones((len(positions), 1), bool)], axis=1)
    p = np.where(open_, np.exp(logits - logits.max(1, keepdims=True)), 0)
    p /= p.sum(1, keepdims=True)
    here, strides = np.zeros(len(positions)), SIDE ** np.arange(DIMENSION)[::-1]
    here[0] = 1
    for at in range(len(positions)):
        for axis in range(DIMENSION):
            if open_[at, axis]:
                here[at + strides[axis]] += here[at] * p[at, axis]
    u = np.abs(positions / (SIDE - 1) - 0.5)
    reward = 0.1 + 0.5 * (u > 0.25).all(1) + 2.0 * ((u > 0.3) & (u < 0.4)).all(1)
    return float(np.abs(here * p[:, -1] - reward / reward.sum()).sum() / 2)


KINDS = {"rollout": rollout, "products": products, "update": update}


def main() -> None:
    torch.set_num_threads(1)  # threads that wait for one another would count as CPU time
    make = functools.cache(lambda kind, rows: KINDS[kind](rows))
    for line in sys.stdin:
        request = json.loads(line)
        if "train" in request:
            answer = train(request["objective"], request["train"], request["rows"])
        else:
            times = request.pop("times")
            answer = timed(make(*next(iter(request.items()))), times)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
