"""Model cards: their front matter obeys the Hub, their body says what was done, their example runs as written."""

import dataclasses
import json
import math
import re
import subprocess

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import modernalbert
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.export import cards
from modernalbert.training.export.cards import (
    PretrainingFacts,
    environment,
    write_card,
    write_finetuned_cards,
    write_merged_card,
)
from modernalbert.training.export.folder import run_fresh
from modernalbert.training.export.redaction import redact


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
        *(
            "1 h 02 min",
            "| mlm_loss | 2.0000 |",
            "| kl_loss | not finite |",
            "| 2.5000 | 12.18 |",
            "bf16",
            "2512.12880",
        ),
        *(
            "| not finite | not finite |",
            "| 1000.0000 | not finite |",
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


def test_a_failed_card_leaves_the_old_one(tmp_path, facts, monkeypatch):
    (tmp_path / "README.md").write_text("old")
    monkeypatch.setattr(cards, "TEMPLATES", tmp_path)
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
    run_fresh(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_experts"] == 0


# ---- Names that want to be something else

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "heading": "a\n# Another\n---\nb",
    "fence": "a```\n# Another",
    "table": "a|b",
    "emphasis": "*a* _b_ [c](http://d) ![e](f)",
    "quotes": "a\"); import os; print('b",
    "yaml": "a: [b]\n- c",
}


def hostile_cards(folder, name, facts, make_model):
    """All kinds of cards about models, tasks, methods and files of such a name."""
    replaced = {"name": name, "preset": None, "tokenizer": name, "teacher": name, "initialised_from": name}
    replaced |= {"data": [name], "eval_losses": {name: 2.0}, "recipe": {"note": name}, "train_losses": {name: 1.0}}
    yield write_card(folder, dataclasses.replace(facts, **replaced))
    report = {"model": name, "method": "svd", "format": "folded", "parameters": {"merged": 1}, "num_experts": None}
    report |= {"data": {"validation": [name]}, "routed": {name: 1.0}}
    report["methods"] = {"svd": {"score": {name: 1.0}, "recovered": None}}
    yield write_merged_card(folder, name, "ModernAlbertForMaskedLM", name, report, "apache-2.0")
    own = folder / name.replace("/", " ")
    own.mkdir()
    for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"):
        model = make_model(getattr(modernalbert, f"ModernAlbert{head}"))
        path = own / "model" if head == "Model" else own
        path.mkdir(exist_ok=True)
        write_finetuned_cards(
            own,
            task=name,
            model_name=name,
            model=model,
            scores={name: 0.5},
            data={"train": {"rows": 1, "fingerprint": "0", "source": [name]}},
            seed=0,
            settings={"peft": False, "note": name, "split": name},
            details={},
        )
        yield path / "README.md"


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_stay_names(tmp_path, facts, make_model, name):
    for path in hostile_cards(tmp_path, name, facts, make_model):
        card = ModelCard.load(path)  # the front matter is YAML, and ends where it should
        prose = re.sub(r"(?ms)^(`{3,})(?:python|yaml|bibtex)?\n(.*?)^\1$", "", card.text)
        spans = re.sub(r"(?<!`)`[^`\n]+`(?!`)", "", prose)
        assert "<script" not in spans and "[c](" not in spans and not re.search(r"(?<!\\)\*a", spans)
        assert len(re.findall(r"(?m)^# ", prose)) == 1
        for code in re.findall(r"(?ms)^```python\n(.*?)^```$", card.text):
            compile(code, str(path), "exec")
            assert "import os" not in [line.strip() for line in code.splitlines()]
        for table in (block for block in prose.split("\n\n") if block.startswith("|")):
            plain = re.sub(r"\\\||&#124;", "", table)
            assert len({line.count("|") for line in plain.splitlines()}) == 1
        for recipe in re.findall(r"(?ms)^(`{3,})yaml\n(.*?)^\1$", card.text):
            assert yaml.safe_load(recipe[1])["note"] == redact(name)


def test_the_pipeline_of_each_head(tmp_path, make_model):
    kinds = {
        "ForSequenceClassification": "text-classification",
        "ForTokenClassification": "token-classification",
        "ForQuestionAnswering": "question-answering",
        "Model": "sentence-similarity",
    }
    for head, kind in kinds.items():
        model = make_model(getattr(modernalbert, f"ModernAlbert{head}"))
        folder = tmp_path / head
        (folder / "model").mkdir(parents=True)
        facts = {"task": "own", "model_name": "org/base", "model": model, "scores": {"f1": 0.5, "loss": math.nan}}
        facts |= {"data": {}, "seed": 0, "settings": {}, "details": {}}
        write_finetuned_cards(folder, **facts)
        card = ModelCard.load(folder / ("model/README.md" if head == "Model" else "README.md"))
        assert card.data.pipeline_tag == kind and card.data.base_model == "org/base"
        assert card.data.library_name == ("sentence-transformers" if head == "Model" else "transformers")
        assert [result.metric_type for result in card.data.eval_results] == ["f1"]  # the Hub refuses NaN
        assert 'revision="main"' in card.text and f"transformers {environment()['transformers']}" in card.text
