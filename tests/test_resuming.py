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
from helpers import load_script
from safetensors.torch import load_file
from torch.testing import assert_close

import modernalbert
from modernalbert.tokenization import save_tokenizer, train_tokenizer
from modernalbert.training.runs import last_checkpoint


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
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_DATASETS_CACHE": str(texts / "cache"),
    }


def run(texts, output_dir, *extra, launcher=(sys.executable,), **options):
    arguments = command(texts, output_dir, *extra, launcher=launcher)
    return subprocess.run(arguments, env=environment(texts), capture_output=True, text=True, **options)


def run_here(texts, output_dir, *extra):
    """The same without a process, where none is needed: starting one takes longer than the run."""
    load_script("pretrain").main(command(texts, output_dir, *extra)[2:])


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
    run_here(texts, output_dir)
    return output_dir


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "terminate"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(texts, uninterrupted, tmp_path, number):
    """Bit for bit: losses, gradient norms and weights."""
    status, messages = stop(texts, tmp_path, number)
    assert not (tmp_path / "results.json").exists(), "the run ended before the signal reached it"
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 143 and "the same command goes on from there" in messages
    run_here(texts, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, uninterrupted))
    assert_close(weights, expected, rtol=0, atol=0)
    assert json.loads((tmp_path / "results.json").read_text())["tokens"] == 12 * 8 * 32


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_a_run_killed_after_its_last_step_takes_no_further_one(texts, uninterrupted, tmp_path, caplog, damaged):
    """From the last checkpoint, or where that is damaged, from the one before."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    for name in ("results.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    if damaged:
        path = tmp_path / "run" / "checkpoint-12" / "optimizer.pt"
        path.write_bytes(path.read_bytes()[:1000])
    run_here(texts, tmp_path / "run")
    assert ("going on from the older" in caplog.text) == damaged
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", uninterrupted))
    assert_close(weights, expected, rtol=0, atol=0)
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (uninterrupted, tmp_path / "run"))
    for name in ("commit", *(["seconds"] if damaged else [])):  # someone may commit between the runs
        before.pop(name), after.pop(name)
    assert after == before


def test_another_command_does_not_go_on_from_a_run(texts, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "other.jsonl").write_text((texts / "texts.jsonl").read_text() + '{"text": "one more"}\n')
    other = ["--train_data", str(tmp_path / "other.jsonl"), "--learning_rate", "2e-2", "--data_seed", "5"]
    with pytest.raises(ValueError, match="holds checkpoints of a run with other settings") as refusal:
        run_here(texts, tmp_path / "run", *other)
    for name in ("data_seed: None before, 5 now", "learning_rate: 0.01 before, 0.02 now", "train_data: "):
        assert name in str(refusal.value)


def test_a_full_disk_costs_no_checkpoint(texts, uninterrupted, tmp_path):
    """The weights of a checkpoint still fit, the optimizer's state does not: as on a disk that fills up."""
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    for name in ("results.json", "model.safetensors"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "checkpoint-12")
    whole = last_checkpoint(tmp_path).name
    room = 2 * (uninterrupted / "model.safetensors").stat().st_size * 2 // 3
    full = run(
        texts, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    )
    assert full.returncode != 0 and f"the same command goes on from '{whole}'" in full.stderr
    assert last_checkpoint(tmp_path).name == whole


def test_a_stream_resumes_as_well(texts, tmp_path):
    for name in ("whole", "killed"):
        if name == "killed":
            stop(texts, tmp_path / name, signal.SIGKILL, "--streaming", "true")
        run_here(texts, tmp_path / name, "--streaming", "true")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("argument", "layers"), [("--streaming", 2), ("--elastic_depth", 4)])
def test_two_processes_train_as_one(texts, tmp_path, argument, layers):
    """Two processes with half of the rows each, over gloo. Routing is balanced per process, hence without that loss."""
    config = {**SMALL, "num_hidden_layers": layers, "router_jitter_noise": 0, "router_aux_loss_coef": 0}
    exact = ["--config_overrides", json.dumps(config)]
    exact += [argument, "true"]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run_here(texts, tmp_path / "one", *exact)
    two = run(texts, tmp_path / "two", *exact, "--per_device_train_batch_size", "4", launcher=launcher)
    assert two.returncode == 0, two.stderr
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

rank, world, config, output = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
# A file in place of a port, which another process may take first.
dist.init_process_group("gloo", init_method=f"file://{output}.store", rank=rank, world_size=world)
set_seed(0)
model = ModernAlbertForMaskedLM(ModernAlbertConfig.preset("nano", vocab_size=64, **config)).train()
if world > 1:
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
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
    for name, world in (("sharded", 2), ("whole", 1)):
        rest = [str(world), json.dumps(config), str(tmp_path / f"{name}.safetensors")]
        processes = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "train.py"), str(rank), *rest],
                env=environment(tmp_path),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        for process in processes:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    sharded, whole = (load_file(tmp_path / f"{name}.safetensors") for name in ("sharded", "whole"))
    assert len(whole) > 20
    assert_close(sharded, whole, rtol=1e-4, atol=1e-5)
