"""The ablation study: its variants, its figures from made-up runs, and the whole of it at two steps a run."""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import BENCHMARKS, load_script

import modernalbert
from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM, ModernAlbertModel
from modernalbert.tokenization import save_tokenizer, train_tokenizer
from modernalbert.training.export.embedder import read_projection, write_projection


SEEDS, RATES = [0, 1, 2], [0.001, 0.002, 0.004]
# By variant, at its best rate: nats of three seeds, and accuracies on a task.
LOSSES = {
    "unshared": [3.3, 3.5, 3.1],
    "none": [4.0, 4.2, 4.1],
    "moa": [3.8, 4.0, 3.9],
    "mol": [3.6, 3.9, 3.6],
    "moa-matched": [3.7, 4.0, 3.7],
}
SCORES = {
    "unshared": [0.80, 0.82, 0.84],
    "none": [0.82, 0.83, 0.84],
    "moa": [0.82, 0.83, 0.84],
    "mol": [0.84, 0.85, 0.86],
    "moa-matched": [0.82, 0.83, 0.84],
}
T = 4.302653  # 97.5% quantile of Student's t with 2 degrees of freedom


@pytest.fixture(scope="module")
def ablation():
    return load_script("ablation", BENCHMARKS)


@pytest.mark.parametrize("preset", modernalbert.configuration_modernalbert.PRESETS)
def test_variants_differ_in_what_they_are_about(ablation, preset):
    sizes = {"vocab_size": 8192, "pad_token_id": None}
    base = ModernAlbertConfig.preset(preset, **sizes)
    fields = {name: ablation.overrides(name, preset, 8192) for name in ablation.VARIANTS}
    configs = {name: ModernAlbertConfig.preset(preset, **sizes, **own) for name, own in fields.items()}
    mol = configs["mol"]
    assert mol.to_dict() == base.to_dict()
    for name, config in configs.items():
        kind, _, suffix = name.partition("-")
        assert config.modulation == {"unshared": "none"}.get(kind, kind)
        assert config.num_hidden_layers == base.num_hidden_layers
        if kind == "mol":
            assert config.router_type == (suffix or "top_k")
        else:
            assert not suffix or suffix == "matched"
    for name in ("none-matched", "depth_lora-matched", "moa-matched"):
        assert abs(configs[name].num_parameters() - mol.num_parameters()) <= 0.02 * mol.num_parameters()
    unshared, none = configs["unshared"], configs["none"]
    assert unshared.num_hidden_groups == none.num_hidden_layers and unshared.layers_per_group == 1
    assert unshared.estimate_flops(128) == none.estimate_flops(128)  # equal widths, layer by layer
    assert unshared.num_parameters() > mol.num_parameters() > none.num_parameters()


@pytest.fixture
def args(tmp_path):
    shape = {"preset": "nano", "config_overrides": "{}", "distil": None, "batch_size": 8}
    shape |= {"changes": {}, "num_hidden_groups": []}
    return Namespace(
        output_dir=tmp_path, variants=list(LOSSES), steps=1000, learning_rates=RATES, seeds=SEEDS, **shape
    )


@pytest.fixture
def finished(ablation, args):
    """Folders of runs that have ended: at the best rate with all seeds, at the others with the first."""
    for name, losses in LOSSES.items():
        config = ModernAlbertConfig.preset("nano", **ablation.overrides(name, "nano", 8192))
        best = 0.004 if name == "none" else 0.002
        runs = [(best, seed, loss) for seed, loss in zip(SEEDS, losses, strict=True)]
        runs += [(rate, 0, losses[0] + 1 if rate > 0.001 else float("nan")) for rate in RATES if rate != best]
        for rate, seed, loss in runs:
            folder = ablation.run_folder(args, name, rate, seed)
            (folder / "checkpoint-1000").mkdir(parents=True)
            config.save_pretrained(folder)
            log = [{"step": 0, "eval_loss": 9.0}, {"step": 500, "loss": 1.0}, {"step": 1000, "eval_loss": loss}]
            (folder / "checkpoint-1000" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
            (folder / "results.json").write_text(json.dumps({"eval_loss_start": 9.0, "eval_loss": loss}))
        for seed, score in enumerate(SCORES[name]):
            folder = ablation.best_run(args, name, seed, "sst2")
            folder.mkdir()
            (folder / "results.json").write_text(json.dumps({"scores": {"accuracy": score}}))


def test_figures_of_the_runs(ablation, args, finished):
    results = ablation.collect(args, ["sst2"])
    assert results["tokens"] == 1_024_000 and list(results["measures"]) == ["masked-LM loss, validation", "sst2"]
    losses = results["measures"]["masked-LM loss, validation"]
    assert losses["values"] == LOSSES
    close = pytest.approx
    assert losses["variants"]["mol"] == {
        "mean": close(3.7),
        "standard_error": close(0.1),  # deviation of 3.6, 3.9, 3.6: sqrt(0.03)
        "minus_none": {"mean": close(-0.4), "half_width": close(T * 0.1 / 3**0.5, rel=1e-6)},
        "gap_closed": close(0.5),
    }
    gaps = {name: own["gap_closed"] for name, own in losses["variants"].items()}
    assert gaps == close({"unshared": 1, "none": 0, "moa": 0.25, "mol": 0.5, "moa-matched": 0.375})
    assert losses["variants"]["none"]["minus_none"] == {"mean": 0, "half_width": 0}
    assert list(losses["pairs"]) == ["mol - none", "mol - moa", "mol - moa-matched"]
    assert losses["pairs"]["mol - moa"] == {"mean": close(-0.2), "half_width": close(T * 0.1 / 3**0.5, rel=1e-6)}

    scores = results["measures"]["sst2"]
    assert scores["values"]["mol"] == close([84, 85, 86])
    assert scores["variants"]["mol"]["minus_none"] == {"mean": close(2), "half_width": close(0, abs=1e-9)}
    assert {own["gap_closed"] for own in scores["variants"].values()} == {None}  # unshared is worse than none

    mol, none = results["variants"]["mol"], results["variants"]["none"]
    config = ModernAlbertConfig.preset("nano", **ablation.overrides("mol", "nano", 8192))
    assert (mol["parameters"], mol["flops_per_token"]) == (config.num_parameters(), config.estimate_flops(128, 0.3))
    assert (mol["learning_rate"], mol["at_edge_of_sweep"]) == (0.002, False)
    assert (none["learning_rate"], none["at_edge_of_sweep"]) == (0.004, True)
    assert mol["sweep"] == {"0.002": 3.6, "0.004": 4.6, "0.001": None}
    assert mol["curves"] == {"validation": [(0, 9.0), (1_024_000, close(3.7))]}


def test_tables_and_plots(ablation, args, finished):
    results = ablation.collect(args, ["sst2"])
    text = ablation.tabulate(results)
    assert "masked-LM loss, validation, 1.02M tokens, 3 seeds" in text
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[3:] for line in text.splitlines()[:8]}
    assert rows["mol"] == ["0.002", "3.700 ± 0.100", "-0.400 ± 0.248", "50% |"]
    assert rows["none"] == ["0.004 (edge)", "4.100 ± 0.058", "", " |"]
    assert "| mol - moa | -0.200 ± 0.248 |" in text and "| mol - none | +2.0 ± 0.0 |" in text
    for block in text.strip().split("\n\n"):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    svg = ablation.draw_panels(ablation.draw_results(results))
    assert {"loss, validation", "masked-LM loss, validation", "sst2"} <= {
        part.split("<")[0] for part in svg.split(">") if part.split("<")[0]
    }


def test_one_seed_has_no_interval(ablation, args, finished):
    args.seeds, args.variants = [0], ["mol", "moa"]
    losses = ablation.collect(args, [])["measures"]["masked-LM loss, validation"]
    nothing = {"standard_error": None, "minus_none": None, "gap_closed": None}
    assert losses["variants"]["mol"] == {"mean": 3.6, **nothing}
    assert losses["pairs"] == {"mol - moa": {"mean": pytest.approx(-0.2), "half_width": None}}
    assert "| mol - moa | -0.200 |" in ablation.tabulate(ablation.collect(args, []))


def test_variants_start_from_the_teacher(ablation, tmp_path, monkeypatch):
    """Each with its own fields, `depth_lora` alone with LoRAs by SVD; what is there is not made again."""
    commands = {}
    monkeypatch.setattr(
        ablation, "start_script", lambda script, *words: commands.__setitem__(words[-1], [script, *words])
    )
    monkeypatch.setattr(
        ablation, "pretrain", lambda args, folder, steps, seed, rate, *words, batch_size: commands.update(train=words)
    )
    monkeypatch.setattr(ablation, "read_losses", lambda folder: {})
    save_tokenizer(train_tokenizer(["A text."], vocab_size=300, model_max_length=64), tmp_path / "tokenizer")
    shape = {"preset": "nano", "config_overrides": "{}", "distil": None, "changes": {}, "num_hidden_groups": []}
    args = Namespace(output_dir=tmp_path, teacher="runs/teacher", steps=10, batch_size=8, **shape)
    for name in ablation.VARIANTS:
        ablation.initialise(args, name, 7)
        script, *words = commands[str(tmp_path / f"{name}-start-7")]
        given = dict(zip(words[::2], words[1::2], strict=True))
        config = ModernAlbertConfig.preset("nano", **json.loads(given["--config_overrides"]))
        assert (script, given["--teacher"], given["--seed"]) == ("init_from_teacher", "runs/teacher", "7")
        assert (given["--experts"] == "svd") == (config.ffn_modulation == "depth_lora")
        assert config.expert_alpha / config.expert_rank == 2  # the preset's, also where the rank was raised
        ablation.train(args, name, 1e-3, 7)
        assert commands.pop("train") == ("--model_name_or_path", given["--output_dir"])
    commands.clear()
    (tmp_path / "mol-start-7").mkdir()
    ablation.initialise(args, "mol", 7)
    assert not commands


def test_changes_are_compared_with_the_mixture(ablation):
    values = {"mol": [3.0, 3.2, 3.1], "large-alpha": [2.9, 3.1, 3.0]}
    pairs = ablation.summarise(values, False, ["large-alpha", "not-run"])["pairs"]
    assert pairs == {"large-alpha - mol": {"mean": pytest.approx(-0.1), "half_width": pytest.approx(0, abs=1e-9)}}


@pytest.mark.parametrize(
    "changes",
    [{"mol": {"expert_rank": 4}}, {"mol-2-groups": {"expert_rank": 4}}, {"a/b": {"expert_rank": 4}}, {"rank": 4}],
)
def test_changes_without_a_new_name_or_fields_are_refused(ablation, tmp_path, capsys, changes):
    command = ["--train_data", "a", "--validation_data", "b", "--output_dir", str(tmp_path)]
    command += ["--num_hidden_groups", "2", "--changes", json.dumps(changes)]
    with pytest.raises(SystemExit, match="2"):
        ablation.main(command)
    assert "--changes maps new names" in capsys.readouterr().err


def test_what_sharing_costs_and_experts_give_back(ablation):
    shape = {
        "preset": "nano",
        "vocab_size": 8192,
        "shape": {"num_hidden_layers": 6, "num_hidden_groups": 1, "mol_groups": [0]},
    }
    changes = {"none": None, **ablation.sharing_variants([2, 3])}
    fields = {name: ablation.overrides(name, **shape, change=change) for name, change in changes.items()}
    configs = {name: ModernAlbertConfig.preset("nano", **own) for name, own in fields.items()}
    assert configs["mol-2-groups"].mol_groups == [0, 1] and configs["none-2-groups"].modulation == "none"
    values = {
        "unshared": [3.0, 3.2, 3.1],
        **{"none": [3.4, 3.6, 3.5], "mol": [3.3, 3.4, 3.5]},
        **{"none-3-groups": [2.9, 3.1, 3.0], "mol-3-groups": [2.8, 3.0, 2.9]},
        "none-2-groups": [3.1, 3.3, 3.2],  # whose `mol` was not run
    }
    found = ablation.summarise_sharing(values, configs)
    assert list(found) == [2, 6]  # runs of a group
    assert found[6]["cost"] == {"mean": pytest.approx(0.4), "half_width": pytest.approx(0, abs=1e-9)}
    assert found[6]["gain"] == {"mean": pytest.approx(0.1), "half_width": pytest.approx(T * 0.1 / 3**0.5, rel=1e-6)}
    assert found[6]["share"] == pytest.approx(0.25)
    assert found[2]["cost"]["mean"] < 0 and found[2]["share"] is None
    text = ablation.tabulate({"measures": {}, "sharing": found})
    assert "| 6 | +0.4000 ± 0.0000 | +0.1000 ± 0.2484 | 25% |" in text
    assert "runs of a group" in ablation.draw_panels(ablation.draw_sharing(found))


@pytest.mark.parametrize("groups", ["1", "3", "4", "0"])
def test_numbers_of_groups_that_do_not_fit_are_refused(ablation, tmp_path, capsys, groups):
    command = ["--train_data", "a", "--validation_data", "b", "--output_dir", str(tmp_path)]
    command += ["--config_overrides", '{"num_hidden_layers": 4, "num_hidden_groups": 1, "mol_groups": [0]}']
    with pytest.raises(SystemExit, match="2"):
        ablation.main([*command, "--num_hidden_groups", groups])
    assert "--num_hidden_groups" in capsys.readouterr().err


@pytest.fixture
def teacher_folder(make_model, tmp_path):
    """An encoder with the tokenizer of the study, to distil from."""
    tokenizer = train_tokenizer(["A text."], vocab_size=300, model_max_length=64)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    make_model(ModernAlbertModel, vocab_size=320, hidden_size=24).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_the_variants_of_a_seed_start_as_one_function(ablation, teacher_folder, tmp_path, monkeypatch):
    """With weights that can learn to differ, and at the parameters of `mol` where they are matched."""
    words = []
    monkeypatch.setattr(ablation, "pretrain", lambda *given, batch_size: words.append(given[5:]))
    monkeypatch.setattr(ablation, "read_losses", lambda folder: {})
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "embedding_size": 32, "intermediate_size": 96}
    depth = {"num_hidden_layers": 6, "num_hidden_groups": 2, "mol_groups": [1], "mol_intermediate_size": 128}
    args = Namespace(
        output_dir=tmp_path, preset="nano", teacher=None, distil=str(teacher_folder), steps=10, batch_size=8
    )
    args.config_overrides, args.teacher_cache, args.start = json.dumps({**sizes, **depth}), None, None
    args.changes, args.num_hidden_groups = {"four": {"num_experts_per_tok": 4}}, [6]
    input_ids = torch.arange(4, 44).view(2, 20)
    expected, parameters = {}, {}
    for name in (*ablation.VARIANTS, "four", "mol-6-groups"):
        for seed in (7, 8):
            ablation.initialise(args, name, seed)
            model = ModernAlbertForMaskedLM.from_pretrained(tmp_path / f"{name}-start-{seed}").eval()
            logits = model(input_ids).logits
            torch.testing.assert_close(logits, expected.setdefault(seed, logits.detach()), rtol=1e-5, atol=1e-5)
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        learning = {key for key, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        assert {f"model.layers.{group}.mlp.Wo.weight" for group in range(model.config.num_hidden_groups)} <= learning
        if model.config.modulation != "none":
            assert any(key.endswith(("out_B", "up")) for key in learning)
        parameters[name] = model.config.num_parameters()
        if name == "unshared":
            assert model.config.num_hidden_groups == 6
        if name == "four":
            assert model.config.num_experts_per_tok == 4

        ablation.train(args, name, 1e-3, 7)
        given = dict(zip(words[-1][::2], words[-1][1::2], strict=True))
        assert given["--model_name_or_path"] == str(tmp_path / f"{name}-start-7")
        assert given["--teacher"] == str(teacher_folder) and given["--masked_share"] == "0"
    assert not torch.allclose(expected[7], expected[8], atol=0.01)
    for name in ("none-matched", "depth_lora-matched", "moa-matched"):
        assert abs(parameters[name] - parameters["mol"]) <= 0.02 * parameters["mol"]
    ablation.initialise(args, "mol", 7)  # what is there is not made again, which would be refused


def test_variants_go_on_from_trained_models(ablation, teacher_folder, tmp_path):
    """One for each seed, with what it has learned of its teacher's states."""
    args = Namespace(output_dir=tmp_path, preset="nano", teacher=None, distil=None, changes={}, seeds=[3, 5])
    args.num_hidden_groups = []
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "embedding_size": 32, "intermediate_size": 96}
    depth = {"num_hidden_layers": 4, "num_hidden_groups": 2, "mol_groups": [1], "mol_intermediate_size": 96}
    args.config_overrides = json.dumps({**sizes, **depth})
    args.start = [str(tmp_path / "first"), str(tmp_path / "second")]
    torch.manual_seed(0)
    projections = {}
    for folder in args.start:
        ModernAlbertForMaskedLM(ablation.variant_config(args, "none")).save_pretrained(folder)
        projections[folder] = torch.nn.Linear(64, 16)
        write_projection(folder, projections[folder])
    second = Path(args.start[1])  # as a SentenceTransformer keeps it
    (second / "sentence-transformer" / "2_Dense").rename(second / "2_Dense")
    input_ids = torch.arange(4, 44).view(2, 20)
    for seed, folder in zip(args.seeds, args.start, strict=True):
        expected = ModernAlbertForMaskedLM.from_pretrained(folder).eval()(input_ids).logits
        for name in ("unshared", "mol", "none-matched"):
            ablation.initialise(args, name, seed)
            start = tmp_path / f"{name}-start-{seed}"
            logits = ModernAlbertForMaskedLM.from_pretrained(start).eval()(input_ids).logits
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(read_projection(start).weight, projections[folder].weight)

    args.config_overrides = json.dumps({**sizes, **depth, "num_hidden_layers": 8, "intermediate_size": 128})
    with pytest.raises(ValueError, match="first' differs from `none` in intermediate_size, num_hidden_layers; give"):
        ablation.initialise(args, "moa", 3)


def test_a_start_for_each_seed_is_asked_for(ablation, tmp_path, capsys):
    command = ["--train_data", "a", "--validation_data", "b", "--output_dir", str(tmp_path), "--seeds", "0", "1"]
    with pytest.raises(SystemExit, match="2"):
        ablation.main([*command, "--start", "model"])
    assert "--start takes a model for each of the 2 seeds, got 1" in capsys.readouterr().err


def test_a_failed_job_ends_the_study(ablation):
    done = []

    def job(number):
        if number == 1:
            raise RuntimeError("run 1 failed")
        done.append(number)
        time.sleep(0.02)

    with pytest.raises(RuntimeError, match="run 1 failed"):
        ablation.run_jobs(1, job, [(number,) for number in range(50)])
    assert len(done) < 49


def test_a_failed_script_shows_the_end_of_its_output(ablation, tmp_path):
    (tmp_path / "script.py").write_text("import sys; print('no corpus', file=sys.stderr); sys.exit(int(sys.argv[1]))")
    for code, error in (("1", RuntimeError), ("2", ValueError)):  # 2: what the user can fix
        with pytest.raises(error, match=f"script.py {code} failed:\nno corpus"):
            ablation.start_script(str(tmp_path / "script.py"), code)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda args, tasks: setattr(args, "epochs", 4), "epochs"),
        (lambda args, tasks: setattr(args, "processes", 8), None),
        (lambda args, tasks: setattr(args, "seeds", [0, 1]), None),
        (lambda args, tasks: tasks.update(sick={**tasks["sst2"], "text_columns": ["premise"]}), None),
        (lambda args, tasks: tasks["sst2"].update(text_columns=["premise"]), "task sst2"),
        (
            lambda args, tasks: (args.output_dir.parent / "a.jsonl").write_text('{"text": "Another."}'),
            "content of .*jsonl",
        ),
        (
            lambda args, tasks: (args.output_dir.parent / "model" / "config.json").write_text("{ }"),
            "content of .*model",
        ),
    ],
    ids=["setting", "processes", "seeds", "new task", "changed task", "changed data", "changed model"],
)
def test_a_folder_keeps_to_the_settings_and_data_of_its_runs(ablation, tmp_path, change, message):
    data, model = str(tmp_path / "*.jsonl"), tmp_path / "model"
    (tmp_path / "a.jsonl").write_text('{"text": "A sentence."}')
    model.mkdir()
    (model / "config.json").write_text("{}")
    args = Namespace(
        output_dir=tmp_path / "out", train_data=[data], validation_data=[data], epochs=3, seeds=[0], processes=2
    )
    tasks = {"sst2": {"train_files": [data], "validation_files": [data], "text_columns": ["text"]}}

    def bind():
        ablation.bind_folder(args, tasks, ignore=["seeds"], models=[str(model)])

    bind()
    change(args, tasks)
    if message is None:
        bind()
    else:
        with pytest.raises(
            ValueError, match=f"holds runs with other values of {message}.*; give another --output_dir"
        ):
            bind()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ', "is damaged"),
        ("[1]", "must map the name of each task to its arguments"),
        ('{"*": {}, "sst2": {"train_files": []}}', "task sst2 in .* lacks validation_files"),
    ],
)
def test_tasks_that_cannot_run_are_refused(ablation, tmp_path, content, message):
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ablation.read_tasks(str(tmp_path / "tasks.json"), "train_files", "validation_files")


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--learning_rates", "nan"), ("--epochs", "-1")])
def test_numbers_that_make_no_run_are_refused(ablation, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        ablation.main(["--train_data", "a", "--validation_data", "b", "--output_dir", str(tmp_path), *arguments])
    assert f"argument {arguments[0]}: invalid" in capsys.readouterr().err


@pytest.mark.parametrize("preset", modernalbert.configuration_modernalbert.PRESETS)
@pytest.mark.parametrize("modulation", ["moa", "depth_lora", "none"])
def test_variants_match_the_parameters_of_each_preset(ablation, preset, modulation):
    total = ModernAlbertConfig.preset(preset).num_parameters()
    config = ModernAlbertConfig.preset(preset, ffn_modulation=modulation)
    before = config.to_dict()
    matched = ablation.match_parameters(config, total)
    assert matched.num_parameters() == pytest.approx(total, rel=0.02)
    assert config.to_dict() == before
    field = "mol_intermediate_size" if modulation == "none" else "expert_rank"
    assert {**matched.to_dict(), field: before[field]} == before
    distance = abs(matched.num_parameters() - total)
    for step in (-1, 2):  # no other value is nearer
        setattr(matched, field, getattr(matched, field) + step)
        assert abs(matched.num_parameters() - total) >= distance
    low_rank = ModernAlbertConfig.preset(preset, expert_rank=1)
    assert ablation.match_parameters(low_rank, total).expert_rank == ModernAlbertConfig.preset(preset).expert_rank


@pytest.mark.parametrize(
    ("overrides", "total", "message"),
    [
        ({}, 10**6, r"`expert_rank` cannot bring this model to 1,000,000 parameters: the nearest is .* at 32; change"),
        ({"ffn_modulation": "none"}, 10, "`mol_intermediate_size` cannot bring this model to 10 .* at 1; change"),
        ({"mol_groups": []}, 10**6, "`expert_rank` cannot bring .* at 3; change `mol_groups`"),
    ],
    ids=str,
)
def test_what_cannot_match_is_refused(ablation, make_config, overrides, total, message):
    with pytest.raises(ValueError, match=message):
        ablation.match_parameters(make_config(**overrides), total)


@pytest.mark.slow
def test_the_whole_study(ablation, tmp_path, monkeypatch):
    texts = [{"text": f"Sentence number {n} says that {n} times {n} is {n * n}.", "label": n % 2} for n in range(150)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in texts))
    task = {"train_files": [str(data)], "validation_files": [str(data)], "text_columns": ["text"]}
    (tmp_path / "tasks.json").write_text(json.dumps({"parity": task}))
    folder = tmp_path / "out"
    command = ["--train_data", str(data), "--validation_data", str(data), "--tasks", str(tmp_path / "tasks.json")]
    command += ["--output_dir", str(folder), "--variants", "mol", "--steps", "2", "--seeds", "0"]
    command += ["--learning_rates", "1e-3", "--max_eval_samples", "4", "--epochs", "1", "--train_rows", "32"]
    command += ["--validation_examples", "16", "--processes", "1", "--batch_size", "4"]
    # In this process: that a script is started, and how it fails, have tests of their own.
    common = sys.modules[ablation.start_script.__module__]
    monkeypatch.setattr(common, "start_script", lambda script, *words: load_script(script).main(list(words)))
    ablation.main(command)
    results = json.loads((folder / "ablation.json").read_text())
    arguments = json.loads((folder / "mol-2-0.001-0" / "arguments.json").read_text())
    assert '"per_device_train_batch_size": 4' in json.dumps(arguments)
    assert results["tokens"] == 1024 and list(results["measures"]) == ["masked-LM loss, validation", "parity"]
    assert all(len(figures["values"]["mol"]) == 1 for figures in results["measures"].values())
    assert len(results["variants"]["mol"]["curves"]["validation"]) == 3  # at the start and after each step
    assert {"ablation.md", "ablation.svg", "ablation-usage.svg"} <= {path.name for path in folder.iterdir()}
    assert "mol, group 1" in (folder / "ablation-usage.svg").read_text()

    def refuse(*arguments, **named):
        raise AssertionError("a run that has ended was repeated")

    monkeypatch.setattr(common, "start_script", refuse)
    ablation.main(command)
    assert json.loads((folder / "ablation.json").read_text()) == results
