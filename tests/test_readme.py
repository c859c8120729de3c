"""The README's code runs as it stands, but for the number of training steps."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


def test_the_first_block_takes_columns_in_any_units():
    """Three columns far apart in place of the moons: held-out rows end near the truth, after a
    quarter of the steps."""
    rng = np.random.default_rng(0)
    normal, lognormal, uniform = (
        scipy.stats.norm(5000, 100),
        scipy.stats.lognorm(1),
        scipy.stats.uniform(),
    )
    columns = [law.rvs(20_000, random_state=rng) for law in (normal, lognormal, uniform)]
    train, held_out = np.stack(columns, axis=1).astype(np.float32).reshape(2, 10_000, 3)
    block = BLOCKS[0].replace("range(1000)", "range(250)").replace("(2,)", "(3,)")
    block = re.sub("rows = .*", "rows = {'x': columns}", block)
    names = {"columns": train}
    exec(compile(block, "README block 0", "exec"), names)
    truth = sum(
        law.logpdf(held_out[:, i]) for i, law in enumerate((normal, lognormal, uniform))
    ).mean()
    found = jax.jit(names["flow"].log_prob)(names["state"].params, held_out).mean()
    assert truth - 0.3 < found < truth + 0.05


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number):
    exec(
        compile(
            BLOCKS[number].replace("range(1000)", "range(2)"), f"README block {number}", "exec"
        ),
        {},
    )
