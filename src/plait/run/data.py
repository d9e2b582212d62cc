"""Where batches come from, and which process loads which samples.

    source                        one step gives                    read by a process
    map-style Dataset             the next `batch` of a shuffle     its own share of the samples
    IterableDataset of samples    the next `batch` samples          all of them
    iterable of global batches    what the iterable gives           all of it
    a function of nothing         whatever it returns, as above

Steps are numbered alike in every process, the last batch of an epoch is as small as it is, and a
resumed run continues at the step it had come to. Random numbers drawn while loading (a shuffling
DataLoader, augmentation) come from a stream of their own, the same in every process: every process
sees the same global batch, and training's own random numbers don't depend on the data.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

from plait.errors import RequestError
from plait.run.shares import shares

if TYPE_CHECKING:
    from plait.capture.huggingface import TextNeeds

__all__ = [
    "Batch",
    "Batches",
    "TextSamples",
    "Windows",
    "global_indices",
    "standard_library_text",
    "text_of",
    "text_samples",
    "unigram_entropy",
]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on, as one process sees it."""

    inputs: Any
    targets: Any
    samples: int
    """Of the global batch; 0 where only the run can tell (a ready-made global batch)."""
    is_share: bool
    """Whether `inputs` and `targets` are this process's own share already, or the global batch still to be cut."""
    epoch: int
    step: int
    """Within the epoch, from 0."""


def global_indices(size: int, batch: int, *, seed: int, epoch: int, step: int, shuffle: bool = True) -> list[int]:
    """Indices of the samples of step `step`; fewer than `batch` in the last step of an epoch, none after it."""
    start, stop = min(step * batch, size), min((step + 1) * batch, size)
    if not shuffle:
        return list(range(start, stop))
    return _shuffled(size, seed, epoch)[start:stop].tolist()


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(_mix(seed, epoch)))


def _mix(*numbers: int) -> int:
    """A seed for each combination of numbers, spread out so that neighbours share nothing."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63  # Knuth's MMIX generator
    return seed


class Batches:
    """Batches of a source, epoch after epoch, for part `index` of `count` of the samples of each microbatch, parts
    in the proportion of `weights`.

    `position` (epoch, step) is where the next batch comes from; setting it continues there. Iterating never ends
    unless the source can be read only once; `one_epoch` does.
    """

    def __init__(
        self,
        source: Any,
        *,
        batch: int,
        seed: int = 0,
        index: int = 0,
        count: int = 1,
        microbatches: int = 1,
        weights: Sequence[int] = (),
        shuffle: bool = True,
    ) -> None:
        if not 0 <= index < count:
            raise ValueError(f"part {index} of {count} does not exist")
        if callable(source) and not isinstance(source, Iterable | Dataset):
            source = source()
        if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
            self._size = len(source)  # type: ignore[arg-type]
            if self._size == 0:
                raise RequestError("data: the Dataset is empty")
        elif not isinstance(source, Iterable):
            raise RequestError(
                f"data: a {type(source).__name__} is neither an iterable of batches nor a Dataset",
                hint="give Job(data=...) an iterable of (inputs, targets), a Dataset of samples, or a function of one",
            )
        self.source = source
        self.batch = batch
        self.seed = seed
        self.index, self.count = index, count
        self.microbatches = microbatches
        self.weights = weights
        self.shuffle = shuffle
        self.position = (0, 0)

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches in one epoch; None where the source does not say."""
        if self._is_map:
            return math.ceil(self._size / self.batch)
        try:
            length = len(self.source)
        except TypeError:
            return None
        return math.ceil(length / self.batch) if isinstance(self.source, IterableDataset) else length

    @property
    def _is_map(self) -> bool:
        return isinstance(self.source, Dataset) and not isinstance(self.source, IterableDataset)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            epoch, start = self.position
            seen = False
            for batch in self.one_epoch(epoch, start):
                seen = True
                self.position = (epoch, batch.step + 1)
                yield batch
            if not seen and start == 0:
                if epoch == 0:
                    raise RequestError("data: the source gave no batch at all")
                return  # a generator that is used up
            self.position = (epoch + 1, 0)

    def one_epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step `start`; `position` stays as it is."""
        if self._is_map:
            yield from self._from_samples(epoch, start)
        else:
            yield from self._from_batches(epoch, start)

    def _from_samples(self, epoch: int, start: int) -> Iterator[Batch]:
        for step in range(start, math.ceil(self._size / self.batch)):
            indices = global_indices(
                self._size, self.batch, seed=self.seed, epoch=epoch, step=step, shuffle=self.shuffle
            )
            table = shares(len(indices), min(self.microbatches, len(indices)), self.count, self.weights)
            mine = [indices[i] for row in table for i in range(*row[self.index])]
            # A replica with nothing to do still takes part in every collective: one sample, which counts nothing.
            inputs, targets = _pair(_collate([self._sample(i, epoch) for i in mine or indices[:1]]))
            yield Batch(inputs, targets, len(indices), is_share=True, epoch=epoch, step=step)

    def _sample(self, index: int, epoch: int) -> Any:
        state = torch.get_rng_state()
        # A seed for each sample, so that augmentation is the same however the samples are split.
        torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
        try:
            return self.source[index]
        finally:
            torch.set_rng_state(state)

    def _from_batches(self, epoch: int, start: int) -> Iterator[Batch]:
        own = torch.Generator().manual_seed(_mix(self.seed, epoch)).get_state()
        is_stream = isinstance(self.source, IterableDataset)
        iterator: Iterator[Any] | None = None
        step = 0
        while True:
            outside = torch.get_rng_state()
            torch.set_rng_state(own)
            try:
                if iterator is None:
                    iterator = iter(self.source)
                found = list(islice(iterator, self.batch if is_stream else 1))
            finally:
                own = torch.get_rng_state()
                torch.set_rng_state(outside)
            if not found:
                return
            if step >= start:
                inputs, targets = _pair(_collate(found) if is_stream else found[0])
                yield Batch(inputs, targets, len(found) if is_stream else 0, is_share=False, epoch=epoch, step=step)
            step += 1


def _collate(samples: list[Any]) -> Any:
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError) as problem:
        raise RequestError(
            f"data: the samples do not make a batch: {str(problem).splitlines()[0]}",
            hint="let every sample be (inputs, targets) of tensors or numbers of one shape, or give batches instead",
        ) from None


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        shown = f"{len(value)} values" if isinstance(value, tuple | list) else f"a {type(value).__name__}"
        raise RequestError(
            f"data: a batch must be a pair (inputs, targets), got {shown}",
            hint="use (inputs, None) where there are no targets; several inputs go in a tuple or a dict",
        )
    inputs, targets = value
    return _no_lists(inputs), _no_lists(targets)


def _no_lists(value: Any) -> Any:
    """default_collate makes lists of tuples; positional inputs are a tuple."""
    if isinstance(value, list):
        return tuple(_no_lists(item) for item in value)
    if isinstance(value, dict):
        return {key: _no_lists(item) for key, item in value.items()}
    return value


class Windows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples of `length` tokens and the `length` tokens one further on, side by side through a text."""

    def __init__(self, text: bytes | torch.Tensor, length: int) -> None:
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8) if isinstance(text, bytes) else text
        self.length = length
        if len(self) == 0:
            raise RequestError(
                f"data: a text of {len(self.tokens)} tokens is shorter than one sample of {length} + 1",
                hint="use a longer text or shorter samples",
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = self.tokens[index * self.length : (index + 1) * self.length + 1].long()
        return window[:-1], window[1:]


class TextSamples(Dataset[tuple[dict[str, torch.Tensor], torch.Tensor]]):
    """Samples of a text for a transformers model: its keyword arguments with labels, and the labels again.

    Causal models get the same tokens as labels (they shift themselves), masked ones have 15 % of the tokens hidden
    and only those as labels (Devlin et al. 2018, without the random tokens), sequence-to-sequence ones continue
    the text.
    """

    def __init__(self, tokens: bytes | torch.Tensor, needs: TextNeeds, seed: int = 0) -> None:
        self.needs = needs
        self.seed = seed
        self.windows = Windows(tokens, needs.length * (2 if needs.task == "seq2seq-lm" else 1))

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tokens, _ = self.windows[index]
        labels = tokens.clone()
        if self.needs.task == "seq2seq-lm":
            tokens, labels = tokens[: self.needs.length], tokens[self.needs.length :].clone()
        elif self.needs.task == "masked-lm":
            generator = torch.Generator().manual_seed(_mix(self.seed, index))
            hidden = torch.rand(len(tokens), generator=generator) < 0.15
            hidden[int(torch.randint(len(tokens), (), generator=generator))] = True
            labels[~hidden] = -100
            tokens = tokens.masked_fill(hidden, self.needs.mask_token)
        inputs = {"input_ids": tokens, "labels": labels}
        if self.needs.attention_mask:
            inputs["attention_mask"] = torch.ones_like(tokens)
        return inputs, labels


def text_samples(needs: TextNeeds, path: Path | None = None, *, seed: int = 0) -> TextSamples:
    """The samples of a text file, a folder of texts, or the standard library's source for a transformers model.

    Raises:
        RequestError: the text cannot be read, is too short, or has tokens that the model's vocabulary lacks.
    """
    text = standard_library_text() if path is None else text_of(path)
    if needs.tokenizer is None:
        if needs.vocabulary < 256:
            raise RequestError(
                f"data: text is read as bytes, which needs a vocabulary of 256, the model has {needs.vocabulary}",
                hint="add vocab_size=256 to the target",
            )
        return TextSamples(text, needs, seed)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(needs.tokenizer, local_files_only=True)
    lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
    tokens = [token for ids in tokenizer(lines, add_special_tokens=False)["input_ids"] for token in ids]
    if tokens and max(tokens) >= needs.vocabulary:
        raise RequestError(
            f"data: the tokenizer gives token {max(tokens)}, the model's vocabulary has {needs.vocabulary}",
            hint=f"the tokenizer in {needs.tokenizer} belongs to another model",
        )
    return TextSamples(torch.tensor(tokens, dtype=torch.int64), needs, seed)


def text_of(path: Path) -> bytes:
    """A file's bytes, or those of all files in a folder, in order of their names; hidden ones are left out.

    Raises:
        RequestError: there is nothing to read.
    """
    if not path.exists():
        raise RequestError(f"--data {path}: no such file or folder")
    files = (
        [path]
        if path.is_file()
        else sorted(
            p for p in path.rglob("*") if p.is_file() and not any(n.startswith(".") for n in p.relative_to(path).parts)
        )
    )
    try:
        text = b"".join(file.read_bytes() for file in files)
    except OSError as problem:
        raise RequestError(f"--data {path}: {problem.strerror}: {problem.filename}") from None
    if not text:
        raise RequestError(f"--data {path}: no text in it")
    return text


@lru_cache(maxsize=1)
def standard_library_text(limit: int = 8_000_000) -> bytes:
    """The standard library's own Python source, its files in order of their names, at most `limit` bytes.

    Tests and installed packages are left out, so that the text is about the same wherever the Python is the same.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"}
    text = bytearray()
    for file in sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)):
        try:
            text += file.read_bytes()
        except OSError:  # a dangling link in somebody's installation is no reason to stop
            continue
        if len(text) >= limit:
            break
    return bytes(text[:limit])


def unigram_entropy(text: bytes) -> float:
    """Nats per byte of a model that knows only how often each byte occurs."""
    counts = torch.bincount(torch.frombuffer(bytearray(text), dtype=torch.uint8).int(), minlength=256).double()
    shares = counts[counts > 0] / len(text)
    return float(-(shares * shares.log()).sum())
