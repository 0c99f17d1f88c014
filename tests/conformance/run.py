"""Runs transformers' own tests of a model on ours and on ModernBERT, side by side.

    python tests/conformance/run.py [PART OF A NAME ...]

The tests come from the source distribution of the installed transformers, which is fetched once into `.cache/`. Fails
where a test of ours fails, or is skipped although ModernBERT passes it.
"""

# ruff: noqa: T201

import os
import subprocess
import sys
import tarfile
import unittest
from collections import Counter
from importlib.metadata import version
from pathlib import Path


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "conformance" / version("transformers")
# What the tests import and the distribution leaves out: tests of generation and export, and sample settings.
MISSING = {
    "__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False, "output_hidden_states": True, "dtype": "float16", "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"], "id2label": {0: "label"}, "label2id": {"label": 0}, "problem_type": "regression",
}
""",
}


def fetch_tests() -> None:
    if (CACHE / "tests" / "__init__.py").exists():
        return
    options = ["--no-deps", "--no-binary", ":all:", "--dest", str(CACHE)]
    package = f"transformers=={version('transformers')}"
    subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
    with tarfile.open(next(CACHE.glob("transformers-*.tar.gz"))) as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            if member.name.startswith("tests/"):
                archive.extract(member, CACHE, filter="data")
    for name, text in reversed(MISSING.items()):  # the file that says it is complete comes last
        path = CACHE / "tests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def run_test(test: unittest.TestCase) -> tuple[str, str]:
    """Outcome and reason. A test of which any part was skipped counts as skipped."""
    result = unittest.TestResult()
    result.buffer = True
    unittest.TestSuite([test]).run(result)
    for outcome, found in (("failed", result.failures + result.errors), ("skipped", result.skipped)):
        if found:
            return outcome, found[0][1]
    return "passed", ""


def main(parts: list[str]) -> int:
    fetch_tests()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(CACHE))
    from cases import MODERNBERT, OURS
    from transformers.utils import logging

    logging.disable_default_handler()
    columns = OURS | MODERNBERT
    names = unittest.defaultTestLoader.getTestCaseNames(*MODERNBERT.values())
    names = [name for name in names if not parts or any(part in name for part in parts)]
    width = max(map(len, names)) + 2
    print("test".ljust(width), *(column.ljust(10) for column in columns))

    counts, skips, adapted, problems = Counter(), Counter(), {}, []
    for name in names:
        found = {column: run_test(case(name)) for column, case in columns.items()}
        expected = found[next(iter(MODERNBERT))][0]
        mark = ""
        for column, case in OURS.items():
            outcome, reason = found[column]
            if outcome == "failed" or (outcome == "skipped" and expected == "passed"):
                problems.append(f"{column}: {name} {outcome}\n{reason}")
            if outcome == "skipped":
                skips[reason] += 1
            why = next((why for start, (why, _) in case.adapted.items() if name.startswith(start)), None)
            if why:
                mark, adapted[name] = "*", why
        counts.update((column, outcome) for column, (outcome, _) in found.items())
        print((name + mark).ljust(width), *(outcome.ljust(10) for outcome, _ in found.values()), flush=True)

    for outcome in ("passed", "skipped", "failed"):
        print(outcome.ljust(width), *(str(counts[column, outcome]).ljust(10) for column in columns))
    print("\nSkipped by the library, of ours:")
    print(*(f"{count:4} {reason}" for reason, count in skips.most_common()), sep="\n")
    print("\n* adapted, where we differ on purpose:")
    print(*(f"     {name}: {why}" for name, why in adapted.items()), sep="\n")
    print(f"\n{len(problems)} problems", *problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
