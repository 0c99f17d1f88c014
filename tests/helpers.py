"""What several test modules need: where things lie, and scripts as modules."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import modernalbert


ROOT = Path(modernalbert.__file__).parent
SCRIPTS = ROOT / "scripts"
BENCHMARKS = ROOT / "benchmarks"
# Real rows, laid out as on the Hub; the few tests that look at some are skipped where there are none.
DATA = Path(os.environ.get("MODERNALBERT_DATA") or ROOT.parent / "shared" / "data")


def load_script(name: str, folder: Path = SCRIPTS) -> ModuleType:
    """A script as a module; it finds the files beside it, as when Python runs it."""
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))
