"""Text from a trained law of characters, one character after the other with the network's cache.

python experiments/shakespeare_characters/write.py runs/shakespeare --temperature 0.7
"""

import argparse

import jax
import numpy as np
from characters import SYMBOLS

import jflow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir")
    parser.add_argument("--characters", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loaded = jflow.load(args.workdir)
    options = {"temperature": args.temperature, "characters": args.characters}
    rows = loaded.experiment.sample(loaded.params, jax.random.key(args.seed), args.rows, **options)[
        "x"
    ]
    for row in np.asarray(rows):
        print("".join(SYMBOLS[i] for i in row), end="\n\n--\n\n")


if __name__ == "__main__":
    main()
