"""What a run leaves to read: the HTML report, the model card; and the recipes that say what runs."""

import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, load_script
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import TrainingArguments

import modernalbert
from modernalbert.configuration_modernalbert import PRESETS
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.cli import parse_arguments
from modernalbert.training.export import cards
from modernalbert.training.export.cards import PretrainingFacts, clean, environment, hub_id, write_card
from modernalbert.training.reports import curves as report
from modernalbert.training.reports.curves import write_report


RECIPES = {path.stem: path for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in ("fsdp", "glue")}
PAPER = sorted(set(PRESETS) - {"nano"})


def training_log(steps=range(10, 60, 10)):
    log = []
    for step in steps:
        losses = {"loss": 9 / step, "mlm_loss": 5 / step, "kl_loss": 1 / step, "hidden_loss": 0.1, "aux_loss": 1.0}
        speed = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 2048 * step, "tokens_per_second": 9e3, "mfu": 0.41}
        loads = {f"expert_load/group_{group}/expert_{expert}": 0.25 for group in (4, 5) for expert in range(4)}
        entropies = {f"router_entropy/group_{group}": 0.9 for group in (4, 5)}
        log.append({"step": step, "epoch": 0.1, **losses, **speed, **loads, **entropies})
    return [*log, {"step": log[-1]["step"], "eval_loss": 3.25, "eval_runtime": 1.0}]


class Text(html.parser.HTMLParser):
    """Collects the texts of a page by the element they are in."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts = [], {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def read_report(folder, log, title="A run", facts=None):
    write_report(folder / "report.html", log, title, facts or {})
    return (folder / "report.html").read_text()


def rows_of(page):
    return dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td>", page))


def test_report_shows_every_curve(tmp_path):
    log = training_log()
    page = read_report(tmp_path, log, facts={"seed": "7"})
    text = Text(page).texts
    titles = {"losses", "learning rate", "tokens per second, MFU 41.0% (median)", "gradient norm"}
    titles |= {"router entropy, 1 = uniform", "expert load, group_4", "expert load, group_5"}
    assert titles <= set(text["text"])
    assert {"loss", "mlm_loss", "kl_loss", "hidden_loss", "aux_loss", "eval_loss", "even"} <= set(text["text"])
    assert text["text"].count("expert_3") == 2 and text["text"].count("group_5") == 1
    assert text["h1"] == ["A run"]
    rows = rows_of(page)
    assert rows["seed"] == "7" and rows["eval_loss"] == "3.25" and rows["tokens"] == str(2048 * 50)
    assert {name for entry in log for name in entry} - {"step", "epoch"} <= set(rows)


def test_report_needs_no_network(tmp_path):
    page = read_report(tmp_path, training_log())
    assert re.sub(r'xmlns(:\w+)?="[^"]*"', "", page).count("http") == 0
    assert not re.search(r"<(script|link|img|image)\b|@import|base64|\bsrc=", page)
    assert set(re.findall(r'href="(.)', page)) == {"#"}


def test_report_follows_the_color_of_the_page(tmp_path):
    page = read_report(tmp_path, training_log())
    assert "currentColor" in page and report.INK not in page
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_panels_without_data_are_left_out(tmp_path):
    page = read_report(tmp_path, [{"step": 1, "loss": 2.0}, {"loss": 1.0}, {"step": 2, "tflops": 3.0, "note": "text"}])
    titles = Text(page).texts["text"]
    assert "losses" in titles and not any("expert" in title or "tokens" in title for title in titles)
    assert "Nothing was logged yet" in read_report(tmp_path, [])


def test_report_survives_what_is_not_finite(tmp_path):
    log = [{"step": step, "loss": value} for step, value in enumerate((2.0, math.nan, math.inf, -math.inf, 1.5))]
    log += [{"step": 9, "grad_norm": math.nan, "mfu": math.nan, "tokens_per_second": 5}]
    page = read_report(tmp_path, log)
    assert rows_of(page)["loss"] == "1.5" and rows_of(page)["grad_norm"] == "nan"
    assert "tokens per second" in Text(page).texts["text"]


def test_a_resumed_run_counts_once():
    log = [{"step": step, "loss": 1.0} for step in (1, 2, 3)] + [{"step": step, "loss": 5.0} for step in (2, 3, 4)]
    assert report.read_curves(log) == {"loss": ((1, 2, 3, 4), (1.0, 5.0, 5.0, 5.0))}


def test_long_runs_make_small_reports(tmp_path):
    page = read_report(tmp_path, training_log(range(1, 5001)))
    assert len(page) < 1_000_000
    steps, values = report.thin((range(1, 5001), range(1, 5001)))
    assert len(steps) <= report.MAX_POINTS and steps == values and sum(steps) / len(steps) == 2500.5


def test_report_escapes(tmp_path):
    log = [{"step": 1, "eval_<b>$x_1$_loss": 1.0, "loss": 1.0}]
    page = read_report(tmp_path, log, "<script>alert()</script>", {"<i>": "a & <b>"})
    assert "<script" not in page and "<i>" not in page and "<b>" not in page
    assert rows_of(page)["&lt;i&gt;"] == "a &amp; &lt;b&gt;"
    assert "eval_<b>$x_1$_loss" in Text(page).texts["text"]


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    page = read_report(tmp_path, training_log())

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        read_report(tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == page


@pytest.fixture
def facts():
    return PretrainingFacts(
        name="someone/modernalbert-tiny",
        preset="tiny",
        config=modernalbert.ModernAlbertConfig.preset("tiny"),
        tokenizer="answerdotai/ModernBERT-base",
        recipe={"learning_rate": 3.8e-4, "train_data": ["/srv/jane/c4/*.jsonl"], "hub_token": "secret"},
        data=["HuggingFaceFW/fineweb-edu:sample-100BT", "HuggingFaceFW/fineweb-edu", "/srv/jane/c4/part.jsonl"],
        tokens=30_000_000_000,
        max_length=1024,
        mlm_probability=0.3,
        precision="bf16",
        seconds=3723.0,
        train_losses={"mlm_loss": 2.0, "kl_loss": math.nan},
        eval_losses={
            "Salesforce/wikitext:wikitext-103-raw-v1": 2.5,
            "/srv/jane/mine.jsonl": 3.0,
            "a/b": math.nan,
            "c/d": 1e3,
        },
        validation_split="validation",
        teacher="answerdotai/ModernBERT-base",
        initialised_from="answerdotai/ModernBERT-base",
    )


def test_card_metadata_obeys_the_hub(tmp_path, facts):
    path = write_card(tmp_path, facts)
    card = ModelCard.load(path)
    metadata = yaml.safe_load(path.read_text().split("---\n")[1])
    assert card.data.to_dict() == metadata
    assert metadata["license"] == "apache-2.0" and metadata["language"] == ["en"]
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "fill-mask"
    assert metadata["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    assert metadata["base_model"] == "answerdotai/ModernBERT-base"
    assert {"modernalbert", "recursive-transformer", "mixture-of-loras", "distillation"} <= set(metadata["tags"])
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "modernalbert-tiny"
    assert {result.dataset_type for result in results} == {"Salesforce/wikitext"}
    assert {result.metric_type: result.metric_value for result in results} == {
        "loss": 2.5,
        "perplexity": pytest.approx(math.exp(2.5), abs=1e-4),
    }
    assert all(result.dataset_split == "validation" and result.dataset_name for result in results)
    assert all(result.dataset_config == "wikitext-103-raw-v1" for result in results)


def test_card_says_what_was_done(tmp_path, facts):
    text = ModelCard.load(write_card(tmp_path, facts)).text
    for part in (
        *("30,000,000,000", "14 run, with the weights of 7 groups", "groups 5, 6", "8 experts of rank 16", "takes 2"),
        *("1 h 02 min", "| mlm_loss | 2.0000 |", "| kl_loss | nan |", "| 2.5000 | 12.18 |", "bf16", "2512.12880"),
        *(
            "| nan | nan |",
            "| 1000.0000 | inf |",
            "not the\npaper's weights",
            "learning_rate: 0.00038",
            f"| commit | {environment()['commit']} |",
        ),
    ):
        assert part in text, part
    assert "{{" not in text and "{%" not in text and "None" not in text and "\n\n\n" not in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "of which a token takes 2, router `top_k`"),
        ({"router_type": "soft"}, "8 experts of rank 16, router `soft`"),
        ({"ffn_modulation": "moa"}, "with a mixture of adapters in the shared"),
        ({"ffn_modulation": "depth_lora"}, "| LoRA for every depth | groups 5, 6 (from 0): rank 16 |"),
        ({"ffn_modulation": "none"}, "share weights in groups. Pretrained"),
    ],
)
def test_card_names_what_modulates_the_shared_layers(tmp_path, facts, fields, said):
    config = modernalbert.ModernAlbertConfig.preset("tiny", **fields)
    text = ModelCard.load(write_card(tmp_path, dataclasses.replace(facts, config=config))).text
    routed = config.ffn_modulation == "mol"
    assert said in text and ("Mixture of LoRAs |" in text) == ("merge_experts" in text) == routed


def test_card_of_a_run_without_anything_optional(tmp_path, facts):
    nothing = {"teacher": None, "initialised_from": None, "eval_losses": {}, "train_losses": {}, "preset": None}
    config = modernalbert.ModernAlbertConfig.preset("tiny", num_experts=0)
    bare = dataclasses.replace(facts, data=["data/*.jsonl"], name="runs/mine", config=config, **nothing)
    card = ModelCard.load(write_card(tmp_path, bare))
    assert not {"base_model", "datasets", "model-index", "model_name"} & card.data.to_dict().keys()
    assert "merge_experts" not in card.text and "Not evaluated" in card.text and "`None`" not in card.text


def test_card_names_no_folder_of_this_machine(tmp_path, facts):
    start = tmp_path / "jane" / "init"
    start.mkdir(parents=True)
    (start / "initialization.json").write_text(json.dumps({"teacher": "answerdotai/ModernBERT-large"}))
    local = {"teacher": "~/jane/teacher", "initialised_from": str(start), "name": str(tmp_path / "jane" / "model")}
    path = write_card(tmp_path, dataclasses.replace(facts, **local))
    assert not re.search(r"jane|secret|" + re.escape(str(tmp_path)), path.read_text())
    assert "`init`, made from `answerdotai/ModernBERT-large`" in path.read_text()
    assert ModelCard.load(path).data.base_model == "answerdotai/ModernBERT-large"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/srv/jane/data/", "data"),
        ("/srv/jane doe/data", "data"),
        ("~/data/a.jsonl", "a.jsonl"),
        ("../data/*.jsonl", "*.jsonl"),
        ("data/part/*.jsonl", "*.jsonl"),
        ("C:\\Users\\jane\\data", "data"),
        ("file:///srv/jane/data", "data"),
        ("cp /srv/jane/a.txt --to=/mnt/b c:/srv/jane", "cp a.txt --to=b c:jane"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("see https://jane:secret@example.org/a", "see https://example.org/a"),
        ("token hf_abcdefghijklmnop", "token "),
        ("org/name:config", "org/name:config"),
        ("8 x GPU, 9 tokens/s", "8 x GPU, 9 tokens/s"),
        (Path("/srv/jane/data"), "data"),
        ({"a": ("/b/c", 1, None, True), "hub_token": "x"}, {"a": ["c", 1, None, True]}),
    ],
)
def test_clean(given, expected):
    assert clean(given) == expected


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/tiny").mkdir(parents=True)
    assert hub_id("org/name") == hub_id("org/name:config") == "org/name"
    local = ("runs/tiny", "name", "data/a.jsonl", "data/*", "/a/b", "a/b/c", "~/a", "./a", "")
    assert [hub_id(source) for source in local] == [None] * len(local)


def test_a_failed_card_leaves_the_old_one(tmp_path, facts, monkeypatch):
    (tmp_path / "README.md").write_text("old")
    monkeypatch.setattr(cards, "TEMPLATE", tmp_path / "missing.md")
    with pytest.raises(FileNotFoundError):
        write_card(tmp_path, facts)
    assert (tmp_path / "README.md").read_text() == "old"


def test_environment_knows_the_commit_or_says_so(tmp_path, monkeypatch):
    assert {"hardware", "commit", "torch", "transformers", "modernalbert", "python"} == environment().keys()
    monkeypatch.setattr(cards, "ROOT", tmp_path)
    assert environment()["commit"] == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", environment()["commit"])
    (tmp_path / "file").write_text("two")
    assert environment()["commit"].endswith(" with local changes")
    monkeypatch.setattr(cards, "ROOT", tmp_path / "site-packages")  # of an environment inside somebody's repository
    assert environment()["commit"] == "unknown"
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] == "unknown"


def test_usage_of_the_card_runs_as_written(tmp_path, facts):
    tokenizer = train_tokenizer(["The capital of France is Paris."] * 3, vocab_size=300, model_max_length=64)
    config = modernalbert.ModernAlbertConfig.preset("nano", vocab_size=padded_vocab_size(tokenizer))
    config.pad_token_id = tokenizer.pad_token_id
    modernalbert.ModernAlbertForMaskedLM(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    path = write_card(tmp_path / "model", dataclasses.replace(facts, name="model", config=config))
    code = "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    stranger = 'import sys; sys.modules["modernalbert"] = None\n' + code
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "hf")}
    run = subprocess.run(
        [sys.executable, "-c", stranger], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_experts"] == 0


@pytest.fixture(scope="module")
def pretraining_arguments():
    return load_script("pretrain").PretrainingArguments


def test_every_preset_has_a_recipe():
    assert RECIPES.keys() == PRESETS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_recipes_are_arguments_of_the_script(preset, pretraining_arguments):
    recipe = yaml.safe_load(RECIPES[preset].read_text())
    fields = [field for kind in (pretraining_arguments, TrainingArguments) for field in dataclasses.fields(kind)]
    assert recipe.keys() <= {field.name for field in fields}
    numbers = {field.name for field in fields if field.type in (int, float)}
    assert all(isinstance(recipe[name], int | float) for name in numbers & recipe.keys())  # YAML reads 1e-6 as text
    recipe_of_cpu = ["--config", str(RECIPES[preset]), "--bf16", "False", "--use_cpu", "True"]
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
