"""The command for a GPU, tried on a CPU."""

import json
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, TEXTS, VOCAB, load_script
from safetensors import safe_open

from modernalbert.mixture_modernalbert import mix_dense
from modernalbert.tokenization import save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def gpu():
    return load_script("gpu", ROOT / "benchmarks")


def test_it_needs_no_package_for_export_or_metrics():
    """A rented machine may lack them: neither this command nor the script that it trains with imports them."""
    missing = ("onnx", "onnxruntime", "onnxscript", "evaluate", "flash_attn")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); sys.path[:0] = ['benchmarks', 'scripts']"
    subprocess.run([sys.executable, "-c", f"{code}; import gpu, pretrain"], check=True, cwd=ROOT)


def run(gpu, folder, *arguments):
    gpu.main(["--device", "cpu", "--repeats", "1", "--output_dir", str(folder), *arguments])
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_equality_speed_and_mixture_are_measured(gpu, tmp_path, capsys):
    found = run(gpu, tmp_path, "--stages", "equality", "speed", "mixture")
    assert found["machine"]["torch"] == torch.__version__
    assert {"eager, torch.float32, padded", "sdpa, torch.bfloat16, folded"} < found["equality"].keys()
    for title in ("nano, 4 x 128 at 100%, forward", "nano, 4 x 128 at 60%, training step"):
        assert not found["speed"][title]["failed"] and found["speed"][title]["ours, routed"]["mfu"] > 0
    assert found["mixture"]["recomputed, error"] == 0 and found["mixture"]["grouped, CPU, error"] < 1e-5
    assert "| plain layer, forward and backward |" in capsys.readouterr().out


def test_the_grouped_product_is_the_mixture():
    generator = torch.Generator().manual_seed(0)
    script = load_script("gpu", ROOT / "benchmarks")

    def glu(projected):
        gate, value = projected.chunk(2, dim=-1)
        return gate.tanh() * value

    tokens, experts, rank, width = 33, 5, 8, 16
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])  # none chooses the last
    shapes = [(tokens, 2 * width), (tokens, experts, rank), (tokens, 2), (experts, 2 * width, rank)]
    tensors = [
        torch.randn(shape, generator=generator, requires_grad=True) for shape in [*shapes, (experts, rank, width)]
    ]
    results = []
    for mix in (mix_dense, script.mix_grouped):
        outputs = mix(glu, 0.5, *tensors[:3], chosen, *tensors[3:])
        results.append((outputs, torch.autograd.grad([output.sum() for output in outputs], tensors)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_an_implementation_that_disagrees_is_named(gpu, tmp_path, monkeypatch):
    """And the stages after it run."""
    right = gpu.outputs_and_gradients

    def wrong(model, batch):
        states, gradients = right(model, batch)
        return states * (1.01 if model.config._attn_implementation == "sdpa" else 1), gradients

    monkeypatch.setattr(gpu, "outputs_and_gradients", wrong)
    with pytest.raises(SystemExit, match="failed: equality"):
        run(gpu, tmp_path, "--stages", "equality", "mixture")
    assert not (tmp_path / "equality.json").exists() and (tmp_path / "mixture.json").exists()


def test_a_failed_test_leaves_its_log(gpu, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    code = "import pytest\n\n\n@pytest.mark.gpu\ndef test_sum():\n    assert 1 + 1 == 3\n"
    (tmp_path / "tests" / "test_sums.py").write_text(code)
    monkeypatch.setattr(gpu, "TESTS", tmp_path / "tests")
    with pytest.raises(SystemExit, match="failed: tests"):
        run(gpu, tmp_path / "out", "--stages", "tests")
    assert "assert (1 + 1) == 3" in (tmp_path / "out" / "tests.log").read_text()


def test_nothing_is_begun_without_time(gpu, tmp_path, capsys):
    assert run(gpu, tmp_path, "--minutes", "1e-9").keys() == {"machine"}
    assert "no time is left" in capsys.readouterr().out


class EnoughTime:
    """In the place of the benchmark's clock: after a probe there are 3 seconds for steps, however slow the machine is."""

    def __init__(self, minutes: float):
        self.start = time.monotonic()

    @property
    def left(self) -> float:
        return time.monotonic() - self.start + 8  # 5 of which are for the files


@pytest.mark.slow
def test_training_takes_the_time_that_is_left(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "Clock", EnoughTime)
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=VOCAB), tmp_path / "tokenizer")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 20))
    shape = '{"hidden_size": 32, "intermediate_size": 32, "mol_intermediate_size": 32, "num_attention_heads": 2}'
    arguments = f"--preset nano --config_overrides '{shape}' --tokenizer {tmp_path / 'tokenizer'} --max_length 32"
    arguments += f" --train_data {tmp_path / 'texts.txt'} --per_device_train_batch_size 4 --logging_steps 1"
    found = run(
        *(gpu, tmp_path / "out", "--stages", "train", "--probe_steps", "2"),
        *("--train_arguments", arguments),
    )
    assert 2 < found["train"]["steps"] < 10_000
    with safe_open(tmp_path / "out" / "train" / "float16" / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("model.final_norm.weight").dtype == torch.float16
