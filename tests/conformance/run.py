"""Runs the tests that transformers has for its own models on ours, and beside them on ModernBERT.

    python tests/conformance/run.py [TEST ...]

They come from the source distribution of the installed transformers, fetched once into `.cache/`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import unittest
from collections import Counter
from pathlib import Path

import transformers


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "conformance" / transformers.__version__
# What the distribution leaves out and the tests import.
MISSING = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'dtype': 'float16',\n"
        "    'chunk_size_feed_forward': 5, 'id2label': {0: 'label'}, 'label2id': {'label': 0},\n"
        "    'architectures': ['BertModel'], 'problem_type': 'regression'}\n"
    ),
}


def fetch_tests() -> None:
    if (CACHE / "tests").is_dir():
        return
    if not any(CACHE.glob("*.tar.gz")):
        pass

    with tarfile.open(next(CACHE.glob("*.tar.gz"))) as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            if member.name.startswith("tests/"):
                archive.extract(member, CACHE, filter="data")
    for name, text in MISSING.items():
        path = CACHE / "tests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


class Statuses(unittest.TestResult):
    """Status of every test by its name. Skipped where any part of it was."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def stopTest(self, test):
        super().stopTest(test)

    def note(self, test, status, reason=""):
        test = getattr(test, "test_case", test)
        ...
