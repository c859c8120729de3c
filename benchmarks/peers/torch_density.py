"""The torch side of density.py: answers requests on stdin, a JSON line each, with the seconds that
one call took.

    TORCH_PYTHON benchmarks/peers/torch_density.py --threads 2

A request: {"library": "zuko", "nflows" or "normflows", "kind": "spline" or "affine", "features",
"batch", "depth", "what": "log_prob", "train" or "sample"}. A model is built when it is first asked
for.
"""

import argparse
import functools
import json
import sys
import time

try:
    import nflows.distributions
    import nflows.flows
    import nflows.nn.nets
    import nflows.transforms as nt
    import normflows
    import torch
    import zuko
except ImportError as error:
    sys.exit(f"{error}: this script needs torch, zuko, nflows and normflows (pip install them)")

HIDDEN = (128, 128)


def zuko_flow(kind, features, depth):
    if kind == "spline":
        return zuko.flows.NSF(
            features, transforms=depth, passes=2, randperm=True, bins=8, hidden_features=HIDDEN
        )
    return zuko.flows.MAF(
        features, transforms=depth, passes=2, randperm=True, hidden_features=HIDDEN
    )


def nflows_flow(kind, features, depth):
    mask = torch.arange(features) >= features // 2

    def net(inputs, outputs):
        # residual like normflows': one block has the two hidden layers
        return nflows.nn.nets.ResidualNet(inputs, outputs, hidden_features=128, num_blocks=1)

    layers = []
    for _ in range(depth):
        layers.append(nt.RandomPermutation(features))
        if kind == "spline":
            make, options = (
                nt.PiecewiseRationalQuadraticCouplingTransform,
                {"num_bins": 8, "tails": "linear"},
            )
            layers.append(make(mask, net, tail_bound=5.0, **options))
        else:
            layers.append(nt.AffineCouplingTransform(mask, net))
    return nflows.flows.Flow(
        nt.CompositeTransform(layers), nflows.distributions.StandardNormal([features])
    )


def normflows_flow(kind, features, depth):
    layers = []
    for _ in range(depth):
        if kind == "spline":
            options = {"num_blocks": 1, "num_hidden_channels": 128, "num_bins": 8, "tail_bound": 5}
            layers.append(normflows.flows.CoupledRationalQuadraticSpline(features, **options))
        else:
            net = normflows.nets.MLP(
                [features - features // 2, *HIDDEN, 2 * (features // 2)], init_zeros=True
            )
            layers.append(normflows.flows.AffineCouplingBlock(net))
        layers.append(normflows.flows.Permute(features))
    return normflows.NormalizingFlow(
        normflows.distributions.DiagGaussian(features, trainable=False), layers
    )


MAKE = {"zuko": zuko_flow, "nflows": nflows_flow, "normflows": normflows_flow}


@functools.cache
def calls(library, kind, features, batch, depth):
    torch.manual_seed(0)
    model, x = MAKE[library](kind, features, depth), torch.randn(batch, features)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def density(x):
        return model().log_prob(x) if library == "zuko" else model.log_prob(x)

    def log_prob():
        with torch.no_grad():
            return density(x)

    def sample():
        with torch.no_grad():
            if library == "zuko":
                return model().sample((batch,))
            return model.sample(batch)

    def train():
        optimizer.zero_grad()
        loss = -density(x).mean()
        loss.backward()
        optimizer.step()

    return {"log_prob": log_prob, "train": train, "sample": sample}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    for line in sys.stdin:
        request = json.loads(line)
        call = calls(**{key: value for key, value in request.items() if key != "what"})[
            request["what"]
        ]
        start = time.perf_counter()
        call()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
