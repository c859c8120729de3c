"""The LoRA of a run of config.py beside this file as one that diffusers, peft and jflow read.

python experiments/lora_pipeline/export.py runs/lora --out style.safetensors
"""

import argparse
from pathlib import Path

import jflow
from jflow import convert


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="workdir of the training")
    parser.add_argument("--out", type=Path, required=True, help="a name that ends in .safetensors")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest without it")
    args = parser.parse_args()
    loaded = jflow.load(args.run, step=args.step)
    convert.save_lora(args.out, loaded.model, loaded.params)
    print(f"wrote {args.out}: the LoRA of step {loaded.step}")


if __name__ == "__main__":
    main()
