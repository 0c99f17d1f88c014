"""The recipes say what runs."""

import dataclasses
import math
import re

import pytest
import yaml
from helpers import ROOT, load_script
from transformers import TrainingArguments

from modernalbert.configuration_modernalbert import PRESETS
from modernalbert.training.cli import parse_arguments


FILES = {path.stem: path for path in (ROOT / "recipes").glob("*.yaml")}
RECIPES = {name: path for name, path in FILES.items() if name in PRESETS}
# The stages of the checkpoints, with what each goes on from.
STAGES = {
    "modernalbert-nano-embed-elastic": "modernalbert-nano-embed",
    "modernalbert-nano-embed-sentences": "modernalbert-nano-embed-elastic",
    "modernalbert-nano-pairs": "modernalbert-nano-embed-elastic",
    "modernalbert-nano": "modernalbert-nano-pairs",
}
CHECKPOINTS = ("modernalbert-nano-embed", *STAGES)
PAPER = sorted(set(PRESETS) - {"nano"})


@pytest.fixture(scope="module")
def pretraining_arguments():
    return load_script("pretrain").PretrainingArguments


def test_every_preset_has_a_recipe():
    assert RECIPES.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", [*PRESETS, *CHECKPOINTS])
def test_recipes_are_arguments_of_the_script(name, pretraining_arguments):
    recipe = yaml.safe_load(FILES[name].read_text())
    fields = [field for kind in (pretraining_arguments, TrainingArguments) for field in dataclasses.fields(kind)]
    assert recipe.keys() <= {field.name for field in fields}
    numbers = {field.name for field in fields if field.type in (int, float)}
    assert all(isinstance(recipe[name], int | float) for name in numbers & recipe.keys())  # YAML reads 1e-6 as text
    recipe_of_cpu = ["--config", str(FILES[name]), "--bf16", "False", "--use_cpu", "True"]
    args, training_args = parse_arguments((pretraining_arguments, TrainingArguments), recipe_of_cpu)
    assert args.train_data == recipe["train_data"] and training_args.learning_rate == recipe["learning_rate"]
    assert training_args.save_strategy == recipe["save_strategy"]


@pytest.mark.parametrize("preset", PAPER)
def test_recipes_of_the_paper(preset):
    text = RECIPES[preset].read_text()
    recipe = yaml.safe_load(text)
    rows = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * 8
    assert rows == 1024
    assert recipe["max_steps"] * rows * recipe["max_length"] == pytest.approx(30e9, rel=0.02)
    assert recipe["teacher"].endswith("-large" if PRESETS[preset].get("hidden_size") == 1024 else "-base")
    assert recipe["model_name_or_path"] == f"runs/{preset}-init"
    commands = " ".join(line.strip("# \\") for line in text.splitlines() if line.startswith("#"))
    first = f"init_from_teacher.py --teacher {recipe['teacher']} --preset {preset} --output_dir runs/{preset}-init"
    assert first in commands and f"--config recipes/{preset}.yaml" in commands
    # The second stage keeps the tokens of a step.
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
    assert math.prod(int(re.search(rf"--{name} (\d+)", commands)[1]) for name in names) * 8 == 2**20


def test_recipe_of_nano_runs_on_a_cpu():
    recipe = yaml.safe_load(RECIPES["nano"].read_text())
    assert recipe["preset"] == "nano" and recipe["use_cpu"] is True and "teacher" not in recipe


def test_recipes_of_the_checkpoints_build_on_each_other():
    recipes = {name: yaml.safe_load(FILES[name].read_text()) for name in CHECKPOINTS}
    collection = yaml.safe_load(FILES["nano-texts"].read_text())
    texts = [f"runs/nano-texts/{name}.jsonl" for name in collection["texts"]]
    for name, recipe in recipes.items():
        assert recipe.get("model_name_or_path") == (f"runs/{STAGES[name]}" if name in STAGES else None)
        assert recipe["train_data"] == texts[: 4 if "pair_column" in recipe else 3]
        assert recipe["output_dir"] == f"runs/{name}" and f"--config recipes/{name}.yaml" in FILES[name].read_text()
    assert texts[3].endswith("/pairs.jsonl")
