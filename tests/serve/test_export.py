"""`plait export` from end to end, with small models and with backends that fail."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import Mlp, Tagger, mlp_job, tagger_batch

import plait
import plait.serve
from plait.errors import CheckpointError, ServeError, TargetError
from plait.serve.loss import task_loss
from plait.serve.manifest import FORMAT
from plait.serve.source import source_of

EXAMPLE = "examples/digits.py:job"


def rows(report) -> dict[str, dict]:
    return {row["backend"]: row for row in report["rows"]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with given weights, exported once for several tests."""
    out = tmp_path_factory.mktemp("exports")
    model = Tagger().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = plait.export(
        model, "torch,onnxruntime,openvino", inputs=tagger_batch(), output=out, batch=(1, 3), threads=1, seconds=0
    )
    return model, before, report, out


def test_runtimes_hold_parity_on_every_size(exported):
    """Batch 1, 2, 3, a shorter length and the least, each within 1e-5 of eager."""
    _, _, report, _ = exported

    for row in report["rows"]:
        assert row["status"] == "ok", row
        sizes = [(one["sizes"]["batch"], one["sizes"]["length"]) for one in row["parity"]]
        assert sizes == [(2, 12), (1, 12), (3, 12), (2, 8), (2, 1)]
        assert max(one["max_rel"] for one in row["parity"]) <= 1e-5
        assert "perturbed" not in row


def test_the_users_model_is_left_as_it_was(exported):
    """Mode and weights."""
    model, before, _, _ = exported

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_an_artefact_loads_and_runs(exported, backend):
    """Tensors in, tensors out, by position or name; arrays in, arrays out; a batch that was not exported."""
    model, _, _, out = exported
    served = plait.serve.load(out / backend, threads=1)
    tokens, mask = tagger_batch(3, 7)
    with torch.no_grad():
        want = model.eval()(tokens, mask)["logits"]
    model.train()

    assert torch.allclose(served(tokens, mask)["logits"], want, atol=1e-5)
    assert torch.allclose(served(mask=mask, tokens=tokens)["logits"], want, atol=1e-5)
    arrays = served(tokens.numpy(), mask.numpy())
    assert isinstance(arrays["logits"], np.ndarray)
    assert np.allclose(arrays["logits"], want.numpy(), atol=1e-5)


def test_shapes_outside_of_the_export_are_refused(exported):
    """With what it is and what it may be."""
    _, _, _, out = exported
    served = plait.serve.load(out / "onnxruntime", threads=1)
    tokens, mask = tagger_batch(2, 12)

    with pytest.raises(
        ServeError, match=r"tokens has shape \(4, 12\), it was exported for \[batch, length\] with batch 1 to 3"
    ):
        served(*tagger_batch(4, 12))
    with pytest.raises(ServeError, match="length 1 to 12"):
        served(torch.zeros(2, 13, dtype=torch.int64), torch.ones(2, 13))
    with pytest.raises(ServeError, match="mask has shape"):
        served(tokens, torch.ones(2, 11))
    with pytest.raises(ServeError, match="tokens is int32, it takes int64"):
        served(tokens.int(), mask)
    with pytest.raises(ServeError, match="input 'mask' is missing"):
        served(tokens)
    with pytest.raises(ServeError, match="no input 'tokns'"):
        served(tokns=tokens, mask=mask)
    with pytest.raises(ServeError, match="not a tensor"):
        served([[1]], mask)
    with pytest.raises(ServeError, match="no entry point 'decode'"):
        served.entry("decode")


def test_the_torch_artefact_has_the_users_names(exported):
    """safetensors under the names of the model."""
    from safetensors.torch import load_file

    model, _, _, out = exported
    held = load_file(out / "torch" / "model.safetensors")

    assert {name: value.shape for name, value in held.items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert torch.equal(held["head.weight"], model.head.weight)


def test_the_report_is_saved(exported):
    """report.json is what export returned; a manifest beside each artefact says what it is."""
    _, _, report, out = exported
    manifest = json.loads((out / "openvino" / "manifest.json").read_text())

    assert json.loads((out / "report.json").read_text())["weights_sha256"] == report["weights_sha256"]
    assert manifest["weights_sha256"] == report["weights_sha256"]
    assert manifest["versions"]["openvino"]
    assert manifest["entries"]["forward"]["dims"] == {"batch": [1, 3], "length": [1, 12]}


def test_each_failure_stays_its_own(more_backends, tmp_path):
    """A crash, a full disk, a wrong result, lost biases and an unknown operator are rows; the one that works is there."""
    names = "aborts,full,wrong,forgets,refuses,absent,program"
    report = plait.export(mlp_job(), names, output=tmp_path / "out", batch=(1, 2), threads=1, seconds=0, compiled=False)
    found = rows(report)

    assert "ended by SIGABRT while exporting" in found["aborts"]["error"]
    assert found["full"]["error"].startswith("the disk is full")
    assert "it does not compute what eager does: relative error 0.001" in found["wrong"]["error"]
    assert "it does not compute what eager does" in found["forgets"]["error"]
    assert found["refuses"]["operator"] == "aten.gelu.default"
    assert "small_models.py" in found["refuses"]["where"]
    assert found["absent"]["status"] == "missing"
    assert "pip install 'plait[absent]'" in found["absent"]["error"]
    assert found["program"]["status"] == "ok"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["program", "report.json", "serve.sh"]


def test_sizes_are_closed_where_a_runtime_cannot_leave_them_open(more_backends, tmp_path):
    """It serves the sample's length with any batch, says so and why, and refuses others."""
    report = plait.export(
        Tagger(), "static", inputs=tagger_batch(), output=tmp_path, batch=(1, 3), threads=1, seconds=0
    )
    row = report["rows"][0]
    served = plait.serve.load(tmp_path / "static", threads=1)

    assert row["status"] == "ok", row
    assert row["facts"]["note"] == "serves length 12 only (a length has to be a number)"
    assert served(*tagger_batch(3, 12))["logits"].shape == (3, 12, 5)
    with pytest.raises(ServeError, match="length 12 to 12"):
        served(*tagger_batch(3, 8))


def test_a_backend_that_hangs_is_stopped(more_backends, tmp_path):
    """At its time limit, and the report says what it was doing."""
    report = plait.export(mlp_job(), "sleeps", output=tmp_path, batch=2, threads=1, seconds=0, limit=6)

    assert "stopped after its time limit of 6 s while checking" in report["rows"][0]["error"]


def test_an_older_artefact_survives_a_failure(more_backends, tmp_path):
    """What is under the final name stays until a new one is whole."""
    old = tmp_path / "aborts"
    old.mkdir()
    manifest = json.dumps({"format": FORMAT})
    (old / "manifest.json").write_text(manifest)
    plait.export(mlp_job(), "aborts", output=tmp_path, batch=2, threads=1, seconds=0)

    assert (old / "manifest.json").read_text() == manifest


def test_timing_has_eager_in_turn(tmp_path):
    """Latencies of the runtime and of the user's own module, for each batch and number of threads; the best is marked."""
    report = plait.export(
        EXAMPLE, "onnxruntime", output=tmp_path, batch=(1, 4), threads=(1, 2), seconds=0.05, compiled=False
    )
    latencies = report["rows"][0]["latency"]

    assert [(one["batch"], one["threads"]) for one in latencies] == [(1, 1), (4, 1), (1, 2), (4, 2)]
    assert {one["baseline"] for one in latencies} == {"own"}
    assert all(one["backend"]["p50_ms"] <= one["backend"]["p99_ms"] for one in latencies)
    assert len(report["best"]) == 4
    assert report["rows"][0]["serve_peak_bytes"] > 2**20


def test_random_weights_are_moved_for_parity_alone(tmp_path):
    """A model fresh from its function is checked with moved weights too, and exported with its own."""
    report = plait.export(mlp_job(), "torch", output=tmp_path, batch=2, threads=1, seconds=0)
    row = report["rows"][0]
    x = mlp_job().batch[0][:2]
    model = source_of(mlp_job()).module.eval()

    assert report["weights"] == "random"
    assert row["perturbed"]
    with torch.no_grad():
        assert torch.equal(plait.serve.load(tmp_path / "torch", threads=1)(x), model(x))


def test_int8_says_what_it_costs_on_the_data(tmp_path):
    """Differences, cosine, agreement of the top class and the task's loss, in fp32 and in int8."""
    report = plait.export(
        mlp_job(64, data=True), "onnxruntime", precision="fp32,int8", output=tmp_path, batch=6, threads=1, seconds=0
    )
    exact, lower = (row["data"] for row in report["rows"])

    assert lower["loss_fp32"] == exact["loss_fp32"]
    assert exact["loss"] == pytest.approx(exact["loss_fp32"], rel=1e-6)
    assert lower["loss"] != lower["loss_fp32"]
    assert 0.99 < lower["cosine"] < 1
    assert lower["max_abs"] > lower["mean_abs"] > 0
    assert report["rows"][1]["bytes"] < report["rows"][0]["bytes"]


def test_a_precision_that_a_runtime_lacks_is_a_row(tmp_path):
    """And one that nobody has is refused at once."""
    report = plait.export(mlp_job(), "onnxruntime", precision="bf16", output=tmp_path, batch=2, threads=1, seconds=0)

    assert report["rows"][0]["status"] == "refused"
    assert "onnxruntime has no bf16 here; it has fp32, fp16, int8, int8-weight" in report["rows"][0]["error"]
    with pytest.raises(ServeError, match="no precision 'int88'; did you mean 'int8'"):
        plait.export(mlp_job(), "torch", precision="int88")
    with pytest.raises(ServeError, match="--batch 0"):
        plait.export(mlp_job(), "torch", batch=0)
    with pytest.raises(ServeError, match=r"--threads 9999, this computer has \d+ processors"):
        plait.export(mlp_job(), "torch", threads=9999)


def test_labels_are_not_served_and_the_loss_is_found():
    """A transformers model is served without labels, and its own loss is had from logits and labels."""
    pytest.importorskip("transformers")
    target = "hf:llama?hidden_size=16&num_hidden_layers=1&num_attention_heads=2&num_key_value_heads=1&vocab_size=256&intermediate_size=16&seq_len=8"
    source = source_of(target)

    assert list(source.served(source.job.batch)) == ["input_ids"]
    loss = task_loss(source)
    assert loss is not None
    inputs, targets = source.job.batch
    with torch.no_grad():
        want = source.module.eval()(**inputs).loss
        outputs = source.module(input_ids=inputs["input_ids"])
    assert float(loss(dict(outputs), targets)) == pytest.approx(float(want), rel=1e-6)


def test_decoder_inputs_are_the_labels_shifted():
    """Where the model does it by itself without a public function for it; the logits are the same."""
    pytest.importorskip("transformers")
    sizes = "d_model=16&encoder_layers=1&decoder_layers=1&encoder_attention_heads=2&decoder_attention_heads=2&encoder_ffn_dim=16"
    tokens = "decoder_ffn_dim=16&vocab_size=64&pad_token_id=0&bos_token_id=1&eos_token_id=2&decoder_start_token_id=3"
    source = source_of(f"hf:whisper?{sizes}&{tokens}&max_source_positions=20")
    served = source.served(source.job.batch)

    assert sorted(served) == ["decoder_input_ids", "input_features"]
    with torch.no_grad():
        want = source.module.eval()(**source.job.batch[0]).logits
        assert torch.equal(source.module(**served).logits, want)


def _raises():
    raise ValueError("no such size")


def test_what_cannot_be_exported_at_all(tmp_path):
    """A module without inputs, a name that is nothing, a directory without a checkpoint."""
    with pytest.raises(TargetError, match="needs sample inputs"):
        plait.export(Mlp(), "torch")
    with pytest.raises(TargetError, match="no such run directory, and no target"):
        plait.export(str(tmp_path / "absent"), "torch")
    with pytest.raises(TargetError, match=r"model\(\) raised ValueError at .*test_export.py:\d+: .*\(no such size\)"):
        plait.export(plait.Job(_raises, loss=None, batch=(torch.randn(2, 3), None)), "torch")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        plait.export(tmp_path, "torch")
    with pytest.raises(ServeError, match="this one brings its own data"):
        plait.export(EXAMPLE, "torch", data=tmp_path, output=tmp_path)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run of two processes with its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    words = ["train", EXAMPLE, "--devices", "2", "--plan", "dp=2", "--steps", "2", "--run-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "plait", *words], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.multi
def test_a_run_directory_is_exported_with_its_weights(run_dir):
    """It says itself what it trained; the artefact has the checkpoint's weights, unmoved."""
    from plait.run.checkpoint import iterate_whole, latest

    report = plait.export(run_dir, "torch", batch=2, threads=1, seconds=0)
    directory = latest(run_dir)
    assert directory is not None
    program = torch.export.load(run_dir / "exports" / "torch" / "forward.pt2")

    assert report["weights"] == "given"
    assert "perturbed" not in report["rows"][0]
    for name, value in iterate_whole(directory):
        assert torch.equal(program.state_dict[f"model.{name}"], value)


@pytest.mark.multi
def test_a_checkpoint_of_another_model_is_refused(run_dir):
    """With the first name that does not fit; and a run that does not say what it trained asks for it."""
    with pytest.raises(CheckpointError, match=r"it is of another model: .* has shape"):
        plait.export(run_dir, "torch", target="examples/gpt.py:job?layers=1&width=64")
    (run_dir / "run.json").rename(run_dir / "kept.json")
    with pytest.raises(CheckpointError, match=r"run.json does not say what was trained"):
        plait.export(run_dir, "torch")
    (run_dir / "kept.json").rename(run_dir / "run.json")


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path):
    """A limit on the size of files stands in for the disk: status 1, one line, no traceback, no artefact."""
    words = ["export", "examples/gpt.py:job?layers=1&width=64&length=16", "--to", "torch", "-o", str(tmp_path / "out")]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = subprocess.run(
        [sys.executable, "-m", "plait", *words, "--seconds", "0", "--batch", "2", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        preexec_fn=limited,
    )

    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "disk" in done.stdout + done.stderr
    assert not (tmp_path / "out" / "torch").exists()


def test_a_model_that_memory_does_not_hold_is_refused():
    """Before it is built."""
    pytest.importorskip("transformers")
    with pytest.raises(TargetError, match=r"needs about \d+\.\d GiB while it is exported"):
        plait.export(
            "hf:llama?hidden_size=16384&num_hidden_layers=64&intermediate_size=65536&num_attention_heads=64", "torch"
        )
