"""docs/rename.py: files of an older jflow carried over to today's names."""

import runpy
import subprocess
import sys
from pathlib import Path

import jflow

ROOT = Path(jflow.__file__).parents[1]
SCRIPT = ROOT / "docs" / "rename.py"
OLD = '''"""By `fewstep.mean_flow` and couplings.exact."""
import jflow
from jflow import couplings as c, fewstep, flows, solvers
from jflow.train import Experiment

def draw(couplings, velocity, params, x0):
    """`couplings` is an argument here, not the package."""
    model = jflow.fewstep.to_data(velocity)
    x, info = fewstep.sample(model, params, x0)
    return couplings.exact, c.exact(), solvers.walk, info

flow = flows.tarflow((4, 4, 1), blocks=2, layers=1)
'''
NEW = '''"""By `losses.mean_flow` and couplings.optimal_transport."""
import jflow
from jflow import couplings as c, flows, solvers
from jflow.apps import Experiment

def draw(couplings, velocity, params, x0):
    """`couplings` is an argument here, not the package."""
    model = jflow.solvers.consistency_map(velocity)
    x, info = solvers.sample_flow_map(model, params, x0)
    return couplings.exact, c.optimal_transport(), solvers.sample_sde, info

flow = flows.tarflow((4, 4, 1), depth=2, num_layers=1)
'''


def carry(*paths):
    return subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True)


def test_a_file_and_a_page_are_carried_over(tmp_path):
    (tmp_path / "a.py").write_text(OLD)
    (tmp_path / "a.md").write_text(f"# By `fewstep.mean_flow`\n\n```python\n{OLD}```\n")
    done = carry(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.py").read_text() == NEW
    page = (tmp_path / "a.md").read_text()
    assert page.startswith("# By `losses.mean_flow`") and "solvers.sample_flow_map(model" in page
    again = carry(tmp_path)
    assert again.returncode == 0 and not again.stdout


def test_every_new_name_is_there():
    table = runpy.run_path(str(SCRIPT))["read_table"](ROOT / "docs" / "renames.tsv")[0]
    assert len(table) > 150
    for old, new in table.items():
        at, parts = jflow, new.split(".")[1:] if new else []
        for part in parts:
            at = getattr(at, part)
        assert old != new


def test_what_is_gone_is_reported(tmp_path):
    (tmp_path / "a.py").write_text("from jflow import fewstep\n\nfewstep.no_such_thing()\n")
    done = carry(tmp_path)
    assert done.returncode == 1 and "line 3: jflow.fewstep.no_such_thing is gone" in done.stderr


def test_the_distribution_has_another_name_than_the_import():
    """`jflow` on PyPI is another project, whose extras a newcomer would install."""
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    texts = [
        (name, (ROOT / name).read_text(errors="ignore"))
        for name in files
        if not name.endswith("test_rename.py")
    ]
    extras = [f"{quote}jflow[" for quote in ("install ", "'", '"', "`")]
    assert not [name for name, text in texts if any(extra in text for extra in extras)]
    assert any("jflow-models[" in text for _, text in texts)
