"""transformers architectures as Jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plait.capture.target import load_target
from plait.errors import TargetError

TEXT = "hidden_size=32&num_hidden_layers=2&num_attention_heads=4&vocab_size=320"
WAVE = "conv_dim=16,16,16,16,16,16,16&num_conv_pos_embeddings=16&num_conv_pos_embedding_groups=4"
SMALL = {
    "gpt2": TEXT,
    "llama": f"{TEXT}&num_key_value_heads=2&intermediate_size=64",
    "phi3": f"{TEXT}&num_key_value_heads=2&intermediate_size=64",  # whose padding token lies outside 320
    "mixtral": f"{TEXT}&num_key_value_heads=2&intermediate_size=64&num_local_experts=4",
    "xlnet": "d_model=32&n_layer=2&n_head=4&d_inner=64&vocab_size=320",  # predicts the first token too
    "zamba": "hidden_size=32&num_hidden_layers=2&num_attention_heads=4&num_key_value_heads=4&intermediate_size=64"
    "&vocab_size=320&mamba_d_state=4&mamba_dt_rank=4",  # lists a kind for each of its 76 layers
    "mamba": "hidden_size=32&num_hidden_layers=2&vocab_size=320&state_size=4&time_step_rank=4",
    "bert": f"{TEXT}&intermediate_size=64",
    "t5": "d_model=32&num_layers=2&num_heads=4&d_kv=8&d_ff=64&vocab_size=320",
    "bart": "d_model=32&encoder_layers=1&decoder_layers=1&encoder_attention_heads=4&decoder_attention_heads=4"
    "&encoder_ffn_dim=64&decoder_ffn_dim=64&vocab_size=320",
    "vit": "hidden_size=32&num_hidden_layers=2&num_attention_heads=4&intermediate_size=64&image_size=32&patch_size=8",
    "deit": "hidden_size=32&num_hidden_layers=2&num_attention_heads=4&intermediate_size=64&image_size=32&patch_size=8",
    "convnext": "depths=1,1,1,1&hidden_sizes=8,8,16,16&image_size=32",
    "wav2vec2": f"hidden_size=32&num_hidden_layers=2&num_attention_heads=4&intermediate_size=64&{WAVE}",
    "whisper": "d_model=32&encoder_layers=1&decoder_layers=1&encoder_attention_heads=4&decoder_attention_heads=4"
    "&encoder_ffn_dim=64&decoder_ffn_dim=64&vocab_size=320&max_source_positions=16&num_mel_bins=8",
}
TASK = {"bert": "MaskedLM", "t5": "ConditionalGeneration", "bart": "ConditionalGeneration", "whisper": "ForConditional"}


@pytest.mark.parametrize("model_type", SMALL)
def test_forward_and_backward(model_type: str):
    """Each kind of architecture computes its own loss of a random batch, in training mode."""
    job = load_target(f"hf:{model_type}?{SMALL[model_type]}&seq_len=16&samples=3")
    assert callable(job.model)
    model = job.model()
    inputs, targets = job.batch
    loss = model(**inputs).loss
    loss.backward()

    assert model.training
    assert torch.isfinite(loss)
    assert all(value.shape[0] == 3 for value in inputs.values())
    assert inputs["labels"] is targets
    assert TASK.get(model_type, "") in type(model).__name__
    assert job.loss_weight is None or job.loss_weight(targets) > 0


@pytest.mark.parametrize("model_type", ["llama", "bert", "t5", "vit"])
def test_exports(model_type: str):
    """The batch is what torch.export takes, as keyword arguments."""
    job = load_target(f"hf:{model_type}?{SMALL[model_type]}&seq_len=8")
    exported = torch.export.export(job.model(), (), job.batch[0], strict=False)

    assert len(list(exported.graph.nodes)) > 20


@pytest.mark.parametrize(
    ("model_type", "task"),
    [("llama", "causal-lm"), ("xlnet", "causal-lm"), ("bert", "masked-lm"), ("t5", "seq2seq-lm")],
)
def test_the_mean_of_parts_is_the_whole(model_type: str, task: str):
    """Losses of the parts of a batch, averaged with `loss_weight`, are the loss of the batch."""
    job = load_target(f"hf:{model_type}?{SMALL[model_type]}&seq_len=16&task={task}")
    model = job.model().eval()
    inputs, targets = job.batch
    parts, weights = [], []
    with torch.no_grad():
        whole = model(**inputs).loss
        for rows in (slice(0, 1), slice(1, 4)):
            parts.append(model(**{k: v[rows] for k, v in inputs.items()}).loss)
            weights.append(float(job.loss_weight(targets[rows])))

    mean = sum(p * w for p, w in zip(parts, weights, strict=True)) / sum(weights)
    assert weights[0] * 3 != weights[1] or model_type == "t5"  # parts count differently
    torch.testing.assert_close(mean, whole)


def test_builds_are_equal_from_one_seed():
    """A second build from the same seed has the very same weights."""
    job = load_target(f"hf:gpt2?{SMALL['gpt2']}")
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        states.append(job.model().state_dict())

    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_nothing_is_drawn_outside_the_graph():
    """LayerDrop and SpecAugment are off unless the target asks for them; so is the cache."""
    default = load_target(f"hf:wav2vec2?{SMALL['wav2vec2']}").model().config
    asked = load_target(f"hf:wav2vec2?{SMALL['wav2vec2']}&layerdrop=0.2").model().config

    assert (default.layerdrop, default.apply_spec_augment) == (0.0, False)
    assert asked.layerdrop == 0.2
    assert load_target(f"hf:gpt2?{SMALL['gpt2']}").model().config.use_cache is False


def test_aliases_and_parts_of_a_config():
    """The common names work where a config has its own, and parts are reached with dots."""
    gpt2 = load_target("hf:gpt2?num_hidden_layers=3&hidden_size=32&n_head=4&vocab_size=300").model().config
    clip = (
        load_target(
            "hf:clip?vision_config.hidden_size=32&vision_config.num_hidden_layers=1"
            "&vision_config.num_attention_heads=4&vision_config.image_size=32"
        )
        .model()
        .config
    )

    assert (gpt2.n_layer, gpt2.n_embd) == (3, 32)
    assert clip.vision_config.hidden_size == 32


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("hf:lama", "no model type 'lama'; did you mean '.*llama"),
        ("hf:llama?hiden_size=64", "no key 'hiden_size'; did you mean 'hidden_size'"),
        ("hf:llama?hidden_size=big", "hidden_size=big is not a whole number"),
        ("hf:clip?text_confg.hidden_size=8", "no part 'text_confg'; did you mean 'text_config'"),
        ("hf:gemma3?num_hidden_layers=2", "did you mean 'text_config.num_hidden_layers'"),
        ("hf:llama?task=dance", "unknown task 'dance'"),
        ("hf:vit?task=causal-lm", "has no head for causal-lm"),
        ("hf:llama?seq_len=1", "seq_len=1 must be at least 2"),
        ("hf:gpt2?n_positions=16&seq_len=32", "seq_len=32 is more than the model's 16 positions"),
        ("hf:mamba2?hidden_size=64", "the config refuses: .*hidden_size"),
        ("hf:./no/such/folder", "no such folder"),
        ("hf:no/such", "no such folder"),
    ],
)
def test_a_mistake_is_answered_with_the_nearest_key(target: str, message: str):
    """Status 2, what was wrong, and what was probably meant."""
    with pytest.raises(TargetError, match=message):
        load_target(target)


def test_a_folder_gives_its_weights(tmp_path: Path):
    """config.json and model.safetensors of a folder are the model, whatever the seed."""
    made = load_target(f"hf:gpt2?{SMALL['gpt2']}").model()
    made.save_pretrained(tmp_path / "mine")
    job = load_target(f"hf:{tmp_path / 'mine'}?seq_len=8&resid_pdrop=0")
    torch.manual_seed(5)
    loaded = job.model()

    assert job.name == "hf:mine"
    assert job.weights == tmp_path / "mine"
    assert loaded.config.resid_pdrop == 0
    assert all(torch.equal(p, loaded.state_dict()[n]) for n, p in made.state_dict().items())


def test_a_folder_without_a_config(tmp_path: Path):
    """A folder that is no checkpoint is refused."""
    with pytest.raises(TargetError, match=r"has no config\.json"):
        load_target(f"hf:{tmp_path}")


def test_features_stand_in_where_a_type_has_no_head():
    """The bare model, with the mean square of its output as the loss."""
    job = load_target("hf:bert?" + SMALL["bert"] + "&task=features&seq_len=8")
    inputs, targets = job.batch
    loss = job.loss(job.model()(**inputs), targets)

    assert "labels" not in inputs
    assert loss.requires_grad
