"""The command line: jflow train | sample | evaluate | fit | score | launch."""

import argparse
import contextlib
import errno
import json
import math
import os
import shlex
import shutil
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jflow
from jflow._core.environment import COORDINATOR
from jflow._core.files import expand, system_error
from jflow.apps import _keys

# JAX and all that needs it are imported inside the commands, so that --help and mistakes in
# arguments answer at once.

_TABLE_CONFIG = Path(__file__).parent / "configs/table.py"
_FOUND = (
    "table",
    "fingerprint",
    "codes",
    "numbers",
    "low",
    "high",
    "order",
    "eval_every",
)  # not asked for
PATH_ERRORS = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    FileExistsError,
)
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 1: the run failed (a loss that is not finite, a full disk); 2: a
    mistake in what was asked; 130 and 143: interrupted and terminated, after saving."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with _plain_warnings():
            args = _parse(argv)
            args.command(args)
        return 0
    except KeyboardInterrupt:
        _say_stopped("interrupted", argv)
        return 130
    except SystemExit as end:
        if end.code in (130, 143):  # 130: of processes that were launched
            _say_stopped("interrupted" if end.code == 130 else "terminated", argv)
        raise
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"jflow: error: {_one_line(error)}", file=sys.stderr)
        return _leave(_status(error))


def _leave(status: int) -> int:
    """One of several processes must not wait for the others at its exit: they wait for it."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        from jflow._core import processes

        processes.leave(status)
    return status


def _say_stopped(how: str, argv: Sequence[str]) -> None:
    """That a signal ended the command, and how a run goes on; of several processes the launcher or
    the main one says it."""
    distributed = getattr(sys.modules.get("jax"), "distributed", None)
    if (
        COORDINATOR in os.environ
        or distributed
        and distributed.is_initialized()
        and sys.modules["jax"].process_index()
    ):
        return
    resumes = argv[:1] in (["train"], ["fit"], ["launch"])
    again = f"; to go on, give the same command: {shlex.join(['jflow', *argv])}" if resumes else ""
    print(f"jflow: {how}{again}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    if _full_disk(error):
        error = system_error(error) or error
    text = str(error)
    if isinstance(error, OSError) and error.errno:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or ""
    if isinstance(error, ValueError) and "\n  column " in text:
        return text  # the findings of a table, a line each
    text = " ".join(text.split())[:1000]
    if (
        isinstance(error, ValueError | TypeError | OSError | ImportError | FloatingPointError)
        and text
    ):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _full_disk(error: Exception) -> bool:
    """Whether an error that no function has put into words, such as a group, is of a disk."""
    worded = isinstance(error, ValueError | TypeError | OSError | ImportError)
    cause = None if worded else system_error(error)
    return cause is not None and cause.errno in DISK_ERRORS


def _status(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno:
        return 1 if error.errno in DISK_ERRORS else 2
    return 2 if isinstance(error, (ValueError, TypeError, ImportError, *PATH_ERRORS)) else 1


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    shown = set()

    def show(message, category, filename, lineno, file=None, line=None):
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            print(f"jflow: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def train(args) -> None:
    from jflow import apps
    from jflow import train as trainer
    from jflow._core import processes

    if args.distributed or COORDINATOR in os.environ:
        trainer.initialize()
    experiment, values = apps.load_config(args.config, _pairs(args.overrides))
    mesh = None if args.mesh is None else trainer.make_mesh(_mesh(args.mesh))
    source = args.config / "config.py" if args.config.is_dir() else args.config
    with _leaving_nothing(args.workdir):
        fit = apps.run(
            experiment,
            args.workdir,
            config_source=source,
            resolved=values,
            progress=not args.quiet,
            mesh=mesh,
        )
    if processes.is_main():
        _say(args, _summary(fit, args.workdir))


def launch(args) -> None:
    from jflow.apps._launch import launch

    job = args.job[1:] if args.job[:1] == ["--"] else args.job
    status = launch(job, args.processes, devices=args.devices, grace=args.grace)
    if status:
        raise SystemExit(status)


def sample(args) -> None:
    _check_source(args)
    if args.pretrained is not None:
        return _sample_pretrained(args)
    import jax

    from jflow.apps import tables
    from jflow.apps.sampling import sample_writer, samples

    with sample_writer(args.out, args.num) as write:  # an unwritable path is found out here
        loaded = jflow.load(args.workdir, step=args.step, ema=args.ema)
        options = {
            k: v for k in ("label", "steps", "guidance") if (v := getattr(args, k)) is not None
        }
        started = time.perf_counter()
        if tables.is_table(loaded.preprocess.state) and not options:
            from jflow.apps import tabular

            model = tabular.from_loaded(loaded, args.workdir)
            given = _given(model, args.given)
            chunks = model.sample_chunks(args.num, given, args.seed, encoded=True)
            drawn: Iterator = ({"x": rows} for rows in chunks)
        elif args.given:
            raise ValueError("--given is for models of tables, that `jflow fit` trained")
        else:
            drawn = samples(
                loaded, jax.random.key(args.seed), args.num, batch=args.batch or 256, **options
            )
        for rows in drawn:
            write(loaded, rows)
        seconds = time.perf_counter() - started
    _say(
        args,
        f"wrote {args.out}: {args.num} rows from step {loaded.step} in {seconds:.1f} s, compilation"
        " included",
    )


def _check_source(args) -> None:
    """Samples are of a run, or of a published model, and each has options of its own."""
    if (args.workdir is None) == (args.pretrained is None):
        raise ValueError(
            "expected DIR, where a model was trained, or --pretrained FOLDER, of a published one, "
            f"got {'both' if args.pretrained is not None else 'neither'}"
        )
    of_runs = ("num", "step", "label", "batch", "given")
    of_published = (
        *("prompt", "lora", "negative_prompt", "shift", "height", "width", "cut", "dtype", "mesh"),
    )
    run = args.pretrained is None
    other = of_published if run else [name for name in of_runs if name != "num"]
    for name in other:
        if (value := getattr(args, name)) is not None and value is not False and value != []:
            option, kind = f"--{name.replace('_', '-')}", "--pretrained" if run else "DIR"
            raise ValueError(f"{option} goes with {kind} alone")
    if run and args.num is None:
        raise ValueError("the following arguments are required: --num")
    if not run and not args.prompt:
        raise ValueError("the following arguments are required with --pretrained: --prompt")


def _sample_pretrained(args) -> None:
    """One file for each picture: they are numbered where there are several."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from jflow import train as trainer
    from jflow._core.files import replace_file
    from jflow.apps._pretrained import pictures

    if args.out.suffix != ".png":
        raise ValueError(f"--out: expected a file name that ends in .png, got {args.out}")
    num = args.num or 1
    total = len(args.prompt) * num
    names = [args.out.name]
    if total > 1:
        digits = len(str(total))
        names = [f"{args.out.stem}_{i + 1:0{digits}}.png" for i in range(total)]
    sharding = None
    if args.mesh is not None:
        mesh = trainer.make_mesh(_mesh(args.mesh))
        rules = [(".*", trainer.fsdp(mesh.axis_names[0]))]
        sharding = partial(trainer.shardings, mesh=mesh, rules=rules)
    options = {
        "negative": args.negative_prompt,
        "scale": args.guidance,
        "steps": args.steps,
        "shift": args.shift,
        "height": args.height,
        "width": args.width,
        "dtype": args.dtype,
    }
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:  # an unwritable path is found out here
        parts = [stack.enter_context(replace_file(args.out.parent / name)) for name in names]
        drawn = pictures(
            args.pretrained,
            args.prompt,
            num=num,
            seed=args.seed,
            cut=args.cut,
            sharding=sharding,
            loras=args.lora,
            progress=not args.quiet,
            **options,
        )
        said = {name: value for name, value in options.items() if value is not None}
        said |= {"lora": [str(file) for file in args.lora]} if args.lora else {}
        for i, (part, picture) in enumerate(zip(parts, drawn, strict=True)):
            info = PngInfo()
            info.add_itxt("prompt", args.prompt[i // num])
            info.add_itxt("options", json.dumps({"seed": args.seed + i % num, **said}))
            Image.fromarray(picture).save(part, format="PNG", pnginfo=info)
    for i, name in enumerate(names):
        prompt = args.prompt[i // num]
        _say(args, f"wrote {args.out.parent / name}: seed {args.seed + i % num}, {prompt!r}")
    _say(args, f"{time.perf_counter() - started:.1f} s, compilation included")


def _given(model, texts: Sequence[str]) -> dict[str, Any]:
    """What --given says: COLUMN=VALUE, several of them for one column, or COLUMN=LOW..HIGH."""
    given: dict[str, Any] = {}
    names = {column.name for column in model.schema_}
    categories = {column.name: column.categories for column in model.schema_}
    for text in texts:
        cuts = [i for i, letter in enumerate(text) if letter == "="]
        if not cuts:
            raise ValueError(f"--given: expected COLUMN=VALUE or COLUMN=LOW..HIGH, got {text!r}")
        cut = next((i for i in cuts if text[:i] in names), cuts[0])  # names may hold an =
        name, value = text[:cut], text[cut + 1 :]
        low, dots, high = value.partition("..")
        if dots and value not in categories.get(name, (value,)):
            if name in given:
                raise ValueError(f"--given: {name!r} is given more than once, and as a range")
            given[name] = (low or None, high or None)
        else:
            given.setdefault(name, []).append(value)
    return {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in given.items()}


def score(args) -> None:
    import numpy as np

    from jflow import data
    from jflow.apps import tabular
    from jflow.data.writers import csv_writer

    model = tabular.load(args.workdir, step=args.step, ema=args.ema)
    given = [name for name in args.given.split(",") if name]
    table = data.read_table(args.table, header=model.header, missing=tuple(model.missing))
    nats, lines = model.log_prob(table, given=given), table.lines
    if args.out is not None:
        with csv_writer(args.out) as write:
            write([["line", "log_density"]])
            write([[str(i), f"{v:.6g}"] for i, v in zip(lines, nats, strict=True)])
    fine = nats[np.isfinite(nats)]
    error = f" +- {fine.std(ddof=1) / math.sqrt(len(fine)):.3f}" if len(fine) > 1 else ""
    mean = f"mean log-density {fine.mean():.3f}{error} nats; larger is better" if len(fine) else ""
    never = len(nats) - len(fine)
    print(f"{args.table}: {len(nats)} rows, {mean or 'none of them as in the table of the fit'}")
    if never:
        rows = "1 row holds" if never == 1 else f"{never} rows hold"
        print(
            f"{rows} what the table of the fit never had: a log-density of -inf, which the mean"
            " leaves out"
        )
        print("\n".join(_unseen(model, table)))
    if args.out is not None:
        _say(args, f"wrote {args.out}")


def _unseen(model, table) -> Iterator[str]:
    """A line for each column that holds what the table of the fit never had."""
    from jflow import data

    for k, (column, bad) in enumerate(zip(model.schema_, model.unseen_cells(table).T, strict=True)):
        if bad.any():
            cells = table.cells[table.names.index(column.name) if table.header else k]
            i = int(bad.argmax())
            many = "1 cell," if bad.sum() == 1 else f"{bad.sum()} cells, the first"
            text = f"  column {column.name!r}: {many} on line {table.lines[i]}: {str(cells[i])!r}"
            if column.kind != "categorical":
                text += f"; it writes its values as in {data.value_text(column, column.low)!r}"
            yield text


def evaluate(args) -> None:
    import jax

    from jflow._core.files import replace_file

    loaded = jflow.load(args.workdir, step=args.step, ema=args.ema)
    experiment = loaded.experiment
    if experiment.evaluate is None:
        raise ValueError(
            f"{args.workdir}: the experiment cannot be evaluated: its config sets no `evaluate`"
        )
    with replace_file(args.workdir / "evaluation.json") as part:
        found = experiment.evaluate(
            loaded.params, loaded.preprocess.state, jax.random.key(args.seed), experiment.data()
        )
        found = {name: float(value) for name, value in found.items()}
        part.write_text(json.dumps({"step": loaded.step, **found}, indent=2) + "\n")
    width = max(map(len, found), default=0)
    for name, value in found.items():
        print(f"{name:{width}} {value:<12.6g} {_direction(name, experiment.monitor)}".rstrip())
    _say(args, f"wrote {args.workdir / 'evaluation.json'}")


def _direction(name: str, monitor: str | None) -> str:
    """Which way a number is better, as far as its name says it; what a run monitors is smaller."""
    larger = ("log_prob", "log_likelihood", "accuracy", "elbo", "r2", "auc")
    smaller = ("nll", "bpd", "loss", "error", "distance", "rmse", "mse", "cost", "fid")
    if name.endswith(larger):
        return "larger is better"
    return "smaller is better" if name == monitor or name.endswith(smaller) else ""


def fit(args) -> None:
    from jflow import apps
    from jflow.apps import tabular

    overrides = _pairs(args.overrides)
    _, values = apps.read_keys(_TABLE_CONFIG, overrides)
    renamed = {"seed": "random_state"}
    options = {renamed.get(name, name): values[name] for name in overrides}
    hidden = [name for name in options if name in _FOUND]
    if hidden:
        raise ValueError(f"key {hidden[0]!r} is found from the table and cannot be given")
    with _leaving_nothing(args.out):
        model = tabular.TabularFlow(**options, workdir=args.out, progress=not args.quiet)
        model.fit(args.table)
    prepared = model.prepared_
    left_out = f", {prepared.dropped} left out for a missing value" if prepared.dropped else ""
    _say(
        args,
        f"{args.table}: {prepared.table.rows} rows{left_out}, {len(prepared.schema)} columns",
    )
    found = model.report(args.out)
    seen, test = found["test_rows_in_train"], found["parts"]["test"]
    likelihoods = found["likelihoods"]["of"]
    _say(args, f"test log-likelihood, nats per row: {_scores(likelihoods['test rows'])}")
    if seen:
        unseen = likelihoods["test rows that are not in train"]
        without = f"; of the others: {_scores(unseen)}" if unseen else ""
        _say(args, f"{seen} of {test} test rows also stand in train{without}")
    _say(args, f"wrote report.html, report.json and synthetic.csv to {args.out}")


def _scores(scores: dict) -> str:
    if scores["flow"] is None:
        return "no row has a density"
    text = f"flow {scores['flow']:.3f}"
    if "gaussian" in scores:
        error = scores["standard_error"]
        text += f", Gaussian {scores['gaussian']:.3f}, difference {scores['difference']:.3f}"
        text += "" if error is None else f" +- {error:.3f}"
    without = scores["rows_without_density"]
    return text + (f" ({without} rows with a value never seen are left out)" if without else "")


def _mesh(text: str) -> dict[str, int]:
    axes = _pairs(text.split(","))
    try:
        return {name: int(size) for name, size in axes.items()}
    except ValueError:
        raise ValueError(f"--mesh: expected axes such as data=2,model=4, got {text!r}") from None


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, got {text!r}")
        if key in pairs:
            raise ValueError(f"key {key!r} is given twice")
        pairs[key] = value
    return pairs


def _say(args, text: str) -> None:
    if not args.quiet:
        print(text)


def _summary(fit, workdir: Path) -> str:
    last = {
        k: v
        for k, v in (fit.history[-1] if fit.history else {}).items()
        if k not in ("step", "time")
    }
    parts = [
        f"{workdir}: step {int(fit.state.step)}",
        *(f"{name} {value:.4g}" for name, value in last.items()),
    ]
    if fit.best is not None:
        parts.append(f"best {fit.best.value:.4g} at step {fit.best.step}")
    return ", ".join(parts)


@contextlib.contextmanager
def _leaving_nothing(workdir: Path) -> Iterator[None]:
    """A run that fails before its first checkpoint takes away what it put into `workdir`, which is
    its own meanwhile."""
    from jflow._core import processes
    from jflow._core.lock import hold

    with hold(workdir):
        before = set(workdir.iterdir())
        try:
            yield
        except Exception:
            if processes.is_main() and not any(workdir.glob("checkpoints/*/manifest.json")):
                for path in set(workdir.iterdir()) - before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


class _Help(argparse.Action):
    """--help, with the keys of the config if there is one."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.print_help()
        if config := getattr(namespace, "config", None):
            print(f"\n{_listed(config / 'config.py' if config.is_dir() else config)}")
        parser.exit()


def _listed(config: Path, besides: Sequence[str] = ()) -> str:
    """The keys of a config file but for some, a paragraph each."""
    lines = ["keys:"]
    for key in _keys.listed(config):
        if key.name not in besides:
            kind = f": {key.kind}" if key.kind else ""
            lines += textwrap.wrap(f"{key.name}{kind} = {key.default}", 110, initial_indent="  ")
            lines += textwrap.wrap(
                key.about, 110, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)


def _whole(least: int, most: float = math.inf):
    """Reads a whole number within bounds."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= (value := _keys.whole(text)) <= most:
                return value
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {text!r}")

    return read


def _finite(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")


def _path(text: str) -> Path:
    try:
        return expand(text)
    except ValueError as error:  # argparse would leave its text out
        raise argparse.ArgumentTypeError(str(error)) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments in any order: argparse alone refuses key=value behind an option."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    strange = [text for text in rest if text.startswith("-") or not hasattr(args, "overrides")]
    if strange:
        parser.error(f"unknown argument {strange[0]!r}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jflow", description="Train, sample and judge flow-based generative models."
    )
    parser.add_argument("--version", action="version", version=f"jflow {jflow.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(function, about, description, example):
        command = commands.add_parser(
            function.__name__,
            help=about,
            description=description,
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        command.add_argument("-h", "--help", action=_Help, help="show this and leave")
        command.set_defaults(command=function)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_argument("--quiet", action="store_true", help="print errors alone")
        return command

    def add_checkpoint(command, **options):
        command.add_argument(
            "workdir", type=_path, metavar="DIR", help="where the model was trained", **options
        )
        command.add_argument(
            "--step",
            type=_whole(0),
            help="checkpoint to take (default: the best if monitored, or the newest)",
        )
        command.add_argument(
            "--ema",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="averaged parameters, if there are any",
        )
        command.add_argument(
            "--seed", type=_whole(0, 2**32 - 1), default=0, help="of the random key (default 0)"
        )

    command = add(
        train,
        "train the experiment of a config file",
        "Train the experiment of a config file, or go on with it: a workdir with checkpoints is"
        " resumed from its newest\nwhole one. SIGTERM and Ctrl-C save before leaving.\njflow train"
        " CONFIG --help lists the keys of a config, with their types, defaults and meanings.",
        "  jflow train experiments/digits_rectified_flow --workdir runs/digits\n"
        "  jflow train config.py --workdir runs/wide learning_rate=3e-4 hidden=256,256",
    )
    command.add_argument(
        "config",
        type=_path,
        metavar="CONFIG",
        help="a Python file with a function `config`, or its folder",
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="other values for the keys of the config"
    )
    command.add_argument(
        "--workdir",
        type=_path,
        required=True,
        metavar="DIR",
        help="gets checkpoints, metrics and pictures",
    )

    command.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices to train on, e.g. data=8 or data=-1,model=4 (default: one)",
    )
    command.add_argument(
        "--distributed",
        action="store_true",
        help=(
            "join the other processes of a TPU pod slice, Slurm, Open MPI or Kubernetes job (jflow"
            " launch implies it)"
        ),
    )

    command = add(
        launch,
        "start several processes on this machine",
        "Start a command in several processes that train as one, and watch them: when one dies, the"
        " others are ended, and\na message says which, how, and the checkpoint that the same"
        " command goes on from. Across machines, their own\nlauncher does this (srun, gcloud ..."
        " --worker=all), and the command is jflow train --distributed.",
        "  jflow launch --processes 2 --devices 4 -- jflow train experiments/digits_rectified_flow"
        " --workdir runs/d",
    )
    command.add_argument("--processes", type=_whole(1), required=True, metavar="N", help="how many")
    command.add_argument(
        "--devices",
        type=_whole(1),
        metavar="N",
        help="fake CPU devices for each (default: the real ones)",
    )
    command.add_argument(
        "--grace",
        type=_finite,
        default=5.0,
        metavar="S",
        help="seconds that the others get to end by themselves (5)",
    )
    command.add_argument("job", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")

    command = add(
        sample,
        "draw samples of a trained model",
        "Draw samples, in the units of the data, and write them as a picture, arrays or a table."
        " Rows are drawn --batch\nat a time, so that they need not fit in memory. A file that has"
        " the name --out already is replaced at the end.\n\n"
        "With --pretrained in the place of DIR: draw pictures of Stable Diffusion 3 or FLUX.1 from"
        " a folder as diffusers\nwrites it. One picture is written to --out; several, of several"
        " prompts or of --num for each, to files numbered\nin their order: image_1.png, image_2.png"
        " ... Picture i of a prompt has the seed --seed + i - 1. Text encoders,\nnetwork and"
        " decoder are read one after another, and memory is that of the largest.",
        "  jflow sample runs/digits --num 100 --out grid.png --label 3 --guidance 2\n"
        "  jflow sample runs/digits --num 50000 --out samples.npz --batch 500\n"
        "  jflow sample runs/people --num 1000 --out rows.csv --given sex=F --given age=30..40\n"
        '  jflow sample --pretrained stable-diffusion-3-medium --prompt "a red cat" --out cat.png\n'
        '  jflow sample --pretrained FLUX.1-dev --prompt "a red cat" --prompt "a blue dog"'
        " --out animals.png\n"
        '  jflow sample --pretrained FLUX.1-dev --lora style.safetensors --prompt "a red cat"'
        " --out cat.png",
    )
    add_checkpoint(command, nargs="?")
    command.add_argument(
        "--num", type=_whole(1), metavar="N", help="how many; of a published model for each prompt"
    )
    command.add_argument(
        "--out",
        type=_path,
        required=True,
        metavar="FILE",
        help="a name that ends in .png, .npz or .csv",
    )
    command.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help=(
            "for a table: a value that a column has in all rows; COLUMN=LOW..HIGH for a range (an"
            " end may be left out), and the option again for another column or another value"
        ),
    )
    command.add_argument("--label", type=_whole(0), help="the class, for models that know classes")
    command.add_argument("--steps", type=_whole(1), help="of the solver, for models that integrate")
    command.add_argument(
        "--guidance", type=_finite, help="scale of classifier-free guidance; 1 is without"
    )
    command.add_argument("--batch", type=_whole(1), help="rows drawn at once (default 256)")
    published = command.add_argument_group("of a published model, with --steps and --guidance")
    published.add_argument(
        "--pretrained", type=_path, metavar="FOLDER", help="with model_index.json in it"
    )
    published.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to draw; the option again for another picture",
    )
    published.add_argument(
        "--lora",
        action="append",
        type=_path,
        default=[],
        metavar="FILE",
        help="of peft, diffusers or kohya's scripts; the option again for another beside it",
    )
    published.add_argument(
        "--negative-prompt", metavar="TEXT", help="what to keep away from, where there is guidance"
    )
    published.add_argument(
        "--shift", type=_finite, help="of times towards noise (default: the scheduler's)"
    )
    for side in ("height", "width"):
        published.add_argument(
            f"--{side}", type=_whole(1), help="in pixels (default: as published)"
        )
    published.add_argument(
        "--cut", action="store_true", help="cut prompts that are too long for an encoder"
    )
    published.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights (default: the files')"
    )
    published.add_argument(
        "--mesh", metavar="AXIS=N,...", help="devices to split the weights over, e.g. data=8"
    )

    command = add(
        evaluate,
        "measure a trained model",
        "Print the metrics of a trained model, and write them to DIR/evaluation.json.",
        "  jflow evaluate runs/digits",
    )
    add_checkpoint(command)

    command = add(
        score,
        "score the rows of a table",
        "Print the mean log-density of the rows of a table under the model that `jflow fit` trained"
        " on another, or on\nthe same, and write that of each row.",
        "  jflow score runs/wine other.csv --out scores.csv\n"
        "  jflow score runs/people other.csv --given age,sex",
    )
    add_checkpoint(command)
    command.add_argument("table", type=_path, metavar="TABLE", help="the rows")
    command.add_argument(
        "--given",
        default="",
        metavar="A,B",
        help="columns to condition on: the density of the others, given these",
    )
    command.add_argument("--out", type=_path, metavar="FILE", help="gets each row's log-density")

    command = add(
        fit,
        "fit a density to a table",
        "Fit a model to a table (csv, tsv, semicolons, bars or blanks, plain or .gz; .xlsx,\n"
        ".parquet), and write to DIR\n"
        "  report.html      how near synthetic rows come to real ones, in pictures and numbers,\n"
        "                   beside a Gaussian and a copula: columns, pairs, a classifier, nearest\n"
        "                   rows, and the log-likelihood of rows that were left out of training\n"
        "  report.json      the same numbers, and what each column was taken for\n"
        "  synthetic.csv    as many new rows, in the table's columns, units and formatting\n"
        "Training stops when the validation part gets no better; the same command resumes it.\n"
        "\n" + _listed(_TABLE_CONFIG, _FOUND),
        "  jflow fit wine.csv --out runs/wine\n"
        "  jflow fit people.csv --out runs/people drop=name,id categorical=postcode\n"
        "  jflow sample runs/wine --num 1000 --out rows.csv\n"
        "  jflow score runs/wine other.csv --out scores.csv",
    )
    command.add_argument("table", type=_path, metavar="TABLE", help="the table")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="other values for the keys"
    )
    command.add_argument(
        "--out", type=_path, required=True, metavar="DIR", help="gets the results and the run"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
