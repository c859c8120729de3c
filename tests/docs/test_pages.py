"""The code of the site's pages runs as it stands, but for the number of training steps; and what
the pages say of the tutorials is so."""

import re
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.stats

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/pages"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
TUTORIALS = sorted(ROOT.glob("experiments/tutorials/*.py"))
WRITTEN = [
    path.relative_to(PAGES).as_posix()
    for path in sorted(PAGES.rglob("*.md"))
    if path.parent.name != "tutorials" and BLOCK.search(path.read_text())
]


def run(page, code, names):
    """Code with fewer steps, as in a program of a user's."""
    code = re.sub(r"range\(\d{3,}\)", "range(2)", code)
    code = re.sub(r"steps=\d{3,}\b", "steps=2", code)
    code = code.replace("num_simulations=10_000", "num_simulations=200, steps=2")
    code = code.replace("TabularFlow(steps=2)", "TabularFlow(width=16, num_blocks=1, steps=2)")
    with jax.numpy_rank_promotion("allow"):
        exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize("page", WRITTEN)
def test_page_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other."""
    monkeypatch.chdir(tmp_path)
    run(page, "\n".join(BLOCK.findall((PAGES / page).read_text())), {})


def test_the_readme_has_four_examples_of_eight_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, n = np.random.default_rng(0), 120
    people = pd.DataFrame({"sex": rng.choice(["F", "M"], n), "age": rng.integers(18, 80, n)})
    people.to_csv("people.csv", index=False)
    names = {
        "x": rng.normal(size=(300, 3)).astype(np.float32),
        "images": rng.uniform(-1, 1, (64, 8, 8, 1)).astype(np.float32),
        "simulator": lambda key, theta: theta + jax.random.normal(key, theta.shape),
        "observation": np.array([1.0, 0.5], np.float32),
    }
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert len(blocks) == 4
    for block in blocks:
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 8
        block = block.replace("TabularFlow()", "TabularFlow(steps=1000)")
        block = block.replace("simulator)", "simulator, num_simulations=10_000)")
        run("README.md", block, names)
    assert names["drawn"].shape == (10, 8, 8, 1) and names["theta"].shape == (1000, 2)
    assert (names["rows"]["sex"] == "F").all() and len(names["filled"]) == n


def test_the_first_block_takes_columns_in_any_units():
    """Three columns far apart in place of the moons: held-out rows end near the truth, after a
    quarter of the steps."""
    rng = np.random.default_rng(0)
    laws = scipy.stats.norm(5000, 100), scipy.stats.lognorm(1), scipy.stats.uniform()
    columns = np.stack([law.rvs(20_000, random_state=rng) for law in laws], axis=1)
    train, held_out = columns.astype(np.float32).reshape(2, 10_000, 3)
    block = BLOCK.findall((PAGES / "start.md").read_text())[0]
    block = block.replace("range(1000)", "range(250)").replace("(2,)", "(3,)")
    block = re.sub("rows = .*", "rows = {'x': columns}", block)
    names = {"columns": train}
    exec(compile(block, "start.md", "exec"), names)
    truth = sum(law.logpdf(held_out[:, i]) for i, law in enumerate(laws)).mean()
    found = jax.jit(names["flow"].log_prob)(names["state"].params, held_out).mean()
    assert truth - 0.3 < found < truth + 0.05


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_is_rendered_from_its_script(script):
    """The page has the script's code, and the pictures that it names."""
    page = (PAGES / f"tutorials/{script.stem}.md").read_text()
    cells = re.split(r"^# %%.*\n", script.read_text(), flags=re.MULTILINE)
    code = [cell.strip() for cell in cells if cell.strip() and not cell.startswith("# ")]
    assert [block.strip() for block in BLOCK.findall(page)] == code
    for picture in re.findall(r"\]\((\w+\.png)\)", page):
        assert (PAGES / "tutorials" / picture).exists()


def test_the_loss_of_ones_own_is_the_one_that_is_tested():
    tested = (ROOT / "tests/losses/test_own_loss.py").read_text()
    code = re.search(r"# From here\n(.*?)# to here", tested, re.DOTALL)[1].strip()
    assert code in (PAGES / "extending.md").read_text()


def test_links_of_the_readme_exist():
    for link in re.findall(r"\]\(([\w./]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
