"""Every script there is: what a user can fix is one line and exit code 2, without a stack."""

import re
import runpy
import signal
import sys

import pytest
from helpers import SCRIPTS

from modernalbert.training.cli import run_script


SCRIPT_NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))
LOGGED = re.compile(r"\d{4}-\d{2}-\d{2} |WARNING|INFO|\s*$|.*\d+%\|")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as Python does; gives its exit code, and what it wrote to stderr beside the log."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.syspath_prepend(str(SCRIPTS))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        return ended.value.code, [line for line in capsys.readouterr().err.splitlines() if not LOGGED.match(line)]

    return run


def check_refused(result, message=""):
    code, lines = result
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and re.search(message, lines[0]), lines


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_arguments_that_are_wrong_are_one_line(run, name, tmp_path):
    check_refused(run(name, "--no_such_argument", "1"), "--no_such_argument|arguments are required")
    (tmp_path / "recipe.yaml").write_text("a: 1\na: 2\n")
    check_refused(run(name, "--config", str(tmp_path / "recipe.yaml")), "given twice|--config|arguments are required")


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_files_that_are_not_there_are_one_line(run, name, tmp_path):
    (tmp_path / "file").write_text("mine")
    arguments = ["--output_dir", str(tmp_path / "file")]
    _, lines = run(name, *arguments, "--no_such_argument", "1")
    if required := re.search(r"arguments are required: ([^;]*)", lines[0]):
        for names in required[1].split(", "):
            arguments += [names.split("/")[0], str(tmp_path / "none.jsonl")]
    check_refused(run(name, *arguments))
    assert (tmp_path / "file").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["file"]


def failing(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize("error", [ValueError("a\n- b"), FileNotFoundError("a - b"), ImportError("a - b")], ids=repr)
@pytest.mark.parametrize("debug", ["no", "argument", "environment"])
def test_a_mistake_of_the_user_is_one_line_and_its_stack_on_demand(monkeypatch, capsys, error, debug):
    monkeypatch.setattr(sys, "argv", ["x.py", "--rate", "1", *(["--debug"] if debug == "argument" else [])])
    monkeypatch.setenv("MODERNALBERT_DEBUG", "1" if debug == "environment" else "")
    with pytest.raises(SystemExit if debug == "no" else type(error)) as ended:
        run_script(failing(error))
    if debug == "no":
        assert ended.value.code == 2 and capsys.readouterr().err == "error: a - b\n"


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("a"), RuntimeError("a"), AssertionError("a")], ids=repr)
def test_a_bug_shows_its_stack(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(type(error)):
        run_script(failing(error))


def test_trainers_own_debug_argument_is_left_to_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--debug", "underflow_overflow", "--a", "1"])
    seen = []
    run_script(seen.extend)
    assert seen == ["--debug", "underflow_overflow", "--a", "1"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_script_with_its_code_after_cleaning_up(monkeypatch, tmp_path, number, code):
    monkeypatch.setattr(sys, "argv", ["x.py"])

    def main(argv):
        try:
            signal.raise_signal(number)
        finally:
            (tmp_path / "cleaned").touch()

    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in background jobs
    try:
        with pytest.raises(SystemExit) as ended:
            run_script(main)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert ended.value.code == code and (tmp_path / "cleaned").exists() and signal.getsignal(signal.SIGTERM) == before
