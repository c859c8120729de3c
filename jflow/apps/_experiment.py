"""An experiment is a Python file with one function `config(*, key=default, ...)`; this trains one
and loads it back."""

import contextlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather

import jflow
from jflow._core import files, processes
from jflow._core.files import expand
from jflow._core.hints import hint
from jflow._core.keys import same_draws
from jflow._core.lock import hold
from jflow.apps import _keys
from jflow.apps._modules import STORED, files_beside, load_module
from jflow.train import (
    Fit,
    Refresh,
    Rule,
    TrainState,
    checkpoint,
    data_mesh,
    data_sharding,
    fit,
    gather_params,
    init_sharded,
    init_state,
    make_step,
    shard,
)
from jflow.types import Loss, NumberOrFunction, Params


class Experiment(NamedTuple):
    """All of a training job: the model, its loss, its data and how long to train.

    Rows are dicts of numpy arrays; 'data units' are those of `data`, 'model units' what
    `preprocess.apply` makes of them.

    Attributes:
        model: A Flow, a Velocity, or whatever the config's own functions take.
        init: (key, batch) -> params; batch holds the first training rows in model units.
        loss: (params, key, batch, frozen) -> (scalar, metrics).
        optimizer: An optax optimizer.
        data: () -> `data.Splits` in data units; valid and test may be None.
        preprocess: A `data.Preprocess`, fitted on the training rows alone.
        steps: Updates in all.
        batch: Rows of an update.
        seed: Of the params, the batches and the draws of the loss.
        ema: The decay of the average of the params, or a function of the step; None keeps no
            average.
        sample: (params, key, n, **options) -> rows in model units.
        evaluate: (params, preprocess_state, key, splits) -> {name: number}.
        picture: (rows in data units) -> image.
        picture_rows: How many samples a picture shows.
        frozen: (params, key, batch) -> what the loss reads and never differentiates.
        refresh: How what is frozen advances, see `train.make_step`.
        log_every: Updates between two lines of metrics.
        save_every: Updates between two checkpoints.
        eval_every: Updates between two evaluations; None evaluates at the end alone.
        monitor: The name of the evaluated number whose lowest value is the best checkpoint.
        patience: Evaluations without a better one until training stops; None never stops early.
        skip_nonfinite: Whether an update whose loss or gradient is not finite is left out.
        max_to_keep: How many checkpoints are kept, beside the best.
        unsaved: Names of what is frozen that checkpoints leave out, and `frozen` makes anew, such
            as 'base': a workdir then holds an adapter alone, and `load` returns its params. What
            `sample` and `evaluate` need of the base the config reads itself.
        rules: How a mesh splits the state, see `train.shardings`.
        accumulate: In how many parts an update's rows are differentiated.
        inner: Updates on the device between two visits of the host.
        prefetch: Batches that are made ahead.
    """

    model: Any
    init: Callable
    loss: Loss
    optimizer: optax.GradientTransformation
    data: Callable
    preprocess: Any
    steps: int
    batch: int = 256
    seed: int = 0
    ema: NumberOrFunction | None = None
    sample: Callable | None = None
    evaluate: Callable | None = None
    picture: Callable | None = None
    picture_rows: int = 64
    frozen: Callable | None = None
    refresh: Refresh | None = None
    log_every: int = 50
    save_every: int = 500
    eval_every: int | None = None
    monitor: str | None = None
    patience: int | None = None
    skip_nonfinite: bool = False
    max_to_keep: int = 3
    unsaved: Sequence[str] = ()
    rules: Sequence[Rule] = ()
    accumulate: int = 1
    inner: int = 1
    prefetch: int = 0


class BoundPreprocess(NamedTuple):
    """A preprocessing step with the state of one checkpoint.

    Attributes:
        state: What was fitted on the training rows.
        apply: (rows, rng=None) -> rows in model units.
        undo: (rows) -> rows in data units.
        log_det: (rows in model units) -> [b], nats.
    """

    state: Any
    apply: Callable
    undo: Callable
    log_det: Callable


class Loaded(NamedTuple):
    """A trained experiment: the model, its params, and the way from data units to model units.

    Attributes:
        model: The experiment's model.
        params: Its trained params.
        preprocess: The preprocessing with its state: `apply`, `undo`, `log_det`.
        experiment: The whole experiment, as its config made it.
        step: The update that the params are of.
    """

    model: Any
    params: Params
    preprocess: BoundPreprocess
    experiment: Experiment
    step: int


def read_keys(
    path: str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[Callable, dict[str, Any]]:
    """The `config` function of a Python file, and the value of each of its keys.

    A key's type is its annotation, or that of its default: strings are read as values of it (false,
    3e-4, 64,64; `none` where None is a value), an int may stand for a float and a list for a tuple.
    A key without either takes no strings. The config may import files beside it.

    Args:
        path: Of the file, or of a folder with config.py.
        overrides: Values in place of the defaults, strings or Python values.

    Returns:
        (the function, the value of every key).

    Raises:
        ValueError: For an unknown key, naming the nearest, and for a value of another type.
    """
    path = _config_file(path)
    with _naming_the_table_of_names(path):
        module = load_module(path)
    config = getattr(module, "config", None)
    if not callable(config):
        raise ValueError(f"{path} has no function config(*, key=default, ...)")
    defaults, kinds = {}, {}
    for name, parameter in inspect.signature(config).parameters.items():
        if parameter.default is parameter.empty or parameter.kind is not parameter.KEYWORD_ONLY:
            raise ValueError(
                f"{path}: config must have keyword-only keys with defaults alone, {name!r} is"
                " not one"
            )
        defaults[name] = parameter.default
        kinds[name] = _keys.kind_of(
            str(path), parameter, getattr(config, "__globals__", vars(module))
        )
    values = dict(defaults)
    for name, value in (overrides or {}).items():
        if name not in defaults:
            raise ValueError(
                f"unknown key {name!r}: {hint(name, tuple(defaults))}{path} has the keys"
                f" {', '.join(defaults) or '(none)'}"
            )
        values[name] = _keys.read(name, value, kinds[name], defaults[name])
    return config, values


def load_config(
    path: str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[Experiment, dict[str, Any]]:
    """Calls the `config` function of a Python file, with some of its keys overridden.

    Args:
        path: Of the file, or of a folder with config.py.
        overrides: Values in place of the defaults, as `read_keys` takes them.

    Returns:
        (experiment, the value of every key).

    Raises:
        ValueError: For an unknown key, naming the nearest, and for a value of another type.
    """
    path = _config_file(path)
    config, values = read_keys(path, overrides)
    with _naming_the_table_of_names(path):
        experiment = config(**values)
    if not isinstance(experiment, Experiment):
        raise TypeError(
            f"{path}: config must return a jflow.apps.Experiment, got {type(experiment).__name__}"
        )
    for name, (least, most) in _keys.BOUNDS.items():
        if isinstance(count := getattr(experiment, name), int) and not least <= count <= most:
            raise ValueError(
                f"{path}: config must return an Experiment with {name} from {least} to {most}, got"
                f" {count}"
            )
    return experiment, values


def run(
    experiment: Experiment,
    workdir: str | Path,
    *,
    config_source: str | Path,
    resolved: Mapping[str, Any] | None = None,
    progress: bool = True,
    mesh: jax.sharding.Mesh | None = None,
) -> Fit:
    """Trains an experiment in a workdir, or goes on with it.

    The workdir keeps what `load` needs: the config, its values, checkpoints, metrics, pictures.
    Files beside the config that it imports are kept in WORKDIR/config_imports. `evaluate` and
    `picture` get whole params on every process.

    Args:
        experiment: What to train.
        workdir: Where it is kept; made if it is not there.
        config_source: The config file's path, or its text.
        resolved: The values of the config's keys, from `load_config`.
        progress: Whether to show a progress bar.
        mesh: Where to train (`train.make_mesh`): rows go over all its axes but one named 'model',
            the state by experiment.rules. None: one device, or all of them as 'data' under several
            processes. A workdir may go on with another mesh.

    Returns:
        What `train.fit` returns.

    Raises:
        ValueError: Where the workdir is another config's, naming what differs, and where another
            run is in it, naming its process.
    """
    workdir, sources, values = expand(workdir), sources_of(config_source), dict(resolved or {})
    text = b"\n".join(sources.values()).decode(errors="replace")
    processes.check_agreement(
        {"the config": text, **{f"key {name!r}": value for name, value in values.items()}}
    )
    with hold(workdir):
        claim(workdir, sources, values)
        return _train(experiment, workdir, progress, mesh)


def _train(
    experiment: Experiment, workdir: Path, progress: bool, mesh: jax.sharding.Mesh | None
) -> Fit:
    from jflow import data  # here, because the lightest use of jflow.train needs no data
    from jflow._core.seeds import generator

    if mesh is None and jax.process_count() > 1:
        mesh = data_mesh()
    sharding, share, loss = None, (0, 1), experiment.loss
    if mesh is not None:
        rows = tuple(name for name in mesh.axis_names if name != "model")
        sharding = data_sharding(mesh, rows)
        share = data.share(sharding)
        if experiment.rules:
            loss = gather_params(loss, mesh, experiment.rules, axes=rows)
    splits, pre = experiment.data(), experiment.preprocess
    saved = checkpoint.latest(workdir)
    pre_state = pre.fit(splits.train) if saved is None else _preprocess_of(workdir, saved)
    seed = experiment.seed

    def transform(rows, rng):
        return pre.apply(pre_state, rows, rng)

    batches = data.batches(
        splits.train, experiment.batch, seed=seed, transform=transform, share=share
    )
    init_key, frozen_key, train_key, eval_key, picture_key = jax.random.split(
        jax.random.key(seed), 5
    )
    first = transform(
        data.take(splits.train, slice(experiment.batch)), generator("first batch", seed)
    )

    def start():
        params = experiment.init(init_key, first)
        frozen = None if experiment.frozen is None else experiment.frozen(params, frozen_key, first)
        return init_state(
            params, experiment.optimizer, train_key, ema=experiment.ema, frozen=frozen
        )

    if mesh is None:
        state = start()
    else:  # with rules a device may be too small for the whole
        state = (
            init_sharded(start, mesh, experiment.rules)
            if experiment.rules
            else shard(start(), mesh)
        )

    def undone(rows):
        return pre.undo(pre_state, jax.tree.map(np.asarray, dict(rows)))

    score, sample, draw, many = (
        experiment.evaluate,
        experiment.sample,
        experiment.picture,
        experiment.picture_rows,
    )
    evaluate = (
        None
        if score is None
        else lambda state: score(_shown(state), pre_state, same_draws(eval_key), splits)
    )
    picture = (
        None
        if sample is None or draw is None
        else lambda state: draw(undone(sample(_shown(state), same_draws(picture_key), many)))
    )
    return fit(
        state,
        make_step(
            loss,
            experiment.optimizer,
            ema=experiment.ema,
            refresh=experiment.refresh,
            accumulate=experiment.accumulate,
        ),
        batches,
        steps=experiment.steps,
        workdir=workdir,
        log_every=experiment.log_every,
        save_every=experiment.save_every,
        eval_every=experiment.eval_every,
        evaluate=evaluate,
        picture=picture,
        monitor=experiment.monitor,
        patience=experiment.patience,
        skip_nonfinite=experiment.skip_nonfinite,
        max_to_keep=experiment.max_to_keep,
        unsaved=experiment.unsaved,
        progress=progress,
        preprocess=pre_state,
        sharding=sharding,
        inner=experiment.inner,
        prefetch=experiment.prefetch,
    )


def load(workdir: str | Path, *, step: int | None = None, ema: bool = True) -> Loaded:
    """Model, params and preprocessing of a workdir, without its training data.

    Args:
        workdir: What `jflow train`, `jflow fit`, `run` or `train.fit(workdir=...)` wrote.
        step: The update to take; None takes the best evaluation where the run monitored one, else
            the newest checkpoint.
        ema: Whether to take the averaged params, where the run kept an average.

    Returns:
        The trained experiment.

    Raises:
        FileNotFoundError: Where there is no workdir or no checkpoint, by name.
        ValueError: For a workdir whose config no longer runs, with what to do.
    """
    workdir = expand(workdir)
    if not (workdir / "config.json").is_file() or not (workdir / "config.py").is_file():
        how = (
            "train.checkpoint.restore_params(workdir) reads the params of what train.fit wrote"
            " alone"
        )
        how = f"; {how}" if checkpoint.steps(workdir) else ""
        raise FileNotFoundError(
            f"{workdir} is not the workdir of an experiment: it has no config.py and"
            f" config.json{how}"
        )
    experiment, _ = load_config(workdir / "config.py", stored_values(workdir))
    folder = workdir
    if step is None:
        step = checkpoint.latest(workdir / "best")
        folder = workdir if step is None else workdir / "best"
    params = checkpoint.restore_params(
        folder, step, ema
    )  # the newest, if that is None; raises where there is none
    step = checkpoint.latest(folder) if step is None else step
    assert step is not None  # `restore_params` has found one
    state, pre = _preprocess_of(folder, step), experiment.preprocess
    bound = BoundPreprocess(
        state,
        lambda rows, rng=None: pre.apply(state, rows, rng),
        lambda rows: pre.undo(state, rows),
        lambda rows: pre.log_det(state, rows),
    )
    return Loaded(experiment.model, params, bound, experiment, step)


def _shown(state: TrainState) -> Params:
    """The params to judge by: the averaged ones, if there are any; whole, where another process
    holds parts of them."""
    params = state.params if state.ema is None else state.ema
    return (
        params
        if jax.process_count() == 1
        else jax.tree.map(jnp.asarray, process_allgather(params, tiled=True))
    )


def _preprocess_of(folder: Path, step: int) -> Any:
    extra = checkpoint.restore_extra(folder, step)
    if "preprocess" not in extra:
        raise ValueError(
            f"the checkpoint of step {step} in {folder} has no preprocess: apps.run did not"
            " write it"
        )
    return extra["preprocess"]


def _config_file(path: str | Path) -> Path:
    path = expand(path)
    path = path / "config.py" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no config at {path}")
    return path


def sources_of(source: str | Path) -> dict[str, bytes]:
    """What a workdir keeps of a config, given as a path or as text: config.py, and what it imports
    from its folder."""
    if isinstance(source, str) and "\n" in source:
        return {"config.py": source.encode()}
    path = _config_file(source)
    beside = {f"{STORED}/{name}": content for name, content in files_beside(path).items()}
    return {"config.py": path.read_bytes(), **beside}


def stored_values(workdir: Path) -> dict[str, Any]:
    """The values of config.json."""
    file = workdir / "config.json"
    try:
        values = json.loads(file.read_bytes())["values"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged: expected JSON with 'values' ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: expected 'values' to be a dict, got {values!r}")
    return values


def claim(workdir: Path, sources: dict[str, bytes], values: dict[str, Any]) -> None:
    """Write config.py, what it imports and config.json, or check that those there say the same."""
    try:
        values = json.loads(json.dumps(values))
    except TypeError as error:
        raise ValueError(
            f"the keys of a config must hold numbers, strings, booleans, None or lists: {error}"
        ) from None
    kept = workdir / "config.json"
    if kept.is_file() and (workdir / "config.py").is_file():
        there, missing = stored_values(workdir), "(not a key)"
        differ = [k for k in {**there, **values} if there.get(k, missing) != values.get(k, missing)]
        said = [
            f"{k} is {there.get(k, missing)!r} there, {values.get(k, missing)!r} here"
            for k in differ
        ]
        said += filter(
            None, (_difference(workdir / name, name, content) for name, content in sources.items())
        )
        if said:
            raise ValueError(f"workdir {workdir} is another config's: {'; '.join(said)}")
        return
    if checkpoint.steps(workdir):
        raise ValueError(f"workdir {workdir} has checkpoints of a run without a config")
    if not processes.is_main():
        return
    text = json.dumps({"values": values, "jflow": jflow.__version__}, indent=2) + "\n"
    for name, content in {**sources, kept.name: text.encode()}.items():
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(workdir / name, content)


def _difference(file: Path, name: str, here: bytes) -> str | None:
    if not file.is_file():
        return f"{name} is missing there"
    there = file.read_bytes()
    if there == here:
        return None
    lines = zip(there.splitlines() + [b""], here.splitlines() + [b""], strict=False)
    return (
        f"{name} differs from line {next((i for i, (a, b) in enumerate(lines, 1) if a != b), 1)} on"
    )


@contextlib.contextmanager
def _naming_the_table_of_names(path: Path):
    """Where a config asks jflow for a name that is not there, the error says how a file of an older
    jflow is carried over."""
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        text = str(error)
        if "jflow" not in text.replace(str(path), "") and "unexpected keyword argument" not in text:
            raise
        raise type(error)(
            f"{text} (docs/renames.tsv lists the names that changed since older versions; `python"
            f" docs/rename.py {path}` carries a file over)"
        ) from error
