"""Arguments from recipes, and output folders that survive."""

import json
import logging
import os
import signal
import time
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

from modernalbert.training import cli
from modernalbert.training import runs as checkpoints
from modernalbert.training.cli import Count, Positive, Share, parse_arguments, parse_json


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
        ("name: a\nname: b\n", "`name` is given twice"),
        ("name: a\noptions: {x: 1, x: 2}\n", "`x` is given twice"),
        ("name: [a\n", "cannot read the recipe"),
        ("name: a\nsizes: [1, null]\n", "must be a list of plain values"),
        ("name: a\nsizes: [1:30]\n", "invalid int value: '1:30'"),
        ("name: a\nrate: nan\n", "must be a finite number"),
    ],
)
def test_recipes_that_are_wrong_are_refused(parse, recipe, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("[", r"\[")):
        parse(recipe)


def test_values_of_a_recipe_are_read_exactly(parse):
    job, place = parse("name: no\nsizes: [010, 1_0]\nfolder: 0123\noptions: {a: 010, b: on, c: true, d: 2020-01-01}\n")
    assert job.name == "no" and place.folder == "0123" and job.sizes == [10, 10]
    assert json.loads(job.options) == {"a": "010", "b": "on", "c": True, "d": "2020-01-01"}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "there is no recipe '.*recipe.yaml'"),
        ("folder", FileNotFoundError, "there is no recipe '.*recipe.yaml', but a folder"),
        (b"name: caf\xe9\n", ValueError, "'.*recipe.yaml' is not UTF-8 .byte 9.; save it as UTF-8"),
    ],
    ids=["missing", "folder", "latin-1"],
)
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path, content, error, message):
    path = tmp_path / "recipe.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        parse_arguments((Job,), ["--config", str(path)])


def make_checkpoint(folder, step, content=None, name=None):
    checkpoint = folder / (name or f"checkpoint-{step}")
    checkpoint.mkdir(parents=True)
    save_file({"a": torch.zeros(300)}, checkpoint / "model.safetensors")
    for part in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"a": torch.zeros(300)}, checkpoint / part)
    content = json.dumps({"global_step": step, "log_history": []}) if content is None else content
    (checkpoint / "trainer_state.json").write_text(content)
    return checkpoint


PARTS = {
    "model.safetensors": "weights",
    "optimizer.pt": "optimizer",
    "scheduler.pt": "scheduler",
    "rng_state.pth": "random state",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_an_older_whole_checkpoint_takes_the_place_of_a_damaged_one(tmp_path, part, damage, caplog):
    older = make_checkpoint(tmp_path, 9)
    path = make_checkpoint(tmp_path, 10) / part
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif part == "model.safetensors":
        path.write_bytes(content[:20] + b"\xff" + content[21:])  # the header; values have no checksum
    else:
        path.write_bytes(
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        )
    assert checkpoints.last_checkpoint(tmp_path) == older
    said = f"lacks its {PARTS[part]}" if damage == "lost" else f"has a damaged {part}"
    assert f"checkpoint-10' {said}" in caplog.text and f"going on from the older '{older}'" in caplog.text
    assert path.parent.exists()  # somebody may restore it
    (older / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=f"no whole checkpoint to go on from .checkpoint-10 {said}; checkpoint-9 lacks"
    ):
        checkpoints.last_checkpoint(tmp_path)


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


@dataclass
class Numbers:
    """Of each kind of bounds."""

    count: Count = 1
    share: Share | None = None
    rates: list[Positive] = field(default_factory=list)
    plain: float = 0.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--count 0", r"`count` \(0\) must be at least 1"),
        ("--count 10000000000", r"`count` \(1e\+10\) must be at least 1 and at most 1e\+09"),
        ("--share 1", r"`share` \(1\) must be above 0 and below 1"),
        ("--rates 1 0", r"`rates` \(0\) must be above 0"),
        ("--plain nan", r"`plain` \(nan\) must be a finite number"),
        ("--rates 1 inf", r"`rates` \(inf\) must be a finite number"),
        ("--per_device_train_batch_size 0", "`per_device_train_batch_size` .0. must be at least 1"),
        ("--per_device_eval_batch_size 0", "`per_device_eval_batch_size` .0. must be at least 1"),
        ("--gradient_accumulation_steps 0", "`gradient_accumulation_steps` .0. must be at least 1"),
        ("--num_train_epochs 0", "`num_train_epochs` .0. must be above 0"),
        ("--num_train_epochs -1", "`num_train_epochs` .-1. must be above 0"),
        ("--max_steps 0", "`max_steps` .0. must be at least 1, or -1"),
        ("--learning_rate nan", "`learning_rate` .nan. must be a finite number"),
        ("--learning_rate -1", "`learning_rate` .-1. must be above 0"),
        ("--adam_beta2 1", "`adam_beta2` .1. must be at least 0 and below 1"),
        ("--seed -1", "`seed` .-1. must be at least 0"),
        ("--resume_from_checkpoint x", "`resume_from_checkpoint` cannot be 'x' here: the same command goes on"),
        ("--push_to_hub", "`push_to_hub` cannot be True here: it would upload checkpoints"),
        ("--data_seed 3 --prediction_loss_only true", "`prediction_loss_only` cannot be True here: it says so"),
        ("--learning_rte 1", "there is no argument `--learning_rte`; did you mean `--learning_rate`"),
        ("--learning_rate x", "argument --learning_rate.*: invalid float value: 'x'; `--help` lists"),
        ("--save_strategy best --metric_for_best_model loss", "`save_strategy best` needs evaluations"),
        ('--lr_scheduler_kwargs {"foo":1}', "no `lr_scheduler_kwargs` of `linear` `foo`"),
        ('--lr_scheduler_kwargs {"foo"', "an argument is no JSON"),
        ('--accelerator_config {"foo":1}', "an argument has a key .* 'foo'"),
        ("--optim_args foo", r"`optim_args` \(foo\) must be `name=value`"),
        ("--coun 1", "there is no argument `--coun`; did you mean `--count`"),
    ],
)
def test_an_argument_is_obeyed_or_refused(tmp_path, argv, message):
    fixed = {"prediction_loss_only": (False, "it says so")}
    given = ["--output_dir", str(tmp_path), "--use_cpu", "true", *argv.split()]
    with pytest.raises(ValueError, match=message):
        parse_arguments((Numbers, TrainingArguments), given, fixed=fixed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "`options` is no JSON"),
        ("[1]", "must be a JSON object"),
        ('{"a": 1, "a": 2}', r"a key of \['a', 'a'\] is given twice"),
    ],
)
def test_json_on_the_command_line_is_an_object_with_each_key_once(text, message):
    assert parse_json("options", '{"a": {"b": 1}}') == {"a": {"b": 1}}
    with pytest.raises(ValueError, match=message):
        parse_json("options", text)


CHANGES = {"data_seed": 7, "learning_rate": 1.0, "per_device_train_batch_size": 3, "neftune_noise_alpha": 1.0}
WITHOUT_EFFECT = {"logging_steps": 7, "save_steps": 7, "per_device_eval_batch_size": 3, "disable_tqdm": True}


def make_settings(folder, **changes):
    args = TrainingArguments(**{"output_dir": str(folder), "use_cpu": True, "report_to": "none", **changes})
    return checkpoints.run_settings(Job("a"), args, without=["note"], name="a 1234")


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "checkpoints"])
def test_only_what_has_no_effect_may_change(tmp_path, finished):
    assert checkpoints.start_run(tmp_path, make_settings(tmp_path, data_seed=1)) is None
    assert checkpoints.start_run(tmp_path, make_settings(tmp_path)) is None  # nothing was trained yet
    make_checkpoint(tmp_path, 5)
    if finished:
        checkpoints.write_json(tmp_path / "results.json", {"scores": 1})
    expected = {"scores": 1} if finished else None
    for name, value in WITHOUT_EFFECT.items():
        assert checkpoints.start_run(tmp_path, make_settings(tmp_path, **{name: value})) == expected
    for name, value in CHANGES.items():
        held = "a finished run" if finished else "checkpoints of a run"
        with pytest.raises(ValueError, match=f"holds {held} with other settings .{name}: .* before, {value} now"):
            checkpoints.start_run(tmp_path, make_settings(tmp_path, **{name: value}))
    with pytest.raises(ValueError, match="other settings .new: None before, 1 now"):
        checkpoints.start_run(tmp_path, {**make_settings(tmp_path), "new": 1})
    assert checkpoints.start_run(tmp_path, make_settings(tmp_path)) == expected  # what was refused was not kept


def test_saving_counts_where_it_chooses_the_best_checkpoint(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5}
    one, other = (make_settings(tmp_path, **best, save_steps=steps) for steps in (5, 10))
    assert one != other and make_settings(tmp_path, save_steps=5) == make_settings(tmp_path, save_steps=10)


def test_each_process_needs_its_random_state(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path, 5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        with pytest.raises(ValueError, match="checkpoint-5 lacks its random state"):
            checkpoints.last_checkpoint(tmp_path)
        torch.save({}, checkpoint / name)
    assert checkpoints.last_checkpoint(tmp_path) == checkpoint


def test_a_model_is_its_whole_content(tmp_path):
    model = make_checkpoint(tmp_path, 1, name="model")
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    seen = {checkpoints.describe_model(model)}
    for name in ("model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json"):
        (model / name).write_bytes((model / name).read_bytes() + b" ")
        seen.add(checkpoints.describe_model(model))
    assert len(seen) == 5 and all(name.startswith("model ") for name in seen)
    (model / "README.md").write_text("a card")
    assert checkpoints.describe_model(model) in seen and checkpoints.describe_model("org/model") == "org/model"


@pytest.mark.parametrize("place", [".", "inside"])
def test_a_run_is_not_written_into_its_model(tmp_path, place):
    make_checkpoint(tmp_path, 1, name="model")
    with pytest.raises(FileExistsError, match="would be written over or into the model '.*model'; choose another"):
        checkpoints.start_run(tmp_path / "model" / place, {}, sources=[tmp_path / "model"])
    with pytest.raises(FileExistsError, match="would be written over"):
        checkpoints.check_output_dir(tmp_path, sources=[make_checkpoint(tmp_path, 2)])
    checkpoints.check_output_dir(tmp_path / "model-glue", sources=[tmp_path / "model", "org/model"])


def test_two_processes_do_not_share_a_folder(tmp_path):
    held, hold = os.pipe()
    if (other := os.fork()) == 0:
        checkpoints.lock_folder(tmp_path)
        os.write(hold, b"x")
        time.sleep(600)
    try:
        os.read(held, 1)
        with pytest.raises(BlockingIOError, match="another process is at work in"):
            checkpoints.start_run(tmp_path, {})
        assert not (tmp_path / "arguments.json").exists()
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    assert checkpoints.start_run(tmp_path, {}) is None


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".draft-abc").mkdir()
    (tmp_path / ".draft-results.json-abc").write_text("{")
    checkpoints.start_run(tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "arguments.json"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        checkpoints.write_json(tmp_path / "a.json", {})
        checkpoints.write_files(tmp_path, lambda draft: (draft / "b").mkdir() or (draft / "b" / "c").write_text(""))
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("a.json", "b", "b/c")}
    assert modes == {"a.json": 0o666 & ~umask, "b": 0o777 & ~umask, "b/c": 0o666 & ~umask}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_no_file_holds_a_number_that_is_not_finite(tmp_path, number):
    with pytest.raises(ValueError, match="scores.f1.1 of 'results.json' is no finite number; nothing was written"):
        checkpoints.write_json(tmp_path / "results.json", {"scores": {"f1": [1.0, number]}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_unknown_settings_is_refused(tmp_path, finished):
    make_checkpoint(tmp_path, 5)
    if finished:
        (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="holds .* and no arguments.json, which says what it was made with"):
        checkpoints.start_run(tmp_path, {})


def test_a_damaged_file_of_a_run_is_named(tmp_path):
    (tmp_path / "results.json").write_text("{")
    (tmp_path / "arguments.json").write_text("{}")
    with pytest.raises(ValueError, match="results.json' is damaged .*; remove its folder"):
        checkpoints.start_run(tmp_path, {})


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


@pytest.mark.parametrize("emulated", [True, False])
def test_bf16_on_a_cpu_without_it_is_warned_of(monkeypatch, tmp_path, caplog, emulated):
    monkeypatch.setattr(cli, "emulates_bf16", lambda: emulated)
    parse_arguments((TrainingArguments,), ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "true"])
    assert ("`--bf16 false`" in caplog.text) == emulated
