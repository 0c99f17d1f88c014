"""What all task scripts do, by `run_task`: resume, refuse, average, adapt, merge. A new script needs a kit here."""

import json
import logging
import shutil
import statistics
import sys
from itertools import cycle

import pytest
import torch
from helpers import SCRIPTS, load_script
from safetensors.torch import load_file, save_file
from transformers import Trainer

import modernalbert
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.cli import run_script
from modernalbert.training.evaluation.results import summarise
from modernalbert.training.trainer import TrainerMixin


NAMES = ["Ada", "Bo", "Cleo", "Dan", "Eve", "Finn"]
PLACES = ["Rome", "Oslo", "Lima"]
SENTENCES = [
    f"{name} went to {place} , and {name} came back ." + " Then it rained ." * (len(name) % 3)
    for name in NAMES
    for place in PLACES
]


def classes(part):
    return [
        {"text": text, "label": ("yes", "no", "maybe")[n % 3]} for n, text in enumerate(SENTENCES) if n % 2 == part
    ]


def questions(part):
    rows = []
    for number, (name, place) in enumerate(zip(NAMES * 3, cycle(PLACES), strict=False)):
        context = f"{name} went to {place} and slept." + " It rained." * (number % 4)
        answers = (
            {"text": [place], "answer_start": [context.index(place)]}
            if number % 5
            else {"text": [], "answer_start": []}
        )
        rows.append(
            {
                "id": f"{part}-{number}",
                "context": context,
                "question": f"Where did {name} go, {part} {number}?",
                "answers": answers,
            }
        )
    return rows


def tagged(part):
    tags = {**dict.fromkeys(NAMES, "B-PER"), **dict.fromkeys(PLACES, "B-LOC")}
    words = [text.split() for n, text in enumerate(SENTENCES) if n % 2 == part]
    return [{"tokens": tokens, "tags": [tags.get(token, "O") for token in tokens]} for tokens in words]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files(rows):
    """Makes the arguments of rows in two files."""

    def write(folder):
        train, validation = (write_rows(folder / f"{n}.jsonl", rows(n)) for n in range(2))
        return ["--train_files", train, "--validation_files", validation], ["--validation_files", validation]

    return write


def judged(folder):
    """Makes the arguments of a set in BEIR's layout."""
    write_rows(
        folder / "corpus.jsonl", [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(SENTENCES)]
    )
    write_rows(
        folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"Where was {name}?"} for n, name in enumerate(NAMES)]
    )
    for split, part in (("train", range(4)), ("test", range(3, 6))):
        rows = [
            {"query-id": f"q{n}", "corpus-id": f"d{3 * n + place}", "score": 1} for n in part for place in range(2)
        ]
        write_rows(folder / f"qrels_{split}.jsonl", rows)
    data = ["--dataset", str(folder), "--max_seq_length", "32"]
    return [*data, "--num_negatives", "1"], data


# What each script needs to train and evaluate, to evaluate alone, and where its weights are.
KITS = {
    "run_glue": (files(classes), ["--max_length", "32"], "."),
    "run_squad": (files(questions), ["--max_length", "48", "--doc_stride", "8", "--max_question_length", "16"], "."),
    "run_ner": (files(tagged), ["--max_length", "24", "--stride", "4"], "."),
    "run_beir": (judged, [], "model"),
}
QUIET = ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True", "--per_device_train_batch_size", "4"]
TRAINING = ["--do_train", "--learning_rate", "1e-2", "--logging_steps", "1", "--save_steps", "2", "--max_steps"]


def test_every_task_script_has_a_kit():
    assert set(KITS) == {path.stem for path in SCRIPTS.glob("*.py") if "run_task(" in path.read_text()}


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model):
    """Folder of a masked language model."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = train_tokenizer([*SENTENCES, "Where did it rain? yes no maybe"], vocab_size=320, model_max_length=64)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "cls", "sep")}
    ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    vocab_size = padded_vocab_size(tokenizer)
    make_model(modernalbert.ModernAlbertForMaskedLM, vocab_size=vocab_size, **ids).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(params=KITS)
def task(request, model, tmp_path):
    """Runs one of the scripts: `task(output_dir, *arguments)`, and with `start=folder` evaluates a model alone."""
    write, lengths, weights = KITS[request.param]
    both, validation = write(tmp_path / "data")
    script = load_script(request.param)

    def run(output_dir, *arguments, start=None):
        data = [*lengths, *(both if start is None else validation), *QUIET]
        command = ["--model_name_or_path", str(start or model), "--output_dir", str(tmp_path / output_dir), *data]
        return script.main([*command, *(TRAINING if start is None else ()), *arguments])

    run.weights = lambda folder: tmp_path / folder / weights
    run.name = request.param
    return run


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- Runs


def test_a_killed_run_goes_on_bit_for_bit_and_a_finished_one_is_read(task, tmp_path, monkeypatch):
    expected = task("whole", "4")
    assert read(tmp_path / "whole" / "results.json") == expected
    steps, step = iter(range(3)), TrainerMixin.training_step

    def break_off(self, *args, **kwargs):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TrainerMixin, "training_step", break_off)
    with pytest.raises(KeyboardInterrupt):
        task("killed", "4")
    monkeypatch.setattr(TrainerMixin, "training_step", step)
    assert not (tmp_path / "killed" / "results.json").exists()
    with pytest.raises(
        ValueError, match="checkpoints of a run with other settings .weight_decay: 0.0 before, 0.5 now"
    ):
        task("killed", "4", "--weight_decay", "0.5")
    assert task("killed", "4")["scores"] == expected["scores"]
    one, other = (load_file(task.weights(name) / "model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    monkeypatch.setattr(Trainer, "train", None)
    assert task("whole", "4", "--per_device_eval_batch_size", "3") == expected  # what changes no score
    for other in (["--data_seed", "7"], ["--adam_beta1", "0.5"], ["--max_train_samples", "3"]):
        with pytest.raises(ValueError, match="finished run with other settings"):
            task("whole", "4", *other)


def test_a_lora_is_evaluated_as_it_was_saved_and_merged(task, tmp_path):
    results = task("lora", "2", "--peft", "--peft_rank", "2", "--merge_after", "ema")
    folder, main = task.weights("lora"), next(iter(results["scores"]))
    (adapter,) = (tmp_path / "lora").glob(
        "adapter_model.safetensors" if folder == tmp_path / "lora" else "adapter/*.safetensors"
    )
    assert (
        adapter.stat().st_size < (task.weights("lora") / "model.safetensors").stat().st_size
        if task.name == "run_beir"
        else True
    )
    assert results["details"]["trainable_parameters"] < results["parameters"] / 2
    alone = task("alone", start=folder)["scores"]
    assert alone == {name: score for name, score in results["scores"].items() if not name.startswith("merged_")}
    merged = task("merged", start=tmp_path / "lora" / "merged")
    assert merged["scores"][main] == pytest.approx(results["scores"][f"merged_{main}"])
    assert merged["parameters"] == results["details"]["merged_parameters"] < results["parameters"]


def test_seeds_and_rates_have_folders_of_their_own(task, tmp_path):
    results = task("runs", "1", "--seeds", "1", "2", "--learning_rates", "1e-3", "1e-2", "--save_strategy", "no")
    runs = [read(path) for path in (tmp_path / "runs").glob("**/seed-*/results.json")]
    assert len(runs) == 4 and results["seeds"] == [1, 2] and results["details"]["learning_rates"] == [1e-3, 1e-2]
    main = next(iter(results["scores"]))
    by_rate = {
        rate: statistics.mean(run["scores"][main] for run in runs if run["settings"]["learning_rate"] == rate)
        for rate in (1e-3, 1e-2)
    }
    assert results["scores"][main] == pytest.approx(max(by_rate.values()))
    assert "were chosen on the rows that the scores are of" in (tmp_path / "runs" / "results.md").read_text()


def test_means_and_deviations_over_seeds():
    """Of three seeds: two do not tell a mean from a median, nor a sample's deviation from a population's."""
    scores = {1: 0.1, 2: 0.2, 3: 0.9}
    runs = [
        {
            "scores": {"f1": score, "exact": 1 - score},
            "seeds": [seed],
            "settings": {"learning_rate": 1e-3, "seed": seed, "max_steps": 2},
            "details": {"milliseconds_per_row": 10 * score, "f1 of queries": {"a": score}},
        }
        for seed, score in scores.items()
    ]
    other = {**runs[0], "scores": {"f1": 0.3, "exact": 1}, "settings": {"learning_rate": 1e-2}}
    summary = summarise([*runs, other])
    assert summary["scores"] == pytest.approx({"f1": 0.4, "exact": 0.6}) and summary["seeds"] == [1, 2, 3]
    assert summary["details"]["std"] == pytest.approx({"f1": 0.19**0.5, "exact": 0.19**0.5})  # 0.38 / 2
    assert summary["details"]["by_seed"]["f1"] == [0.1, 0.2, 0.9] and summary["details"]["learning_rate"] == 1e-3
    assert summary["details"]["milliseconds_per_row"] == pytest.approx(4)
    assert summary["details"]["f1 of queries"] == pytest.approx({"a": 0.4})
    assert summary["settings"] == {"learning_rate": 1e-3, "max_steps": 2}


def test_the_router_is_balanced_and_padding_does_not_count(task, tmp_path, monkeypatch):
    """Shares of choices are those of the real tokens; the balancing loss reaches the router."""
    seen = []
    own = TrainerMixin.record_routing

    def record(self, outputs, attention_mask):
        seen.append((attention_mask.sum().item(), attention_mask.numel()))
        return own(self, outputs, attention_mask)

    monkeypatch.setattr(TrainerMixin, "record_routing", record)
    for coefficient in ("0", "10"):
        task(coefficient, "2", "--router_aux_loss_coef", coefficient)
    one, other = (load_file(task.weights(name) / "model.safetensors") for name in ("0", "10"))
    routers = [name for name in one if "router" in name]
    assert routers and all((one[name] - other[name]).abs().max() > 1e-4 for name in routers)
    if task.name != "run_beir":
        assert any(real < size for real, size in seen)


# ---- What is refused: one line, exit code 2, and no run


def refuse(monkeypatch, capsys, tmp_path, script, arguments):
    """Runs a script as a user does, and returns its one line of stderr."""
    output_dir = tmp_path / "refused"
    argv = [script, "--output_dir", str(output_dir), *QUIET, *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(load_script(script).main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    assert not list(tmp_path.glob("refused/**/*.safetensors")) and not list(tmp_path.glob("refused/**/results.json"))
    return lines[0]


@pytest.mark.parametrize("script", KITS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--per_device_eval_batch_size", "0"], "`per_device_eval_batch_size` (0) must be at least 1"),
        (["--max_train_samples", "0"], "`max_train_samples` (0) must be at least 1"),
        (["--max_eval_samples", "-1"], "`max_eval_samples` (-1) must be at least 1"),
        (["--seeds", "1", "1"], "`seeds` [1, 1] names a run twice"),
        (["--learning_rates", "nan"], "`learning_rates` (nan) must be a finite number"),
        (["--merge_after", "cluster"], "no `merge_after` method 'cluster'"),
        (["--peft_rank", "0"], "`peft_rank` (0) must be at least 1"),
        (["--push_to_hub", "True"], "`push_to_hub` cannot be True here"),
        (["--resume_from_checkpoint", "x"], "`resume_from_checkpoint` cannot be 'x' here"),
        (["--metric_for_best_model", "bleu"], "`metric_for_best_model` (bleu) is no score of task"),
        (["--metric_for_best_model", "loss", "--greater_is_better", "True"], "`greater_is_better` (True) is wrong"),
        (["--save_strategy", "best"], "`save_strategy best` needs evaluations"),
        (["--label_names", "x"], "`label_names` cannot be ['x'] here"),
        (["--do_train", "False", "--peft"], "`peft` is for training: give `do_train`"),
        (["--do_train", "False", "--seeds", "1"], "`seeds` is for training: give `do_train`"),
        (["--early_stopping_patience", "2"], "give `load_best_model_at_end true`"),
        (["--num_train_epochs", "-1"], "`num_train_epochs` (-1) must be above 0 and at most"),
        (["--model_name_or_path", "/nowhere/at/all"], "there is no folder '/nowhere/at/all'"),
    ],
)
def test_bad_arguments_are_refused(script, arguments, message, model, tmp_path, monkeypatch, capsys):
    write, lengths, _ = KITS[script]
    data, _ = write(tmp_path / "data")
    command = ["--model_name_or_path", model, "--do_train", "--max_steps", "1", *lengths, *data, *arguments]
    assert message in refuse(monkeypatch, capsys, tmp_path, script, command)


@pytest.mark.parametrize("script", KITS)
def test_training_rows_are_not_for_validation(script, model, tmp_path, monkeypatch, capsys, caplog):
    write, lengths, _ = KITS[script]
    data, validation = write(tmp_path / "data")
    command = ["--model_name_or_path", model, "--do_train", "--max_steps", "1", *lengths]
    if script == "run_beir":
        same, overlapping = [*data, "--train_split", "test"], data
    else:
        train, file = data[1], validation[1]
        lines = open(file).read().splitlines(True)
        open(train, "a").write("".join(lines[:2]).replace('"id": "1-', '"id": "x-'))
        same, overlapping = ["--train_files", file, *validation], data
    assert "validation rows" in refuse(monkeypatch, capsys, tmp_path, script, [*command, *same])
    with caplog.at_level(logging.WARNING):
        output = ["--output_dir", str(tmp_path / "out")]
        load_script(script).main([str(part) for part in [*command, *QUIET, *overlapping, *output]])
    count = 1 if script == "run_beir" else 2
    assert f": {count} of " in caplog.text and "are in the training rows as well" in caplog.text


@pytest.mark.parametrize("script", ["run_glue", "run_squad", "run_ner"])
def test_a_score_may_be_chosen_to_find_the_best_checkpoint(script, model, tmp_path):
    write, lengths, _ = KITS[script]
    data, _ = write(tmp_path / "data")
    best = ["--load_best_model_at_end", "True", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    command = ["--model_name_or_path", model, "--do_train", "--max_steps", "2", *lengths, *data, *QUIET, *best]
    names = {"run_glue": "accuracy", "run_squad": "exact", "run_ner": "precision"}
    for asked, name in (
        ([], None),
        (["--metric_for_best_model", names[script]], names[script]),
        (["--metric_for_best_model", "loss"], "loss"),
    ):
        out = tmp_path / f"out-{name}"
        load_script(script).main([str(part) for part in [*command, *asked, "--output_dir", out]])
        state = read(out / "trainer_state.json")
        main = next(iter(read(out / "results.json")["scores"]))
        values = [entry[f"eval_{name or main}"] for entry in state["log_history"] if f"eval_{name or main}" in entry]
        assert state["best_metric"] == (min(values) if name == "loss" else max(values))


@pytest.mark.parametrize("script", ["run_glue", "run_squad", "run_ner"])
def test_arguments_of_trainer_that_choose_by_a_score(script, model, tmp_path, monkeypatch, capsys):
    """By default a plateau is one of the loss; the best checkpoint is saved by the main score."""
    write, lengths, _ = KITS[script]
    data, _ = write(tmp_path / "data")
    command = ["--model_name_or_path", model, "--do_train", "--max_steps", "2", *lengths, *data]
    command += ["--eval_strategy", "steps", "--eval_steps", "1"]
    refused = {("--dataloader_drop_last", "True"): "`dataloader_drop_last` cannot be True here: evaluations"}
    plateau = ("--lr_scheduler_type", "reduce_lr_on_plateau")
    metric = {"run_glue": "accuracy"}.get(script, "f1")
    refused[(*plateau, "--metric_for_best_model", metric)] = f"would look for a small '{metric}'"
    if script == "run_squad":
        refused[("--label_smoothing_factor", "0.1")] = "`label_smoothing_factor` cannot be 0.1 here"
    for arguments, message in refused.items():
        assert message in refuse(monkeypatch, capsys, tmp_path, script, [*command, *arguments])
    for name, arguments, best in (("plateau", plateau, "loss"), ("best", ("--save_strategy", "best"), metric)):
        argv = [*command, *QUIET, *arguments, "--output_dir", tmp_path / name]
        load_script(script).main([str(part) for part in argv])
        log = read(tmp_path / name / "trainer_state.json")["log_history"]
        values = [entry[f"eval_{best}"] for entry in log if f"eval_{best}" in entry]
        assert len(values) == 2
        if name == "best":  # a checkpoint at the first evaluation, and at each that was better
            step = 2 if values[1] > values[0] else 1
            assert [path.name for path in (tmp_path / name).glob("checkpoint-*")] == [f"checkpoint-{step}"]


def test_rows_that_make_no_whole_batch_are_said(model, tmp_path, monkeypatch, capsys):
    data, _ = judged(tmp_path / "data")
    command = [
        "--model_name_or_path",
        model,
        "--do_train",
        "--max_steps",
        "1",
        *data,
        "--dataloader_drop_last",
        "True",
    ]
    arguments = [*command, "--per_device_train_batch_size", "512"]
    assert "make no batch; leave out `dataloader_drop_last`" in refuse(
        monkeypatch, capsys, tmp_path, "run_beir", arguments
    )


def test_what_is_saved_takes_what_the_model_takes(task, model, tmp_path):
    """Whatever the tokenizer of the model says; an embedder may take less."""
    start = shutil.copytree(model, tmp_path / "start")
    path = start / "tokenizer_config.json"
    path.write_text(json.dumps({**read(path), "model_max_length": 8192}))
    task("out", "1", "--model_name_or_path", str(start))
    assert read(task.weights("out") / "tokenizer_config.json")["model_max_length"] in (64, 32)  # `max_seq_length`


def test_training_that_diverged_is_no_result(task, tmp_path):
    with pytest.raises(ValueError, match="is not finite at step"):
        task("out", "6", "--learning_rate", "1e8", "--max_grad_norm", "0", "--save_steps", "1", "--weight_decay", "1")
    assert not list(tmp_path.glob("out/results.json")) and not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("script", KITS)
@pytest.mark.parametrize("damage", ["config", "weights"])
def test_an_encoder_that_would_start_at_random_is_refused(script, damage, model, tmp_path, monkeypatch, capsys):
    shutil.copytree(model, tmp_path / "model")
    if damage == "config":
        config = read(tmp_path / "model" / "config.json")
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    else:
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        del tensors["model.layers.0.attn.Wqkv.weight"]
        save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    write, lengths, _ = KITS[script]
    data, _ = write(tmp_path / "data")
    command = ["--model_name_or_path", tmp_path / "model", "--do_train", "--max_steps", "1", *lengths, *data]
    assert "layers.0" in refuse(monkeypatch, capsys, tmp_path, script, command)
