"""Which keys a program consumes twice, read off its jaxpr: nothing is compiled."""

import copy
import itertools
from pathlib import Path

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

KEYS = tuple(map(jax.random.key, range(4)))  # for arguments
_REPOSITORY = Path(__file__).parents[1]


def keys_consumed_twice(function, *args) -> list[str]:
    """The places, 'primitive at file:line > ...', where function(*args) consumes a key again; the
    keys among args are taken to be different.

    A draw, a split and a fold_in consume a key. Several fold_ins of one key are one use where their
    data differ, and child i of a split is the key fold_in(key, i), whatever number it was split
    into. A loop is run twice, with the first two rows of what it scans. `jax.random.clone(key)`
    says that the same numbers are wanted once more, and is not counted."""
    with jax.debug_key_reuse(False):  # JAX would raise at the first of them
        program = jax.make_jaxpr(function)(*args)
    reader = _Reader()
    reader.run(program, [reader.new(v.aval) for v in program.jaxpr.invars])
    return list(dict.fromkeys(reader.found))


class _Reader:
    """Names every value: an array of keys by an array of names, other values by one name for all of
    it, in an array of no axes. Keys of one name are one key."""

    def __init__(self):
        self.count, self.integers, self.uses, self.found, self.inside = (
            itertools.count(),
            {},
            {},
            [],
            [],
        )

    def new(self, aval):
        shape = aval.shape if _is_key(aval) else ()
        return _array([("new", next(self.count)) for _ in range(np.prod(shape, dtype=int))], shape)

    def constant(self, v, value):
        if _is_key(v.aval):
            rows = np.asarray(jax.random.key_data(value)).reshape(v.aval.size, -1)
            return _array([("key", *row.tolist()) for row in rows], v.aval.shape)
        return _array([("value", int(value))], ()) if _is_integer(v.aval) else self.new(v.aval)

    def consume(self, key, how, eqn):
        uses = self.uses.setdefault(key, set())
        if uses and (how in uses or "all" in uses | {how}):
            self.found.append(
                f"{eqn.primitive.name} at"
                f" {' > '.join(filter(None, map(_line, [*self.inside, eqn])))}"
            )
        uses.add(how)

    def run(self, program, inputs):
        jaxpr, consts = (
            (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, [])
        )
        env = {v: self.constant(v, value) for v, value in zip(jaxpr.constvars, consts, strict=True)}
        for v, names in zip(jaxpr.invars, inputs, strict=True):
            # inside a shard_map, the first shard's rows
            env[v] = names[(*map(slice, v.aval.shape), ...)] if _is_key(v.aval) else names
        read = lambda v: self.constant(v, v.val) if isinstance(v, Literal) else env[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            env.update(
                zip(eqn.outvars, self.outputs(eqn, [read(v) for v in eqn.invars]), strict=True)
            )
        return [read(v) for v in jaxpr.outvars]

    def outputs(self, eqn, inputs):
        name, params = eqn.primitive.name, eqn.params
        keys = [names for names, v in zip(inputs, eqn.invars, strict=True) if _is_key(v.aval)]
        if keys and (values := self.enter(eqn, inputs)) is not None:
            return values
        outs = [v.aval for v in eqn.outvars]
        if name == "random_fold_in":
            parents, data = (np.broadcast_to(names, outs[0].shape).ravel() for names in inputs)
            children = [
                (k, d if outs[0].shape == () else (*d, i))
                for i, (k, d) in enumerate(zip(parents, data, strict=True))
            ]
            for k, d in children:
                self.consume(k, d, eqn)
            return [_array(children, outs[0].shape)]
        if keys and name in _MOVES:
            return [_MOVES[name](params, outs[0].shape, *keys)]
        if name not in ("random_clone", "eq", "ne"):
            for k in itertools.chain(*(names.flat for names in keys)):
                self.consume(k, "all", eqn)
        if name == "random_split":
            numbers = range(np.prod(params["shape"], dtype=int))
            return [
                _array([(k, ("value", i)) for k in keys[0].flat for i in numbers], outs[0].shape)
            ]
        if all(v.aval.shape == () for v in eqn.invars) and (
            name == "random_seed" or all(map(_is_integer, outs))
        ):
            same = (name, str(params), *(names.item() for names in inputs))
            return self.integers.setdefault(same, [self.new(aval) for aval in outs])
        return [self.new(aval) for aval in outs]

    def enter(self, eqn, inputs):
        """The outputs of a program inside the program, one that is given keys; None where there is
        none."""
        name, params = eqn.primitive.name, eqn.params
        self.inside.append(eqn)
        try:
            if name == "scan":
                return self.scan(eqn, inputs)
            if name == "while":
                return self.while_loop(params, inputs)
            if name == "cond":
                return self.cond(params["branches"], inputs[1:])
            for inner in params.values():  # of jit, custom_vjp_call, checkpoint, shard_map ...
                if isinstance(inner, Jaxpr | ClosedJaxpr) and len(_open(inner).invars) == len(
                    inputs
                ):
                    return self.run(inner, inputs)
        finally:
            self.inside.pop()

    def scan(self, eqn, inputs):
        body = eqn.params["jaxpr"]  # where what is scanned and what is stacked have an axis less
        inner, results = _open(body).invars, _open(body).outvars
        less = lambda inside, out: sum(  # noqa: E731
            v.aval.ndim < w.aval.ndim for v, w in zip(inside, out, strict=True)
        )
        carries, rows = (
            len(results) - less(results, eqn.outvars),
            len(inner) - less(inner, eqn.invars),
        )
        carry = inputs[rows - carries : rows]
        for i in range(min(2, eqn.params["length"])):
            row = [
                x[i, ...] if x.ndim else self.new(v.aval)
                for x, v in zip(inputs[rows:], inner[rows:], strict=True)
            ]
            carry = self.run(body, [*inputs[: rows - carries], *carry, *row])[:carries]
        return [*carry, *(self.new(v.aval) for v in eqn.outvars[carries:])]

    def while_loop(self, params, inputs):
        n = params["cond_nconsts"]
        m = n + params["body_nconsts"]
        carry = inputs[m:]
        for _ in range(2):
            self.run(params["cond_jaxpr"], [*inputs[:n], *carry])
            carry = self.run(params["body_jaxpr"], [*inputs[n:m], *carry])
        return carry

    def cond(self, branches, inputs):
        """Any branch may run, one does."""
        before, after = self.uses, {}
        for branch in branches:
            self.uses = copy.deepcopy(before)
            out = self.run(branch, inputs)
            for key, uses in self.uses.items():
                after.setdefault(key, set()).update(uses)
        self.uses = after
        return out


def _broadcast(params, shape, x):
    sizes = dict(zip(params["broadcast_dimensions"], x.shape, strict=True))
    return np.broadcast_to(x.reshape([sizes.get(i, 1) for i in range(len(shape))]), shape)


def _slice(params, shape, x):
    steps = params["strides"] or (1,) * x.ndim
    return x[(*map(slice, params["start_indices"], params["limit_indices"], steps), ...)]


# what becomes of an array of names where a primitive only moves keys about
_MOVES = {
    "slice": _slice,
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda params, shape, *xs: np.concatenate(xs, params["dimension"]),
    "transpose": lambda params, shape, x: x.transpose(params["permutation"]),
    **dict.fromkeys(
        ("reshape", "squeeze", "copy", "pvary", "pcast"), lambda params, shape, x: x.reshape(shape)
    ),
}


def _array(names, shape):
    out = np.empty(len(names), object)
    for i, name in enumerate(names):  # tuples, which numpy would take for an axis
        out[i] = name
    return out.reshape(shape)


def _open(jaxpr):
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _is_key(aval):
    return jax.dtypes.issubdtype(getattr(aval, "dtype", None), jax.dtypes.prng_key)


def _is_integer(aval):
    return getattr(aval, "shape", None) == () and jax.dtypes.issubdtype(aval.dtype, np.integer)


def _line(eqn):
    """file:line of the innermost frame in this repository; a function that jit has cached says
    where it was first traced."""
    lines, trace = (
        [None],
        eqn.source_info.traceback and eqn.source_info.traceback.as_python_traceback(),
    )
    while trace:
        path = Path(trace.tb_frame.f_code.co_filename)
        if _REPOSITORY in path.parents and path != Path(__file__):
            lines.append(f"{path.relative_to(_REPOSITORY)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return lines[-1]
