"""A velocity of several parts at times of their own: what some parts are when others are given."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.checks import (
    check_cond,
    check_noun,
    count_rows,
    described,
    like_state,
    times_of,
)
from jflow._core.numbers import number_at
from jflow.types import Field, NumberOrFunction, PyTree, Velocity

__all__ = ["PartsCondition", "given_parts", "parts", "single_part"]


class PartsCondition(NamedTuple):
    """What is said of parts that are not free, beside the condition of the joint velocity.

    All leaves lead with the rows of x, or with 1 for all rows.

    Attributes:
        given: the values of given parts by name, which stand at t = 1; None: no part.
        absent: the noise of absent parts by name, which stand at t = 0, drawn from the source; it
            stays the same for a whole solve. None: no part.
        cond: the condition that the joint velocity takes.
    """

    given: Any = None
    absent: Any = None
    cond: Any = None


def given_parts(velocity: Velocity) -> Velocity:
    """The velocity of the free parts where the others are given or absent, from a joint one.

        velocity({x, given, absent}, {t, 1, 0}, cond) of the free parts

    It is a velocity like any other: sampling it draws from the law of the free parts given the
    given ones, with the absent ones averaged out, where the joint velocity was trained at such
    times (`losses.joint_matching`). Without given and absent parts it draws all of them together.

    Args:
        velocity: the joint velocity, of x and t dicts with one form, all parts in them.

    Returns:
        Velocity: of x {free part: [b, *event]} and t [b], or a dict of the times of the free parts;
            cond is a `PartsCondition`, or None for one of nothing; params are those of `velocity`.
            It raises a ValueError for a cond of another kind, an x that is no dict, and a part that
            is in two of x, given and absent.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import guidance, oracles, solvers
        >>> oracle = oracles.joint_gaussian({"a": [0.0], "b": [0.0]}, [[1.0, 0.8], [0.8, 1.0]])
        >>> v = guidance.given_parts(oracles.as_velocity(oracle))
        >>> noise = {"a": jax.random.normal(jax.random.key(0), (4096, 1))}
        >>> cond = guidance.PartsCondition(given={"b": jnp.full((1, 1), 2.0)})
        >>> x1, info = solvers.sample(v, {}, noise, cond, method=20)
        >>> round(float(x1["a"].mean()), 1)  # 0.8 times 2
        1.6
    """
    check_noun("given_parts", velocity, Velocity, Field)

    def joint(x, t, cond):
        x, t, given, absent, cond = _read("given_parts", x, t, cond)
        return *_stand(x, t, given, absent), cond

    def init(key, x, t, cond=None):
        return velocity.init(key, *joint(x, t, cond))

    def apply(params, x, t, cond=None, *, key=None):
        whole, times, cond = joint(x, t, cond)
        v = velocity.apply(params, whole, times, cond, key=key)
        v = like_state("given_parts", v, whole)
        return {part: v[part] for part in x}

    return Velocity(init, apply)


def single_part(velocity: Velocity, part: str) -> Velocity:
    """The velocity of a single part as one of arrays, for likelihoods and whatever else takes them.

    Args:
        velocity: a velocity of x {part: [b, *event]}, such as `given_parts(joint)`.
        part: the name of the part.

    Returns:
        Velocity: of x [b, *event], with the params and the cond of `velocity`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance, oracles
        >>> oracle = oracles.joint_gaussian({"a": [0.0], "b": [0.0]}, [[1.0, 0.8], [0.8, 1.0]])
        >>> joint = oracles.as_velocity(oracle)
        >>> v = guidance.single_part(guidance.given_parts(joint), "a")
        >>> cond = guidance.PartsCondition(given={"b": jnp.full((1, 1), 2.0)})
        >>> v.apply({}, jnp.zeros((1, 1)), 0.0, cond)  # towards 0.8 times 2
        Array([[1.6]], dtype=float32)
    """

    def init(key, x, t, cond=None):
        return velocity.init(key, {part: x}, t, cond)

    def apply(params, x, t, cond=None, *, key=None):
        return velocity.apply(params, {part: x}, t, cond, key=key)[part]

    return Velocity(init, apply)


def parts(velocity: Velocity, weights: Mapping[tuple[str, str], NumberOrFunction]) -> Velocity:
    """Guidance of each part by each other one, with a weight for every pair of parts.

    Also known as: OmniFlow guidance, multi-modal guidance.

        v_i + sum_j w_ij (v_i(i and j) - v_i(i alone))

    v_i is the velocity of the free part i beside all parts that are there, v_i(i and j) with every
    part absent but i and j, and v_i(i alone) with all others absent. w_ij = 0 is `given_parts`. For
    one free and one given part it is `cfg` with the scale 1 + w_ij, and absence in the place of the
    null. All of it is one evaluation of b rows for each set of parts.

    Args:
        velocity: the joint velocity, trained with absent parts (`losses.joint_matching`).
        weights: w_ij by (i, j): of the part i towards the part j, a number or t_i [b] -> [b]. Pairs
            whose i is not free, or whose j is absent, have no say.

    Returns:
        Velocity: like that of `given_parts`, with params of `velocity`. cond.absent holds noise for
            every part that a set leaves out, also for given and for free ones. It raises a
            ValueError where such noise is missing, and for weights of parts that are nowhere.

    Raises:
        ValueError: a key of weights is not a pair of two parts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance, oracles
        >>> oracle = oracles.joint_gaussian({"a": [0.0], "b": [0.0]}, [[1.0, 0.8], [0.8, 1.0]])
        >>> v = guidance.parts(oracles.as_velocity(oracle), {("a", "b"): 1.5})
        >>> cond = guidance.PartsCondition({"b": jnp.full((1, 1), 2.0)}, {"b": jnp.zeros((1, 1))})
        >>> out = v.apply({}, {"a": jnp.zeros((1, 1))}, 0.0, cond)["a"]
        >>> float(out[0, 0])  # 1.6 + 1.5 (1.6 - 0)
        4.0

    References:
        Li, Kallidromitis, Gokul, Liao, Kato, Kozuka, Grover, *OmniFlow: Any-to-Any Generation with
            Multi-Modal Rectified Flows*, 2024, arXiv:2412.01169, whose public code runs the case of
            one given part, as `cfg`. That w = 0 is the conditional velocity is our choice.
    """
    check_noun("guidance.parts", velocity, Velocity, Field)
    weights = dict(weights)
    for pair in weights:
        if not (isinstance(pair, tuple) and len(pair) == 2 and pair[0] != pair[1]):
            raise ValueError(f"guidance.parts: expected weights by pairs of parts, got {pair!r}")

    def init(key, x, t, cond=None):
        x, t, given, absent, cond = _read("guidance.parts", x, t, cond, spare=True)
        spare = {part: a for part, a in absent.items() if part not in {**given, **x}}
        return velocity.init(key, *_stand(x, t, given, spare), cond)

    def apply(params, x, t, cond=None, *, key=None):
        x, t, given, absent, cond = _read("guidance.parts", x, t, cond, spare=True)
        present = {**given, **x}
        known = set(present) | set(absent)
        if unknown := sorted({part for pair in weights for part in pair} - known):
            raise ValueError(
                f"guidance.parts: expected weights of the parts {sorted(known)}, got {unknown}"
            )
        pairs = {(i, j): w for (i, j), w in weights.items() if i in x and j in present}
        sets = [frozenset(present)]
        for i, j in pairs:
            sets += [s for s in (frozenset((i, j)), frozenset((i,))) if s not in sets]
        states = [_standing(x, t, given, absent, there) for there in sets]
        n = count_rows("guidance.parts", x)
        stacked, times, conds = jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves), *((*state, cond) for state in states)
        )
        v = like_state(
            "guidance.parts", velocity.apply(params, stacked, times, conds, key=key), stacked
        )
        of = lambda i, there: v[i][n * sets.index(there) :][:n]  # noqa: E731
        out = {i: of(i, frozenset(present)) for i in x}
        for (i, j), weight in pairs.items():
            w = number_at("guidance.parts", f"weights[{(i, j)}](t)", weight, t[i], like=t[i])
            apart = of(i, frozenset((i, j))) - of(i, frozenset((i,)))
            out[i] = out[i] + (expand_to(w, apart) * apart).astype(apart.dtype)
        return out

    return Velocity(init, apply)


def _read(name: str, x: PyTree, t: PyTree, cond: Any, *, spare: bool = False) -> tuple:
    """(x, t, given, absent, cond), dicts but for the last; with `spare`, absent may hold noise for
    parts that are there."""
    if not isinstance(x, Mapping):
        raise ValueError(
            f"{name}: expected x to be a dict of the free parts, got {described(x)}; "
            "guidance.single_part makes arrays of one part"
        )
    if cond is not None and not isinstance(cond, PartsCondition):
        raise ValueError(
            f"{name}: expected cond to be a guidance.PartsCondition or None, got {described(cond)}"
        )
    cond = PartsCondition() if cond is None else cond
    cond = jax.tree.map(jnp.asarray, check_cond(name, cond, count_rows(name, x)))
    given, absent = dict(cond.given or {}), dict(cond.absent or {})
    twice = set(given) & set(x)
    if not spare:
        twice |= set(absent) & (set(x) | set(given))
    if twice:
        raise ValueError(
            f"{name}: expected every part in one of x, given and absent, got {sorted(twice)} twice"
        )
    t = times_of(name, t, x)
    return dict(x), t if isinstance(t, dict) else dict.fromkeys(x, t), given, absent, cond.cond


def _stand(x: dict, t: dict, given: dict, absent: dict) -> tuple[dict, dict]:
    """All parts and their times, given ones at 1 and absent ones at 0."""
    row = next(iter(t.values()))
    row = jnp.zeros_like(row, shape=row.shape[:1])
    times = dict.fromkeys(absent, row) | dict.fromkeys(given, row + 1) | t
    return absent | given | x, times


def _standing(x: dict, t: dict, given: dict, absent: dict, there: frozenset) -> tuple[dict, dict]:
    """`_stand` where only some of the parts are there; all others are noise at 0."""
    gone = sorted((set(x) | set(given) | set(absent)) - there)
    if missing := [part for part in gone if part not in absent]:
        raise ValueError(
            f"guidance.parts: expected noise of {missing} in cond.absent, for the velocity without"
            f" them, got that of {sorted(absent)}"
        )
    only = lambda parts: {part: a for part, a in parts.items() if part in there}  # noqa: E731
    at = {part: time if part in there else jnp.zeros_like(time) for part, time in t.items()}
    return _stand(only(x), at, only(given), {part: absent[part] for part in gone})
