"""The public names of jflow as the site's hooks read them, without importing it."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[1] / "docs/hooks.py"
_SPEC = importlib.util.spec_from_file_location("site_hooks_of_docs", _PATH)
hooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hooks)
NAMED = hooks.NAMED
