"""Pretraining in processes of their own: killed, interrupted, out of disk, and two at a time."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

import modernalbert
from modernalbert.tokenization import save_tokenizer, train_tokenizer


SCRIPT = Path(modernalbert.__file__).parent / "scripts" / "pretrain.py"
SMALL = {
    "embedding_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "mol_intermediate_size": 96,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_hidden_groups": 2,
    "mol_groups": [1],
    "num_experts": 4,
    "expert_rank": 4,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with a tokenizer and a few hundred texts."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [f"Text number {n} tells of {n % 7} ships, {n % 11} towns and a king of {n % 13}." for n in range(400)]
    save_tokenizer(train_tokenizer(rows, vocab_size=320), folder / "tokenizer")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def command(texts, output_dir, *extra, launcher=(sys.executable,)):
    """A run of 12 steps of 8 rows, with a checkpoint every 3."""
    return [
        *(*launcher, str(SCRIPT), "--preset", "nano", "--config_overrides", json.dumps(SMALL)),
        *("--tokenizer", str(texts / "tokenizer"), "--train_data", str(texts / "texts.jsonl")),
        *("--max_length", "32", "--per_device_train_batch_size", "8", "--max_steps", "12", "--learning_rate", "1e-2"),
        *("--logging_steps", "1", "--save_steps", "3", "--use_cpu", "true", "--disable_tqdm", "true"),
        *("--report_to", "none", "--dataloader_pin_memory", "false", "--output_dir", str(output_dir), *extra),
    ]


def environment(texts):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(texts / "cache")}


def run(texts, output_dir, *extra, launcher=(sys.executable,), **options):
    arguments = command(texts, output_dir, *extra, launcher=launcher)
    return subprocess.run(arguments, env=environment(texts), capture_output=True, text=True, **options)


def losses(output_dir):
    """Loss and gradient norm of every logged step, of the run's last checkpoint."""
    state = json.loads((output_dir / "checkpoint-12" / "trainer_state.json").read_text())
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in state["log_history"] if "loss" in entry}


def stop(texts, output_dir, number, *extra):
    """Starts a run, sends it a signal once its second checkpoint appears, and returns its exit status and messages."""
    process = subprocess.Popen(
        command(texts, output_dir, *extra), env=environment(texts), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while not (output_dir / "checkpoint-6").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode()


@pytest.fixture(scope="module")
def uninterrupted(texts, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    result = run(texts, output_dir)
    assert result.returncode == 0, result.stderr
    return output_dir


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(texts, uninterrupted, tmp_path, number):
    """Bit for bit: losses, gradient norms and weights."""
    status, messages = stop(texts, tmp_path, number)
    assert not (tmp_path / "results.json").exists(), "the run ended before the signal reached it"
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 130 and "the same command goes on from there" in messages
    result = run(texts, tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == losses(uninterrupted)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, uninterrupted))
    assert_close(weights, expected, rtol=0, atol=0)
    assert json.loads((tmp_path / "results.json").read_text())["tokens"] == 12 * 8 * 32


def test_a_run_killed_after_its_last_step_takes_no_further_one(texts, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for name in ("results.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    result = run(texts, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", uninterrupted))
    assert_close(weights, expected, rtol=0, atol=0)
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (uninterrupted, tmp_path / "run"))
    assert after == before


def test_a_full_disk_costs_no_checkpoint(texts, uninterrupted, tmp_path):
    """The weights of a checkpoint still fit, the optimizer's state does not: as on a disk that fills up."""
    run(texts, tmp_path, "--max_steps", "4")
    (tmp_path / "results.json").unlink()
    room = 2 * (tmp_path / "model.safetensors").stat().st_size * 2 // 3
    full = run(
        texts, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    )
    assert full.returncode != 0 and "the same command goes on from 'checkpoint-4'" in full.stderr
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3", "checkpoint-4"]


def test_a_stream_resumes_as_well(texts, tmp_path):
    for name in ("whole", "killed"):
        if name == "killed":
            stop(texts, tmp_path / name, signal.SIGKILL, "--streaming", "true")
        result = run(texts, tmp_path / name, "--streaming", "true")
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_processes_train_as_one(texts, tmp_path, streaming):
    """Two processes with half of the rows each, over gloo. Routing is balanced per process, hence without that loss."""
    exact = ["--config_overrides", json.dumps({**SMALL, "router_jitter_noise": 0, "router_aux_loss_coef": 0})]
    exact += ["--streaming", streaming]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    one = run(texts, tmp_path / "one", *exact)
    two = run(texts, tmp_path / "two", *exact, "--per_device_train_batch_size", "4", launcher=launcher)
    for result in (one, two):
        assert result.returncode == 0, result.stderr
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    for key, (loss, norm) in losses(tmp_path / "two").items():
        assert (loss, norm) == pytest.approx(losses(tmp_path / "one")[key], rel=1e-4)


SHARDED = """
import sys
import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from safetensors.torch import save_file
from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM
import json

dist.init_process_group("gloo")
sharded, config, output = sys.argv[1] == "sharded", json.loads(sys.argv[2]), sys.argv[3]
set_seed(0)
model = ModernAlbertForMaskedLM(ModernAlbertConfig.preset("nano", vocab_size=64, **config)).train()
if sharded:
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
world, rank = (dist.get_world_size(), dist.get_rank()) if sharded else (1, 0)
for step in range(3):
    ids = torch.randint(5, 64, (4, 16), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if dist.get_rank() == 0:
    state.pop("decoder.weight", None)  # tied
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, output)
dist.destroy_process_group()
"""


def test_sharding_by_blocks_trains_as_one_process(tmp_path):
    """FSDP2 as `recipes/fsdp.yaml` wraps it, over gloo: a block is sharded once and runs three times in a row."""
    config = {**SMALL, "num_hidden_layers": 6, "router_jitter_noise": 0, "router_aux_loss_coef": 0}
    (tmp_path / "train.py").write_text(SHARDED)
    for name, processes in (("sharded", "2"), ("whole", "1")):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        arguments = [str(tmp_path / "train.py"), name, json.dumps(config), str(tmp_path / f"{name}.safetensors")]
        result = subprocess.run(launcher + arguments, capture_output=True, text=True, env=environment(tmp_path))
        assert result.returncode == 0, result.stderr
    sharded, whole = (load_file(tmp_path / f"{name}.safetensors") for name in ("sharded", "whole"))
    assert len(whole) > 20
    assert_close(sharded, whole, rtol=1e-4, atol=1e-5)
