"""How many programs a call compiles."""

import jax

_COUNT = [0]
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: _COUNT.__setitem__(0, _COUNT[0] + name.endswith("backend_compile_duration"))
)


def compiled_again(**calls) -> dict[str, int]:
    """Make every call twice, without jit: those whose second call needed new programs, and how many. All should be in {}."""
    again = {}
    for name, call in calls.items():
        call()
        before = _COUNT[0]
        call()
        if _COUNT[0] > before:
            again[name] = _COUNT[0] - before
    return again
