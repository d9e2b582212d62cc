"""A folder that transformers' `from_pretrained` loads: the weights under their own names, config.json, the tokenizer.

What only the parent process has, the config and the tokenizer's files, it leaves in the subject's folder (`keep_config`).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from plait.errors import ServeError
from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.subject import Subject

if TYPE_CHECKING:
    import torch

    from plait.serve.source import Source

__all__ = ["HuggingFace", "keep_config"]

FOLDER = "huggingface"
_ABOUT = "about.json"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "*.model",
)


class HuggingFace(Backend):
    """`config.json`, `model.safetensors` (several of them with an index where they are large), tokenizer files."""

    name = "huggingface"
    extra = "hf"
    imports = ("transformers",)
    distributions = ("transformers", "safetensors")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")
    shard_size: ClassVar[str | int] = "5GB"
    """Largest file of weights."""

    def refusal(self, subject: Subject, precision: str) -> str:
        """Only transformers' own architectures have a config that says how to build them."""
        about = _about(subject)
        if about.get("refused"):
            return f"{about['refused']}; --to torch writes its weights as safetensors under its own names"
        return super().refusal(subject, precision)

    def part(self, subject: Subject) -> Subject:
        """Transformers' models generate by themselves: `forward` alone."""
        return replace(subject, entries={"forward": subject.entries["forward"]})

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """By transformers' own `save_pretrained`, then loaded again: every weight must be there, bit for bit."""
        import torch

        model_class = _model_class(str(_about(subject)["architecture"]))
        model = _filled(model_class, subject, getattr(torch, _DTYPES[precision]))
        model.save_pretrained(folder, max_shard_size=self.shard_size)
        for pattern in _TOKENIZER:
            for path in (subject.folder / FOLDER).glob(pattern):
                if not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)
        again, report = model_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=getattr(torch, _DTYPES[precision])
        )
        _refuse_difference(model.state_dict(), again.state_dict(), report)
        shards = len(list(folder.glob("*.safetensors")))
        note = "" if shards == 1 else f"{shards} files of weights"
        exact = _exact(again.eval(), subject) if precision == "fp32" else None
        if exact:
            note = ", ".join(filter(None, ("outputs equal bit for bit", note)))
        return {"architecture": model_class.__name__, "exact": exact, "note": note}

    def load(self, artefact: Artefact) -> Runner:
        """The model as `from_pretrained` gives it, in eval mode."""
        import torch

        torch.set_num_threads(artefact.threads)
        model_class = _model_class(str(artefact.facts.get("architecture", "")))
        dtype = getattr(torch, _DTYPES[artefact.precision])
        model = model_class.from_pretrained(artefact.folder, local_files_only=True, dtype=dtype).eval()
        return _runner(model, [spec.name for spec in artefact.entry.inputs], artefact.entry.outputs, dtype)


def keep_config(source: Source, folder: Path) -> None:
    """Leave in a subject's folder what `from_pretrained` needs beside weights, or why there is none."""
    kept = folder / FOLDER
    kept.mkdir()
    about = {"architecture": type(source.module).__name__, "refused": _refused(source.module)}
    if not about["refused"]:
        config = _as_given(source)
        config.architectures = [about["architecture"]]
        config.save_pretrained(kept)
        generation = getattr(source.module, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(kept)
        weights = getattr(source.job, "weights", None)
        for pattern in _TOKENIZER if weights is not None else ():
            for path in Path(str(weights)).glob(pattern):
                shutil.copyfile(path, kept / path.name)
    (kept / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def _refused(module: Any) -> str:
    """Why a module is not one of transformers' models; empty where it is."""
    name = type(module).__name__
    # A model of it cannot be there before its library is; importing that takes seconds.
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return f"{name} is no model of transformers, which from_pretrained could build from a config"
    if not isinstance(module, transformers.PreTrainedModel):
        inner = [
            f"{n} ({type(m).__name__})"
            for n, m in module.named_children()
            if isinstance(m, transformers.PreTrainedModel)
        ]
        held = f", though it holds one: export {inner[0]} by itself" if inner else ""
        return f"{name} is no model of transformers, which from_pretrained could build from a config{held}"
    if getattr(transformers, name, None) is not type(module):
        return f"{name} is code of its own ({type(module).__module__}), not one of transformers' architectures"
    return ""


def _as_given(source: Source) -> Any:
    """The config without the two choices that capture makes (no cache, nothing drawn by chance): as the folder or type has it."""
    import copy

    from plait.capture.huggingface import CAPTURE_CHOICES

    config = copy.deepcopy(source.module.config)
    if not hasattr(source.job, "weights"):
        return config  # the user's own module: every choice is the user's
    weights = source.job.weights
    kind: Any = type(config)
    before = kind.from_pretrained(weights, local_files_only=True) if weights is not None else kind()
    for part, like in ((config, before), *_parts(config, before)):
        for key in CAPTURE_CHOICES:
            if hasattr(part, key) and hasattr(like, key) and f"{key}=" not in source.text:
                setattr(part, key, getattr(like, key))
    return config


def _parts(config: Any, before: Any) -> list[tuple[Any, Any]]:
    own = [(key, part) for key, part in vars(config).items() if hasattr(part, "to_dict") and not key.startswith("_")]
    return [(part, getattr(before, key)) for key, part in own if hasattr(before, key)]


def _about(subject: Subject) -> dict[str, Any]:
    try:
        data = json.loads((subject.folder / FOLDER / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"refused": "the model is not known to be one of transformers"}
    return dict(data)


def _model_class(name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ServeError(f"huggingface: transformers has no model {name!r}")
    return found


def _filled(model_class: Any, subject: Subject, dtype: torch.dtype) -> Any:
    """The architecture with the subject's weights; tied ones stay tied."""
    import transformers

    auto: Any = transformers.AutoConfig
    config = auto.from_pretrained(subject.folder / FOLDER, local_files_only=True)
    model = model_class(config)
    # The exported program wraps the user's module as `model`.
    state = {name.removeprefix("model."): value for name, value in subject.program().state_dict.items()}
    own = model.state_dict()
    unknown = sorted(set(state) - set(own))
    if unknown:
        raise ServeError(f"huggingface: {model_class.__name__} has no {unknown[0]}")
    model.load_state_dict(state, strict=False)
    named = dict(model.named_parameters(remove_duplicate=False))
    held = {id(parameter) for name, parameter in named.items() if name in state}
    lost = [name for name, parameter in named.items() if id(parameter) not in held]
    if lost:
        raise ServeError(f"huggingface: the exported forward holds no value of {lost[0]}")
    return model.to(dtype)


def _refuse_difference(own: Mapping[str, torch.Tensor], again: Mapping[str, torch.Tensor], report: Any) -> None:
    import torch

    missing = report.get("missing_keys") if isinstance(report, Mapping) else None
    if missing:
        raise ServeError(f"huggingface: from_pretrained misses {min(missing)} in what was saved")
    for name, value in own.items():
        if name not in again or not torch.equal(value, again[name]):
            raise ServeError(f"huggingface: {name} is another after from_pretrained")


def _exact(model: Any, subject: Subject) -> bool:
    """Whether the loaded model's outputs are those of the user's module, bit for bit, on every sample."""
    import torch

    entry = subject.entries["forward"]
    run = _runner(model, [s.name for s in entry.inputs], entry.outputs, torch.float32)
    return all(
        torch.equal(a, b)
        for sample in entry.samples
        for a, b in zip(run(subject.inputs(sample)), subject.outputs(sample), strict=True)
    )


def _runner(model: Any, names: Sequence[str], outputs: Sequence[Any], dtype: torch.dtype) -> Runner:
    import torch
    from torch.utils import _pytree as pytree

    options = {"use_cache": False} if getattr(model.config, "use_cache", None) else {}

    def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in zip(names, inputs, strict=True)}
        with torch.no_grad():
            result = model(**given, **options)
        found = [leaf for leaf in pytree.tree_leaves(dict(result)) if isinstance(leaf, torch.Tensor)]
        return [t.to(getattr(torch, spec.dtype)) for t, spec in zip(found, outputs, strict=True)]

    return run
