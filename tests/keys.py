"""Which keys a program consumes twice, read off its jaxpr: nothing is compiled."""

import copy
import itertools
from pathlib import Path

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def keys_consumed_twice(function, *args) -> list[str]:
    """The places, as 'primitive at file:line ...', where function(*args) consumes a key again; the keys among args are
    taken to be different.

    A draw, a split and a fold_in consume a key. Several fold_ins of one key are one use where their data differ, and child i
    of a split is the key fold_in(key, i), whatever number it was split into. A loop is run twice, with the first two rows
    of what it scans. `jax.random.clone(key)` says that the same numbers are wanted once more, and is not counted."""
    program = jax.make_jaxpr(function)(*args)
    reader = _Reader()
    reader.run(program, [reader.fresh(v.aval) for v in program.jaxpr.invars])
    return list(dict.fromkeys(reader.found))


class _Reader:
    """Names every value: an array of keys by an array of names, other values by one for all of it, in an array of no axes."""

    def __init__(self):
        self.count, self.integers, self.uses, self.found, self.inside = itertools.count(), {}, {}, [], []

    def fresh(self, aval):
        shape = aval.shape if _is_key(aval) else ()
        return _array([("new", next(self.count)) for _ in range(np.prod(shape, dtype=int))], shape)

    def constant(self, v, value):
        if _is_key(v.aval):
            rows = np.asarray(jax.random.key_data(value)).reshape(v.aval.size, -1)
            return _array([("key", *row.tolist()) for row in rows], v.aval.shape)
        return _array([("value", int(value))], ()) if _is_integer(v.aval) else self.fresh(v.aval)

    def consume(self, key, how, eqn):
        uses = self.uses.setdefault(key, set())
        if uses and (how in uses or "all" in uses | {how}):
            self.found.append(f"{eqn.primitive.name} at {' > '.join(filter(None, map(_line, [*self.inside, eqn])))}")
        uses.add(how)

    def run(self, program, inputs):
        jaxpr, consts = (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, [])
        env = {v: self.constant(v, value) for v, value in zip(jaxpr.constvars, consts, strict=True)}
        for v, names in zip(jaxpr.invars, inputs, strict=True):
            env[v] = names[(*map(slice, v.aval.shape), ...)] if _is_key(v.aval) else names  # a shard has the first rows
        read = lambda v: self.constant(v, v.val) if isinstance(v, Literal) else env[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self.apply(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def apply(self, eqn, inputs):
        name, p = eqn.primitive.name, eqn.params
        self.inside.append(eqn)
        try:
            if name == "scan":
                return self.scan(eqn, inputs)
            if name == "while":
                return self.while_loop(p, inputs)
            if name == "cond":
                return self.cond(p["branches"], inputs[1:])
            for inner in p.values():
                if isinstance(inner, Jaxpr | ClosedJaxpr) and len(_open(inner).invars) == len(inputs):
                    return self.run(inner, inputs)
        finally:
            self.inside.pop()
        out = eqn.outvars[0].aval if eqn.outvars else None
        keys = [names for names, v in zip(inputs, eqn.invars, strict=True) if _is_key(v.aval)]
        if name == "random_fold_in":
            parents, data = (np.broadcast_to(names, out.shape) for names in inputs)
            pairs = [
                (k, d if data.size == 1 else (d, i))
                for i, (k, d) in enumerate(zip(parents.flat, data.flat, strict=True))
            ]
            for k, d in pairs:
                self.consume(k, d, eqn)
            return [_array(pairs, out.shape)]
        if name == "random_split":
            for k in keys[0].flat:
                self.consume(k, "all", eqn)
            children = [(k, ("value", i)) for k in keys[0].flat for i in range(np.prod(p["shape"], dtype=int))]
            return [_array(children, out.shape)]
        if keys and name in _MOVES:
            return [_MOVES[name](p, out.shape, *keys)]
        if name not in ("random_clone", "eq", "ne"):
            for k in itertools.chain(*(names.flat for names in keys)):
                self.consume(k, "all", eqn)
        if (
            len(eqn.outvars) == 1
            and (name == "random_seed" or _is_integer(out))
            and all(v.aval.shape == () for v in eqn.invars)
        ):
            same = (name, str(p), *(names.item() for names in inputs))
            return [self.integers.setdefault(same, self.fresh(out))]
        return [self.fresh(v.aval) for v in eqn.outvars]

    def scan(self, eqn, inputs):
        body = eqn.params["jaxpr"]  # where what is scanned and what is stacked have an axis less
        inner, results = _open(body).invars, _open(body).outvars
        less = lambda inside, out: sum(v.aval.ndim < w.aval.ndim for v, w in zip(inside, out, strict=True))  # noqa: E731
        carries, rows = len(results) - less(results, eqn.outvars), len(inner) - less(inner, eqn.invars)
        carry = inputs[rows - carries : rows]
        for i in range(min(2, eqn.params["length"])):
            row = [
                x[i, ...] if x.ndim else self.fresh(v.aval) for x, v in zip(inputs[rows:], inner[rows:], strict=True)
            ]
            carry = self.run(body, [*inputs[: rows - carries], *carry, *row])[:carries]
        return [*carry, *(self.fresh(v.aval) for v in eqn.outvars[carries:])]

    def while_loop(self, p, inputs):
        n = p["cond_nconsts"]
        m = n + p["body_nconsts"]
        carry = inputs[m:]
        for _ in range(2):
            self.run(p["cond_jaxpr"], [*inputs[:n], *carry])
            carry = self.run(p["body_jaxpr"], [*inputs[n:m], *carry])
        return carry

    def cond(self, branches, inputs):
        before, after = self.uses, {}
        for branch in branches:
            self.uses = copy.deepcopy(before)
            out = self.run(branch, inputs)
            for key, uses in self.uses.items():
                after.setdefault(key, set()).update(uses)
        self.uses = after
        return out


# what becomes of an array of names where a primitive only moves keys about
_MOVES = {
    "slice": lambda p, shape, x: x[
        tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or (1,) * x.ndim))
    ],
    "squeeze": lambda p, shape, x: x.reshape(shape),
    "reshape": lambda p, shape, x: x.reshape(shape),
    "broadcast_in_dim": lambda p, shape, x: np.broadcast_to(
        x.reshape(
            [
                x.shape[p["broadcast_dimensions"].index(i)] if i in p["broadcast_dimensions"] else 1
                for i in range(len(shape))
            ]
        ),
        shape,
    ),
    "transpose": lambda p, shape, x: x.transpose(p["permutation"]),
    "concatenate": lambda p, shape, *xs: np.concatenate(xs, p["dimension"]),
    **dict.fromkeys(
        ("copy", "copy_p", "optimization_barrier", "pvary", "pcast", "sharding_constraint"), lambda p, shape, x: x
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
    return jax.dtypes.issubdtype(getattr(aval, "dtype", np.float32), jax.dtypes.prng_key)


def _is_integer(aval):
    return getattr(aval, "shape", None) == () and jax.dtypes.issubdtype(aval.dtype, np.integer)


def _line(eqn):
    """file:line of the innermost frame in this repository, from the inside of cached functions where they were first traced."""
    if eqn.source_info.traceback is None:
        return None
    trace, lines = eqn.source_info.traceback.as_python_traceback(), []
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if _REPOSITORY in path.parents and path != Path(__file__):
            lines.append(f"{path.relative_to(_REPOSITORY)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return lines[-1] if lines else None


_REPOSITORY = Path(__file__).parents[1]
