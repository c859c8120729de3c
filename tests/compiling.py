"""How programs of tests are compiled, and how many a call compiles."""

import functools
import os
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.core.scope import Scope
from jax._src.core import trace_state_clean
from jax._src.interpreters import mlir

_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",  # gone in jax 0.12
    "--xla_cpu_parallel_codegen_split_count=1",
)


def leave_the_optimizer_out() -> None:
    """Compile in a third of the time, for programs that run once on a handful of numbers. Before
    JAX is first used.

    Subprocesses inherit the flags. One that this version does not know ends the process, so a
    subprocess tries them first, and those that it names are left out."""
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    flags = list(_FLAGS)
    while flags:
        env = {
            **os.environ,
            "XLA_FLAGS": " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip(),
        }
        done = subprocess.run(trial, env=env, capture_output=True, text=True)
        if done.returncode == 0:
            os.environ["XLA_FLAGS"] = env["XLA_FLAGS"]
            return
        print(f"XLA flags: {done.stderr.strip()[-300:]}", file=sys.stderr)
        unknown = [flag for flag in flags if flag.split("=")[0] in done.stderr]
        flags = [flag for flag in flags if unknown and flag not in unknown]


_CONTEXTS = threading.local()


def share_contexts() -> None:
    """Lower the programs of a thread in one context of MLIR. JAX makes one for each, which takes a
    fifth of what a program of one operation costs. A program that runs while another one is lowered
    has a context of its own."""
    make = mlir.make_ir_context

    def shared():
        if mlir.ir.Context.current is not None:
            return make()
        if not hasattr(_CONTEXTS, "one"):
            _CONTEXTS.one = make()
        return _CONTEXTS.one

    mlir.make_ir_context = shared


def leave_contexts() -> None:
    """The next program of this thread has a new context: one keeps the constants of its
    programs."""
    vars(_CONTEXTS).clear()


def compare_shapes_once() -> None:
    """Ask an initializer once for the shapes that it makes. Flax traces it each time that a module
    reads the parameter, to compare them, which is a seventh of what tracing costs."""
    ask = Scope.param

    @functools.lru_cache(1024)
    def shapes(init, args, named):
        made = jax.eval_shape(lambda: init(jax.random.key(0), *args, **dict(named)))
        return [leaf.shape for leaf in jax.tree.leaves(made)]

    def param(self, name, init_fn, *args, unbox=True, **named):
        if self.has_variable("params", name):
            value = self.get_variable("params", name)
            try:
                expected = shapes(init_fn, args, tuple(named.items()))
            except TypeError:  # an argument without a hash
                expected = None
            if expected == [jax.numpy.shape(leaf) for leaf in jax.tree.leaves(value)]:
                self.reserve(name, "params")
                return meta.unbox(value) if unbox else value
        return ask(self, name, init_fn, *args, unbox=unbox, **named)

    Scope.param = param


def make_arrays_in_numpy() -> None:
    """Let jnp.asarray and the like put on the device what numpy makes. JAX compiles a program for
    each shape and type that they are called with outside jit."""

    def replace(name, in_numpy, takes):
        plain = getattr(jnp, name)

        @functools.wraps(plain)
        def make(*args, **named):
            few = 1 <= len(args) <= 2 and named.keys() <= {"dtype"}
            if not (few and takes(args[0]) and trace_state_clean()):
                return plain(*args, **named)
            made, asked = in_numpy(args[0]), named.get("dtype", (*args, None)[1])
            if made.dtype.kind not in "biuf":
                return plain(*args, **named)
            dtype = jax.dtypes.canonicalize_dtype(made.dtype if asked is None else asked)
            if asked is not None and dtype != jnp.dtype(asked):  # which JAX warns of
                return plain(*args, **named)
            return jax.device_put(made.astype(dtype))

        setattr(jnp, name, make)

    def numbers(x):
        kinds = {type(n) for n in jax.tree.leaves(x)}
        return type(x) in (list, tuple) and kinds <= {bool, int, float}

    def small(x):  # a large array would be there twice, which tests of memory count
        return type(x) is np.ndarray and x.nbytes < 2**16

    for name in ("array", "asarray"):
        replace(name, np.asarray, lambda x: small(x) or numbers(x))
    for name in ("zeros", "ones"):
        replace(name, getattr(np, name), lambda shape: type(shape) is int or numbers(shape))


_COUNT = [0]
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: _COUNT.__setitem__(
        0, _COUNT[0] + name.endswith("backend_compile_duration")
    )
)


def called_twice(**calls) -> tuple[dict, dict[str, int]]:
    """Make every call twice: ({name: what the first one returned}, {name: the programs that the
    second call compiled}, without those that compiled none)."""
    results, again = {}, {}
    for name, call in calls.items():
        results[name] = call()
        before = _COUNT[0]
        call()
        if _COUNT[0] > before:
            again[name] = _COUNT[0] - before
    return results, again


def program(function, *args) -> str:
    """The traced program of a call as text: equal texts with equal constants are equal values."""
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*args)))


def equations(function, *args) -> int:
    """How many equations the traced program of a call has, in those that it calls, too."""

    def count(jaxpr):
        inner = jax.tree.leaves(
            [list(e.params.values()) for e in jaxpr.eqns], is_leaf=lambda p: hasattr(p, "eqns")
        )
        return len(jaxpr.eqns) + sum(
            count(getattr(p, "jaxpr", p)) for p in inner if hasattr(p, "eqns")
        )

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def compiled_again(**calls) -> dict[str, int]:
    """{name: the programs that a second call compiled}, without those that compiled none."""
    return called_twice(**calls)[1]
