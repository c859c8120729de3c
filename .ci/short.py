"""Every experiment and benchmark in its short form, two at a time: `python .ci/short.py [WORD
...]`, those with all the words.

They run in forks of one process, so that JAX and jflow are imported once, and are compiled as tests
are. What a job prints is shown if it fails.
"""

# ruff: noqa: E402
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # threads would be lost in a fork
os.environ["MPLBACKEND"] = "agg"  # figures are drawn and not shown
sys.path.insert(0, "tests")

import jax
from compiling import leave_the_optimizer_out

from jflow.apps import cli

TRAIN = ["bsds300_patches", "mnist_bits_per_dim", "mnist_tarflow"]
BENCHMARKS = [
    "autoregressive_sampling",
    "backbones",
    "capacity",
    "causal_sampling",
    "compile_time",
    "density",
    "depth",
    "flow_matching_step",
    "gflownets",
    "jump_sampling",
]
TUTORIALS = [
    "density",
    "few_steps",
    "flow_matching",
    "guidance",
    "posterior",
    "published_weights",
    "reflow",
]
BENCHMARKS += ["masked_conv", "ode_sampling", "pipelines", "samplers", "weak_scaling", "weights"]
# A job is a list of commands, one after another; {} is a folder of its own.
JOBS = [
    [
        "jflow train experiments/digits_rectified_flow short=True --workdir {}/run --quiet",
        "jflow evaluate {}/run",
        "jflow sample {}/run --num 20 --out {}/samples.png",
    ],
    [
        "jflow train experiments/tabular_spline_flow short=True --workdir {}/run --quiet",
        "jflow evaluate {}/run",
    ],
    *([f"jflow train experiments/{name} short=True --workdir {{}}/run --quiet"] for name in TRAIN),
    [
        "jflow train experiments/images_flow_matching short=True --workdir {}/run --quiet",
        "experiments/images_flow_matching/measure.py {}/run --short",
    ],
    ["jflow train experiments/images_flow_matching short=True net=flux --workdir {}/run --quiet"],
    [
        "jflow train experiments/latent_flow short=True part=autoencoder --workdir {}/a --quiet",
        "jflow train experiments/latent_flow short=True autoencoder={}/a --workdir {}/run --quiet",
        "experiments/latent_flow/measure.py {}/run --judge {}/judge --out {}/samples.png --short",
    ],
    [
        (
            "experiments/rnade_uci/run.py --sets wine --columns distinct --models spline --folds 3"
            " --steps 50 --quiet"
        ),
    ],
    [
        "experiments/flow_posteriors/run.py targets --short",
        "experiments/flow_posteriors/run.py vae --short",
    ],
    [
        "experiments/log_densities/run.py log_z --out {} --short",
        "experiments/log_densities/run.py posteriordb --out {} --short",
    ],
    [
        f"experiments/stochastic_flows/run.py {table} --short"
        for table in ("double_well", "diffusions", "evidence", "particles", "lattice")
    ],
    ["experiments/fast_autoregressive_inverse/measure.py --short"],
    [
        "experiments/gaussians_to_moons/run.py --short",
        "experiments/gaussians_to_moons/run.py --short --conditional",
    ],
    ["experiments/reflow_two_dims/run.py --out {} --short"],
    ["experiments/multimodal_velocity/run.py --out {} --short"],
    [
        "experiments/bayesian_flow/run.py --out {} --short",
        "experiments/bayesian_flow/smiles.py --out {} --short",
    ],
    ["experiments/simplex_promoters/run.py --out {} --short"],
    ["experiments/guided_planning/run.py --short"],
    ["experiments/heavy_tails/run.py --short"],
    ["experiments/limited_samples/run.py --short"],
    ["experiments/synthetic_tables/run.py --short"],
    ["experiments/tabular_cnf/run.py --short"],
    ["experiments/few_steps_two_dims/run.py --out {} --short"],
    ["experiments/few_steps_digits/run.py --out {} --short"],
    ["experiments/few_step_solvers/run.py --out {} --short"],
    ["experiments/backbone_options/run.py --out {} --short"],
    ["experiments/restoration_knob/run.py --out {} --short"],
    ["experiments/super_resolution/run.py --out {} --short"],
    [
        "experiments/inverse_problems/run.py mixture --out {} --short",
        "experiments/inverse_problems/run.py digits --out {} --short",
    ],
    [
        "experiments/editing_digits/run.py --out {} --short",
        "experiments/editing_digits/inside.py --out {} --short",
    ],
    ["experiments/coherent_motion/run.py --out {} --short"],
    ["experiments/rendered_numbers/run.py --out {} --short"],
    ["experiments/search_at_inference/run.py --out {} --short"],
    ["experiments/guided_tables/run.py mixture cancer --out {} --short"],
    ["experiments/higher_resolution/run.py --out {} --short"],
    ["experiments/reward_digits/run.py --out {} --short"],
    ["experiments/gflownets/run.py --out {} --short"],
    ["experiments/continuous_gflownets/run.py --out {} --short"],
    ["experiments/reinflow_planning/run.py --out {} --short"],
    ["experiments/flow_control/run.py --out {} --short"],
    [
        f"experiments/densities/{name}.py --out {{}} --short"
        for name in ("cells", "injective", "rotations", "small_data", "trajectories")
    ],
    ["experiments/transition_matching/run.py --out {} --short"],
    ["experiments/sbi_pack/run.py fit --short"],
    ["jflow train experiments/captioned_digits/jetformer.py short=True --workdir {}/run --quiet"],
    ["jflow train experiments/captioned_digits/joint.py short=True --workdir {}/run --quiet"],
    [
        "jflow train experiments/shakespeare_characters short=True --workdir {}/run --quiet",
        "experiments/shakespeare_characters/write.py {}/run --characters 20",
    ],
    [
        "jflow train experiments/torsions short=True --workdir {}/run --quiet",
        "experiments/torsions/picture.py {}/run --out {}/picture.png --rows 50 --grid 8 --method 4",
    ],
    ["experiments/meshes/run.py --out {} --short"],
    [
        "jflow train experiments/shakespeare_characters/discrete.py short=True --workdir {}/run"
        " --quiet",
        "experiments/shakespeare_characters/write.py {}/run --characters 16",
    ],
    ["experiments/molecules/run.py --out {} --short"],
    ["jflow train experiments/molecules short=True --workdir {}/run --quiet"],
    [
        "jflow train experiments/molecules/dna.py short=True --workdir {}/run --quiet",
        "jflow evaluate {}/run",
        "jflow sample {}/run --num 5 --steps 4 --out {}/dna.csv",
    ],
    ["experiments/promoters/run.py --short"],
    ["experiments/lora_style/run.py --out {} --short"],
    [
        "tests/pipelines.py {}/sd3 sd3",
        "jflow train experiments/lora_pipeline short=True folder={}/sd3 --workdir {}/run --quiet",
        "experiments/lora_pipeline/export.py {}/run --out {}/lora.safetensors",
        "jflow sample {}/run --num 4 --out {}/pictures.png",
    ],
    ["experiments/forecasting/run.py --out {} --short"],
    ["experiments/earth/table.py --out {} --short"],
    ["experiments/spoken_digits/run.py --out {} --short"],
    *([f"experiments/tutorials/{name}.py --short"] for name in TUTORIALS),
    *([f"benchmarks/{name}.py --short"] for name in BENCHMARKS),
    ["python benchmarks/device.py --short"],  # which starts processes of its own
]


def run(command: str) -> None:
    program, *arguments = command.split()
    print(f"$ {command}", flush=True)
    if program == "jflow":
        if status := cli.main(arguments):
            raise SystemExit(status)
        return
    if program == "python":
        subprocess.run([sys.executable, *arguments], check=True)
        return
    sys.argv = [program, *arguments]
    sys.path[0] = os.path.dirname(program)
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def start(job: list[str], log) -> int:
    """The pid of a fork that runs the commands of a job, its output in `log`."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        with tempfile.TemporaryDirectory() as folder:
            for command in job:
                run(command.replace("{}", folder))
        status = 0
    except BaseException:  # nothing may get past the fork
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(status)


def main() -> int:
    jobs = [job for job in JOBS if all(word in " ".join(job) for word in sys.argv[1:])]
    leave_the_optimizer_out()
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JFLOW_TEST_CACHE"))
    waiting, running, failed = list(jobs), {}, []
    begun = time.monotonic()
    while waiting or running:
        while waiting and len(running) < 2:
            job, log = waiting.pop(0), tempfile.TemporaryFile("w+")
            running[start(job, log)] = job, log, time.monotonic()
        pid, status = os.wait()
        job, log, since = running.pop(pid)
        what = ("failed: " if status else "") + job[0].split(" short")[0]
        print(f"{time.monotonic() - since:7.1f} s  {what}", flush=True)
        if status:
            failed.append(job[0])
            log.seek(0)
            print(log.read(), flush=True)
    print(
        f"{time.monotonic() - begun:7.1f} s  in all, {len(failed)} of {len(jobs)} failed",
        flush=True,
    )
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
