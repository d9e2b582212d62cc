"""`hf:MODEL_TYPE?...` and `hf:FOLDER`: a transformers architecture as a Job, without a download.

The config is the type's default with what the target says changed; the head is the one for the type's usual task.
Of the model itself nothing is changed but two choices of its config: no key-value cache (it is for generation),
and nothing that Python draws by chance while the forward runs (LayerDrop, SpecAugment), which no captured graph can
hold; a target that names these keys gets what it asks for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plait.capture.arguments import convert, nearest
from plait.capture.job import Job
from plait.capture.pretrained import load_mapped
from plait.errors import TargetError

__all__ = ["CAPTURE_CHOICES", "TASKS", "TextNeeds", "TransformersJob", "transformers_job"]

# Task -> (Auto class, its table of model types). The order is the order of preference; `_usual_task` has the exceptions.
TASKS = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked-lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "speech-seq2seq": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "image-classification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "audio-classification": ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    "ctc": ("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES"),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "token-classification": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "features": ("AutoModel", "MODEL_MAPPING_NAMES"),
}
_TEXT_TASKS = ("causal-lm", "masked-lm", "seq2seq-lm")
_TOKEN_TASKS = (*_TEXT_TASKS, "speech-seq2seq", "token-classification", "ctc")

# Arguments of the target that are ours and not the config's.
_OWN = {"task": str, "seq_len": int, "samples": int, "lr": float}

_NO_CACHE = {"use_cache": False}
# Drawn by Python or numpy in training mode, outside the graph.
_CHANCE = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "apply_spec_augment": False}
CAPTURE_CHOICES = {**_NO_CACHE, **_CHANCE}
"""Keys of a config that differ from what the folder or the type has, for capture's sake, and their values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextNeeds:
    """How a text becomes samples for a model."""

    task: str
    length: int
    """Tokens in a sample."""
    vocabulary: int
    mask_token: int
    attention_mask: bool
    """Whether the model is given an attention mask."""
    tokenizer: str | None = None
    """Folder of the tokenizer; None: bytes are tokens."""


@dataclass
class TransformersJob(Job):
    """A Job that can also be trained on text."""

    text: TextNeeds | None = None
    """None: the model does not read text."""
    weights: Path | None = None
    """Folder with the weights to start from; None: new ones."""


def transformers_job(name: str, arguments: Mapping[str, str]) -> TransformersJob:
    """A Job for a model type or a folder with config.json and weights; its batch is random and of the right shape.

    Raises:
        TargetError: an unknown type, task or config key, no such folder, or a config that the model refuses.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise TargetError("target hf: transformers is not installed", hint="pip install 'plait[hf]'") from None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    own = {
        key: convert(arguments[key], kind, f"target hf:{name}: {key}") for key, kind in _OWN.items() if key in arguments
    }
    given = {key: value for key, value in arguments.items() if key not in _OWN}
    folder = _folder(name)
    model_type, config = _config_of_folder(folder, given) if folder else _config_of_type(name, given)
    task = _task(own.get("task"), model_type, config)
    auto = getattr(transformers, TASKS[task][0])
    model_class = auto._model_mapping[type(config)]
    if isinstance(model_class, list | tuple):
        model_class = model_class[0]
        config.architectures = config.architectures or [model_class.__name__]
    shape = _Shape(config, model_class, task, own.get("seq_len"), given, f"target hf:{name}")
    inputs, targets = shape.batch(own.get("samples", 4))
    lr = own.get("lr", 3e-4)

    return TransformersJob(
        _builder(auto, config, folder),
        batch=(inputs, targets),
        loss=_mean_square if task == "features" else None,
        loss_weight={"causal-lm": _later_labels, "ctc": None}.get(task, _labels if task in _TOKEN_TASKS else None),
        optimizer=lambda named: torch.optim.AdamW(named, lr),
        name=f"hf:{Path(name).name if folder else model_type}",
        text=shape.text_needs(folder) if task in _TEXT_TASKS else None,
        weights=folder,
    )


def _builder(auto: Any, config: Any, folder: Path | None) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        import copy

        # A model writes into its config; every build starts from the same one.
        own = copy.deepcopy(config)
        model = auto.from_config(own, dtype=torch.float32)
        on_meta = next(model.parameters()).is_meta
        if folder is not None and not on_meta and not load_mapped(model, folder):
            # Other names than the model's own: transformers knows how to convert them, but reads everything.
            model = auto.from_pretrained(
                folder, config=copy.deepcopy(config), dtype=torch.float32, local_files_only=True
            )
        model.train()
        return model  # type: ignore[no-any-return]

    return build


def _later_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels that count in a loss that shifts them by one."""
    return (labels[:, 1:] != -100).sum()


def _labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels that count."""
    return (labels != -100).sum()


def _mean_square(outputs: Any, targets: Any) -> torch.Tensor:
    """A loss for a model that has none of its own: the mean square of its first output."""
    del targets
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    first = next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
    return first.float().square().mean()


# Config


def _folder(name: str) -> Path | None:
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if "/" in name or name.startswith(".") or path.is_dir():
        what = "has no config.json" if path.is_dir() else "no such folder"
        raise TargetError(
            f"target hf:{name}: {what}",
            hint="give a folder with config.json and model.safetensors, or a model type such as hf:llama; "
            "nothing is downloaded",
        )
    return None


def _config_of_folder(folder: Path, given: Mapping[str, str]) -> tuple[str, Any]:
    from transformers import AutoConfig

    where = f"target hf:{folder}"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        default = config.to_dict()
        changes = _changes(type(config), config, given, where)
        if changes:
            config = type(config).from_dict(_merged(default, changes))
    except TargetError:
        raise
    except Exception as problem:
        raise TargetError(f"{where}: config.json: {_line(problem)}") from problem
    _quiet(config, given)
    return config.model_type, config


def _config_of_type(name: str, given: Mapping[str, str]) -> tuple[str, Any]:
    from transformers import CONFIG_MAPPING

    model_type = next((t for t in (name, name.replace("_", "-"), name.replace("-", "_")) if t in CONFIG_MAPPING), None)
    where = f"target hf:{name}"
    if model_type is None:
        raise TargetError(
            f"{where}: transformers has no model type {name!r}{nearest(name, CONFIG_MAPPING.keys(), 3)}",
            hint="a local checkpoint is given as hf:FOLDER",
        )
    config_class = CONFIG_MAPPING[model_type]
    try:
        default = config_class()
        changes = _changes(config_class, default, given, where)
        config = _made(config_class, changes, default)
        _fit_special_tokens(config)
        _fit_decoder_start(config)
    except TargetError:
        raise
    except Exception as problem:
        raise TargetError(f"{where}: the config refuses: {_line(problem)}") from problem
    _quiet(config, given)
    return model_type, config


def _made(config_class: Any, changes: dict[str, Any], default: Any) -> Any:
    try:
        return config_class(**changes)
    except Exception:
        # Some configs list a kind for each of their layers and refuse another number of layers: use the first ones.
        key = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        before, after = getattr(default, key, None), changes.get(key)
        if not isinstance(before, int) or not isinstance(after, int) or after >= before:
            raise
        lists = {k: v[:after] for k, v in vars(default).items() if isinstance(v, list) and len(v) == before}
        return config_class(**{**lists, **changes})


def _changes(config_class: type, default: Any, given: Mapping[str, str], where: str) -> dict[str, Any]:
    """The arguments as nested keyword arguments of the config, each converted to the type of its default value."""
    changes: dict[str, Any] = {}
    for path, text in given.items():
        node, target, kind = default, changes, config_class
        *parents, last = path.split(".")
        for depth, parent in enumerate(parents):
            node = getattr(node, parent, None)
            if node is None or not hasattr(node, "to_dict"):
                known = sorted(_sub_configs(default))
                raise TargetError(
                    f"{where}: the config has no part {'.'.join(parents[: depth + 1])!r}{nearest(parent, known)}",
                    hint=f"its parts are {', '.join(known)}" if known else "",
                )
            kind = type(node)
            # A part keeps its own type: the config may hold one of several.
            target = target.setdefault(parent, {"model_type": node.model_type} if node.model_type else {})
        aliases = getattr(kind, "attribute_map", {})
        key = aliases.get(last, last)
        known_keys = {k for k in (*vars(node), *node.to_dict()) if not k.startswith("_")} | {"num_labels"}
        if key not in known_keys:
            elsewhere = [f"{sub}.{last}" for sub, part in _sub_configs(node).items() if hasattr(part, last)]
            close = f"; did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else ""
            raise TargetError(
                f"{where}: the config has no key {path!r}{close or nearest(last, known_keys | set(aliases))}",
                hint="arguments of the target besides the config's are task, seq_len, samples and lr",
            )
        value = getattr(node, key, None)
        known_kind = type(value) if type(value) in (bool, int, float, str, list, tuple) else None
        if known_kind is int and "." in text:
            known_kind = None  # a rate whose default is written 0
        target[key] = convert(text, known_kind, f"{where}: {path}")
    return changes


def _sub_configs(config: Any) -> dict[str, Any]:
    return {key: part for key, part in vars(config).items() if hasattr(part, "to_dict") and not key.startswith("_")}


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _fit_special_tokens(config: Any) -> None:
    """Move special tokens that a smaller vocabulary lost to its last entry."""
    size = getattr(config, "vocab_size", None)
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _fit_special_tokens(value)
        elif key.endswith("token_id") and isinstance(value, int) and isinstance(size, int) and value >= size > 0:
            setattr(config, key, size - 1)


def _quiet(config: Any, given: Mapping[str, str]) -> None:
    for part in (config, *_sub_configs(config).values()):
        for key, value in CAPTURE_CHOICES.items():
            if hasattr(part, key) and not any(path.rpartition(".")[2] == key for path in given):
                setattr(part, key, value)


def _fit_decoder_start(config: Any) -> None:
    """Give an encoder-decoder whose config names no padding or first decoder token one: padding starts, as in T5."""
    if not getattr(config, "is_encoder_decoder", False):
        return
    parts = (config, *_sub_configs(config).values())
    for name in ("pad_token_id", "decoder_start_token_id"):
        if getattr(config, name, None) is None:
            found = [getattr(part, other, None) for other in (name, "pad_token_id", "bos_token_id") for part in parts]
            setattr(config, name, next((token for token in found if token is not None), 0))


def _line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(problem).__name__


# Task


def _task(asked: str | None, model_type: str, config: Any) -> str:
    from transformers.models.auto import modeling_auto

    tables = {task: getattr(modeling_auto, table) for task, (_, table) in TASKS.items()}
    has = [task for task in TASKS if model_type in tables[task]]
    if asked is None:
        if not has:
            raise TargetError(
                f"target hf:{model_type}: transformers has no model with a loss for this type that plait can feed",
                hint="write a function that returns a plait.Job with your own inputs and loss",
            )
        return _usual_task(has, config)
    task = asked.lower().replace("_", "-")
    if task not in TASKS:
        raise TargetError(
            f"target hf:{model_type}: unknown task {asked!r}{nearest(task, TASKS)}", hint=", ".join(TASKS)
        )
    if task not in has:
        raise TargetError(f"target hf:{model_type}: it has no head for {task}", hint=f"it has {', '.join(has)}")
    return task


def _usual_task(has: list[str], config: Any) -> str:
    """The first that it has, but an encoder-decoder is one, and who has a masked head was trained with it."""
    order = [task for task in TASKS if task in has]
    if getattr(config, "is_encoder_decoder", False):
        order = [t for t in ("speech-seq2seq", "seq2seq-lm") if t in has] + order
    elif "masked-lm" in has:
        order = ["masked-lm", *order]
    return order[0]


# Batch


class _Shape:
    """The sizes of a model's inputs, from its config."""

    def __init__(
        self, config: Any, model_class: Any, task: str, seq_len: int | None, given: Mapping[str, str], where: str
    ) -> None:
        import inspect

        self.config, self.task, self.given, self.where = config, task, given, where
        self.main = model_class.main_input_name
        self.accepts = set(inspect.signature(model_class.forward).parameters)
        self.text = config.get_text_config() if self.main in ("input_ids", "decoder_input_ids") else config
        self.vocabulary = self._vocabulary()
        if seq_len is not None and seq_len < 2:
            raise TargetError(f"{where}: seq_len={seq_len} must be at least 2")
        positions = self._first("max_position_embeddings", "n_positions")
        self.length = seq_len or min(128, (positions if (positions or 0) > 0 else 256) // 2)
        is_rotary = getattr(self.text, "rope_parameters", None) is not None
        if self.main == "input_ids" and 0 < (positions or 0) < self.length and not is_rotary:
            raise TargetError(
                f"{where}: seq_len={seq_len} is more than the model's {positions} positions",
                hint=f"add max_position_embeddings={seq_len} to the target",
            )

    def _first(self, *names: str, default: Any = None) -> Any:
        for config in (self.text, self.config, *_sub_configs(self.config).values()):
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def _vocabulary(self) -> int:
        size = self._first("vocab_size", "codebook_size")
        return int(size) if isinstance(size, int) else 0

    def text_needs(self, folder: Path | None) -> TextNeeds:
        has_tokenizer = folder is not None and any(
            (folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")
        )
        mask = self._mask_token(folder if has_tokenizer else None)
        return TextNeeds(
            task=self.task,
            length=self.length,
            vocabulary=self.vocabulary,
            mask_token=mask,
            attention_mask=self._wants_mask(),
            tokenizer=str(folder) if has_tokenizer else None,
        )

    def _mask_token(self, tokenizer_folder: Path | None) -> int:
        if tokenizer_folder is not None and self.task == "masked-lm":
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True).mask_token_id
            if found is not None:
                return int(found)
        return self.vocabulary - 1

    def _wants_mask(self) -> bool:
        # A causal model on full sequences needs none, and runs the fused causal kernel without one.
        return self.task != "causal-lm" and "attention_mask" in self.accepts

    def batch(self, samples: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Random inputs with labels, and the labels again."""
        generator = torch.Generator().manual_seed(0)
        inputs = self._main_input(samples, generator)
        labels = self._make_labels(samples, inputs[self.main], generator)
        if "labels" in self.accepts and self.task != "features":
            inputs["labels"] = labels
        return inputs, labels

    def _tokens(self, samples: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Random tokens that mean nothing special (padding, end of text, images, ...)."""
        if self.vocabulary < 2:
            raise TargetError(
                f"{self.where}: the config has no vocab_size, so no tokens can be drawn for it",
                hint="add vocab_size=320 (or another size) to the target",
            )
        configs = (self.config, *_sub_configs(self.config).values())
        special = {v for c in configs for k, v in vars(c).items() if k.endswith("token_id") and isinstance(v, int)}
        plain = torch.tensor([t for t in range(self.vocabulary) if t not in special] or [0])
        return plain[torch.randint(len(plain), (samples, length), generator=generator)]

    def _main_input(self, samples: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if self.main == "input_ids":
            inputs = {"input_ids": self._tokens(samples, self.length, generator)}
            if self._wants_mask():
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if self.task == "features" and "decoder_input_ids" in self.accepts:
                inputs["decoder_input_ids"] = inputs["input_ids"].clone()
            return inputs
        shape = {"pixel_values": self._image, "input_values": self._audio, "input_features": self._frames}.get(
            self.main
        )
        if shape is None:
            raise TargetError(
                f"{self.where}: its input {self.main!r} is of a kind that plait cannot make up",
                hint="write a function that returns a plait.Job with your own inputs",
            )
        inputs = {self.main: torch.randn(samples, *shape(), generator=generator)}
        if self.task == "ctc" and self._wants_mask():  # CTC takes the lengths from it
            inputs["attention_mask"] = torch.ones(inputs[self.main].shape[:2], dtype=torch.int64)
        return inputs

    def _image(self) -> tuple[int, ...]:
        channels = self._first("num_channels", "in_channels", default=3)
        size = self._first("image_size", "input_resolution", default=224)
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return (int(channels), *(int(side) for side in sides))

    def _audio(self) -> tuple[int, ...]:
        bins = self._first("num_mel_bins")
        if bins is not None and self._first("conv_stride") is None:
            return (int(self._first("max_length", default=self.length)), int(bins))
        # A waveform just long enough for `length` positions behind the convolutions.
        samples = self.length
        strides, kernels = self._first("conv_stride", default=(1,)), self._first("conv_kernel", default=(1,))
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            samples = (samples - 1) * stride + kernel
        return (samples,)

    def _frames(self) -> tuple[int, ...]:
        positions = self._first("max_source_positions")
        bins = self._first("num_mel_bins")
        if bins is not None and positions is not None and "input_feat_per_channel" not in vars(self.config):
            return (int(bins), 2 * int(positions))  # bins before frames, halved by a convolution of stride 2
        if self._first("input_feat_per_channel") is not None:
            return (
                self.length * 2 ** int(self._first("num_conv_layers", default=2)),
                self._first("input_feat_per_channel"),
            )
        width = self._first("feature_projection_input_dim", "num_mel_bins", "input_dim", default=80)
        return (self.length, int(width))

    def _make_labels(self, samples: int, main: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.task in ("causal-lm", "masked-lm"):
            labels = main.clone()
            if self.task == "masked-lm":
                hidden = torch.rand(labels.shape, generator=generator) < 0.15
                hidden[:, 0] = True
                labels[~hidden] = -100
                main[hidden] = self.vocabulary - 1
            else:
                # Prompts of several lengths, which do not count; at least the first token, which most models never
                # predict but XLNet does, so that the labels that count are as many either way.
                for row in range(samples):
                    labels[row, : 1 + (row * max(1, self.length // 8)) % (self.length - 1)] = -100
            return labels
        if self.task in ("seq2seq-lm", "speech-seq2seq"):
            length = min(self.length, self._first("max_target_positions", default=self.length))
            return self._tokens(samples, length, generator)
        if self.task == "ctc":
            return self._tokens(samples, max(1, self.length // 4), generator)
        classes = max(2, int(self._first("num_labels", default=2)))
        shape = (samples, self.length) if self.task == "token-classification" else (samples,)
        return torch.randint(classes, shape, generator=generator)
