"""`quick`: jax.jit for what is compiled once, run once and thrown away, as most of the tests are."""

import functools

import jax

_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def _known(name: str) -> bool:
    """Whether this version of XLA has the option; they come and go."""
    try:
        jax.jit(lambda: 0, compiler_options={name: _OPTIONS[name]}).lower().compile()
    except Exception as error:  # the class differs from version to version, the message hardly
        if name not in str(error):
            raise
        return False
    return True


def quick(function, **kwargs):
    """`jax.jit` with most of XLA's optimiser left out: compiles in half the time, computes the same."""
    return jax.jit(function, compiler_options={k: v for k, v in _OPTIONS.items() if _known(k)}, **kwargs)
