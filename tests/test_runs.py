"""Arguments from recipes, and output folders that survive."""

import json
import logging
import os
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from modernalbert.training import runs as checkpoints
from modernalbert.training.cli import parse_arguments


@dataclass
class Job:
    name: str
    sizes: list[int] = field(default_factory=lambda: [1])
    fast: bool = False
    safe: bool = True
    rate: float = 0.5
    options: str = "{}"
    note: str | None = None


@dataclass
class Place:
    folder: str = "here"


@pytest.fixture
def parse(tmp_path):
    def parse(recipe, argv=(), defaults=None):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        return parse_arguments((Job, Place), ["--config", str(path), *argv], defaults)

    return parse


RECIPE = (
    "name: a\nsizes: [2, 3]\nfast: true\nsafe: false\nrate: 1e-3\noptions: {x: [1, null], y: 'z'}\nfolder: there\n"
)


def test_a_recipe_fills_the_arguments(parse):
    job, place = parse(RECIPE)
    assert job == Job("a", [2, 3], fast=True, safe=False, rate=1e-3, options=job.options)
    assert json.loads(job.options) == {"x": [1, None], "y": "z"} and place == Place("there")


def test_the_command_line_wins_over_a_recipe(parse):
    argv = [
        "--sizes",
        "5",
        "--fast",
        "False",
        "--safe",
        "--rate=2",
        "--folder",
        "else",
        "--name",
        "b",
        "--options",
        "1",
    ]
    job, place = parse(RECIPE, argv)
    assert job == Job("b", [5], fast=False, safe=True, rate=2.0, options="1") and place == Place("else")


def test_a_recipe_wins_over_defaults_and_those_over_the_dataclasses(parse):
    job, _ = parse("name: a\nrate: 3\n", defaults={"rate": 2, "fast": True, "sizes": [7]})
    assert job == Job("a", [7], fast=True, rate=3.0)
    job, _ = parse_arguments((Job, Place), ["--name", "b", "--rate", "4"], {"rate": 2, "fast": True})
    assert job == Job("b", fast=True, rate=4.0)


def test_null_in_a_recipe_leaves_the_dataclass_its_default(parse):
    assert parse("name: a\nnote: null\nrate: null\n")[0] == Job("a")


def test_an_empty_list_in_a_recipe_is_an_empty_list(parse):
    assert parse("name: a\nsizes: []\n")[0].sizes == []


def test_a_value_of_a_recipe_may_begin_with_a_dash(parse):
    assert parse("name: -a\n")[0].name == "-a"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("nmae: a\n", "there is no argument `nmae`; did you mean `name`?"),
        ("name: a\nzzzzzz: 1\n", "there is no argument `zzzzzz`$"),
        ("- name\n- a\n", "is no mapping of arguments, such as"),
        ("just words\n", "is no mapping of arguments, such as"),
        ("", "is no mapping of arguments, such as"),
    ],
)
def test_recipes_that_are_wrong_are_refused(parse, recipe, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse(recipe)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        parse_arguments((Job,), ["--config", str(tmp_path / "none.yaml")])


def make_checkpoint(folder, step, content=None, name=None):
    checkpoint = folder / (name or f"checkpoint-{step}")
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    content = json.dumps({"global_step": step, "log_history": []}) if content is None else content
    (checkpoint / "trainer_state.json").write_text(content)
    return checkpoint


def test_the_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert checkpoints.last_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    assert checkpoints.last_checkpoint(tmp_path) == newest
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10"}


@pytest.mark.parametrize("content", ["", '{"global_step": 1', "{}", "null"], ids=["empty", "cut", "fields", "null"])
def test_half_written_checkpoints_are_removed(tmp_path, content, caplog):
    complete = make_checkpoint(tmp_path, 9)
    make_checkpoint(tmp_path, 11, content)
    (make_checkpoint(tmp_path, 12) / "trainer_state.json").unlink()
    (tmp_path / "tokenizer").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_checkpoint(tmp_path) == complete
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "tokenizer"}
    assert "checkpoint-11" in caplog.text and "checkpoint-12" in caplog.text


def test_what_trainer_did_not_name_is_no_checkpoint(tmp_path):
    """A copy that somebody keeps is not removed, even without the state of a Trainer."""
    (make_checkpoint(tmp_path, 5, name="checkpoint-best") / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    assert checkpoints.last_checkpoint(tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-best", "checkpoint-notes.txt"}


def test_a_checkpoint_that_cannot_be_read_now_is_not_removed(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, 5)

    def fail(self, *args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.last_checkpoint(tmp_path)
    assert (tmp_path / "checkpoint-5" / "model.safetensors").exists()


def test_a_finished_run_is_not_written_over(tmp_path):
    folder = checkpoints.check_output_dir(tmp_path / "new" / "run")
    assert folder.is_dir() and list(folder.iterdir()) == []
    (folder / "other.txt").write_text("")
    assert checkpoints.check_output_dir(folder) == folder  # one that is not finished goes on
    (folder / checkpoints.RESULTS_NAME).write_text("{}")
    with pytest.raises(FileExistsError, match="run' holds a finished run .*choose another `output_dir` or remove it"):
        checkpoints.check_output_dir(folder)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(PermissionError, match="cannot write to '.*closed' .*choose another `output_dir`"):
        checkpoints.check_output_dir(folder)


@pytest.mark.parametrize(("place", "error"), [("file", FileExistsError), ("file/run", OSError)])
def test_a_file_in_the_folders_place_is_refused(tmp_path, place, error):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(error, match="choose another `output_dir`"):
        checkpoints.check_output_dir(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_too_little_space_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(10**12, 0, 2 * 10**9))
    checkpoints.check_output_dir(tmp_path, 2 * 10**9)
    with pytest.raises(OSError, match="needs 3.5 GB and has 2.0 GB free; make room"):
        checkpoints.check_output_dir(tmp_path, 35 * 10**8)


def test_other_arguments_are_refused_once_there_are_checkpoints(tmp_path):
    first = {"train_data": ["a.txt"], "max_length": 128, "teacher": None, "weights": (1, 2)}
    checkpoints.same_run(tmp_path, first)
    changed = {**first, "max_length": 256}
    checkpoints.same_run(tmp_path, changed)  # nothing was trained yet
    make_checkpoint(tmp_path, 5)
    checkpoints.same_run(tmp_path, {**changed, "new_and_unset": None})
    with pytest.raises(
        ValueError, match=r"other arguments \(max_length: 256 before, 128 now\); give the same command"
    ):
        checkpoints.same_run(tmp_path, first)
    checkpoints.same_run(tmp_path, changed)  # what was refused was not kept


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "card.md"
    checkpoints.write_text(path, "öld")
    assert path.read_text(encoding="utf-8") == "öld" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        checkpoints.write_text(path, "new \ud800")
    monkeypatch.setattr(checkpoints.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        checkpoints.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "öld" and list(tmp_path.iterdir()) == [path]


def test_files_are_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "kept").write_text("kept")

    def write(folder, fails=False):
        (folder / "a").write_text("new")
        if fails:
            raise RuntimeError("disk gone")
        (folder / "b").write_text("new")

    with pytest.raises(RuntimeError, match="disk gone"):
        checkpoints.write_files(tmp_path, lambda folder: write(folder, fails=True))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "kept": "kept"}
    checkpoints.write_files(tmp_path, write)
    contents = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert contents == {"a": "new", "b": "new", "kept": "kept"}
