"""Which samples a step trains on, and which of them a process loads."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from plait.capture.huggingface import TextNeeds
from plait.errors import RequestError
from plait.run.data import (
    Batches,
    Windows,
    global_indices,
    standard_library_text,
    text_of,
    text_samples,
    unigram_entropy,
)
from plait.run.shares import shares


class Loud(Dataset):
    """Remembers which samples were asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        self.asked.append(index)
        return torch.tensor([float(index)]), torch.tensor(index)


class Stream(IterableDataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):
        return ((torch.tensor([float(i)]), torch.tensor(i)) for i in range(self.size))


def needs(task: str, **changes) -> TextNeeds:
    values = {"task": task, "length": 8, "vocabulary": 256, "mask_token": 255, "attention_mask": False}
    return TextNeeds(**(values | changes))


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 60),
    batch=st.integers(1, 20),
    count=st.integers(1, 5),
    microbatches=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_shares_make_up_every_epoch(size: int, batch: int, count: int, microbatches: int, seed: int):
    """Over the parts of an epoch each sample comes once, microbatch by microbatch as one process would have them."""
    together = [b.targets.tolist() for b in Batches(Loud(size), batch=batch, seed=seed).one_epoch()]
    options = {"batch": batch, "seed": seed, "count": count, "microbatches": microbatches}
    parts = [list(Batches(Loud(size), index=index, **options).one_epoch()) for index in range(count)]

    assert sorted(chain(*together)) == list(range(size))
    for step, whole in enumerate(together):
        found: list[list[int]] = [part[step].targets.tolist() for part in parts]
        table = shares(len(whole), min(microbatches, len(whole)), count)
        for index in range(count):
            expected = [whole[i] for row in table for i in range(*row[index])]
            # One with nothing to do has a sample that counts nothing.
            assert found[index] == (expected or whole[:1])
        assert {part[step].samples for part in parts} == {len(whole)}


def test_a_process_loads_only_its_own_share():
    """The other processes' samples are never asked for."""
    source = Loud(16)
    batches = Batches(source, batch=8, index=1, count=2, shuffle=False)
    list(batches.one_epoch())

    assert source.asked == [4, 5, 6, 7, 12, 13, 14, 15]


def test_the_last_batch_is_as_small_as_it_is():
    """Ten samples in fours: 4, 4, 2; its first part is the larger."""
    sizes = [[len(b.targets) for b in Batches(Loud(11), batch=4, index=i, count=2).one_epoch()] for i in range(2)]

    assert sizes == [[2, 2, 2], [2, 2, 1]]


def test_a_part_without_samples_has_tensors_of_the_right_kind():
    """Where the last batch is smaller than the processes, some have one sample that counts nothing."""
    last = list(Batches(Loud(5), batch=4, index=3, count=4).one_epoch())[-1]

    assert last.inputs.shape == (1, 1)
    assert last.targets.dtype == torch.int64
    assert last.samples == 1


def test_order_depends_on_seed_and_epoch_alone():
    """The same seed gives the same order, another epoch or seed another."""

    def order(seed: int, epoch: int) -> list[int]:
        return global_indices(100, 100, seed=seed, epoch=epoch, step=0)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


@pytest.mark.parametrize(
    "source",
    [
        Loud(10),
        [(torch.tensor([float(i)]), torch.tensor([i])) for i in range(3)],
        Stream(10),
        lambda: [(torch.tensor([1.0]), torch.tensor([i])) for i in range(3)],
        DataLoader(TensorDataset(torch.arange(10.0)[:, None], torch.arange(10)), batch_size=4, shuffle=True),
    ],
    ids=["Dataset", "list", "IterableDataset", "function", "DataLoader"],
)
def test_resuming_gives_what_an_uninterrupted_run_gives(source):
    """From any position the batches go on as if nothing had happened, over the end of an epoch too."""
    going = iter(Batches(source, batch=4, seed=3))
    expected = [next(going) for _ in range(8)]
    first = Batches(source, batch=4, seed=3)
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    second = Batches(source, batch=4, seed=3)
    second.position = first.position
    rest = iter(second)

    for batch in expected[4:]:
        found = next(rest)
        assert (found.epoch, found.step) == (batch.epoch, batch.step)
        torch.testing.assert_close(found.targets, batch.targets)


def test_training_does_not_see_the_random_numbers_of_loading():
    """A shuffling loader and augmentation draw from their own stream, the same in every process."""

    class Augmented(Loud):
        def __getitem__(self, index: int):
            return torch.randn(2), torch.tensor(index)

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    shares = [list(Batches(Augmented(8), batch=4, index=i, count=2).one_epoch()) for i in range(2)]
    whole = list(Batches(Augmented(8), batch=4).one_epoch())
    list(Batches(DataLoader(Augmented(8), batch_size=4, shuffle=True), batch=4).one_epoch())

    torch.testing.assert_close(torch.rand(3), expected)
    torch.testing.assert_close(torch.cat([s[0].inputs for s in shares]), whole[0].inputs)


def test_a_generator_ends_where_it_ends():
    """What can be read only once ends, and does not go round."""
    batches = Batches(((torch.zeros(1), None) for _ in range(3)), batch=1)

    assert len(list(batches)) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "gave no batch"),
        (Loud(0), "the Dataset is empty"),
        (3, "neither an iterable of batches nor a Dataset"),
        ([torch.zeros(3)], r"must be a pair \(inputs, targets\), got a Tensor"),
        ([(1, 2, 3)], "got 3 values"),
        (TensorDataset(torch.zeros(4)), "must be a pair"),
    ],
)
def test_data_of_the_wrong_kind_is_refused(source, message: str):
    """The message says what was found and what is expected."""
    with pytest.raises(RequestError, match=message):
        next(iter(Batches(source, batch=2)))


def test_samples_of_several_shapes_are_refused_with_a_hint():
    """What cannot be stacked is said, not shown as a traceback."""

    class Ragged(Loud):
        def __getitem__(self, index: int):
            return torch.zeros(index + 1), torch.tensor(index)

    with pytest.raises(RequestError, match="do not make a batch"):
        next(iter(Batches(Ragged(4), batch=4)))


def test_positional_inputs_come_as_a_tuple():
    """Samples with several inputs are batched as a tuple, dicts as a dict."""

    class Two(Loud):
        def __getitem__(self, index: int):
            return (torch.zeros(2), torch.ones(1)), {"a": torch.tensor(index)}

    batch = next(iter(Batches(Two(4), batch=2)))

    assert isinstance(batch.inputs, tuple)
    assert batch.targets["a"].shape == (2,)


def test_windows_predict_the_next_byte():
    """Targets are the inputs one further on, and windows do not overlap."""
    windows = Windows(b"abcdefghij", 3)

    assert len(windows) == 3
    assert [bytes(x.tolist()) for x, _ in windows] == [b"abc", b"def", b"ghi"]
    assert [bytes(y.tolist()) for _, y in windows] == [b"bcd", b"efg", b"hij"]
    with pytest.raises(RequestError, match="shorter than one sample"):
        Windows(b"abc", 3)


def test_text_for_each_task():
    """Causal labels are the tokens, masked ones the hidden tokens only, sequence-to-sequence ones go on."""
    text = bytes(range(97, 123)) * 10
    causal, labels = text_samples_of(text, "causal-lm")
    assert torch.equal(causal["input_ids"], labels)

    masked, labels = text_samples_of(text, "masked-lm", attention_mask=True)
    hidden = masked["input_ids"] == 255
    assert hidden.any()
    assert torch.equal(labels != -100, hidden)
    assert masked["attention_mask"].all()

    source, labels = text_samples_of(text, "seq2seq-lm")
    assert bytes(source["input_ids"].tolist() + labels.tolist()) == text[:16]


def text_samples_of(text: bytes, task: str, **changes):
    from plait.run.data import TextSamples

    return TextSamples(text, needs(task, **changes))[0]


def test_bytes_need_a_vocabulary_of_256():
    """A smaller vocabulary is refused with the key to change."""
    with pytest.raises(RequestError, match="vocabulary of 256, the model has 100") as caught:
        text_samples(needs("causal-lm", vocabulary=100))

    assert "vocab_size=256" in caught.value.hint


def test_text_of_files_and_folders(tmp_path: Path):
    """A folder's files in order, hidden ones left out; nothing to read is an error."""
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / ".hidden").write_text("no")

    assert text_of(tmp_path) == b"onetwo"
    assert text_of(tmp_path / "b.txt") == b"two"
    with pytest.raises(RequestError, match="no such file"):
        text_of(tmp_path / "c.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no text"):
        text_of(tmp_path / "empty")


def test_the_standard_library_is_plenty_of_python():
    """Millions of bytes of source, the same each time."""
    text = standard_library_text()

    assert len(text) > 3_000_000
    assert b"def " in text


def test_unigram_entropy():
    """Of one letter nothing, of two equally often ln 2."""
    assert unigram_entropy(b"aaaa") == 0
    assert unigram_entropy(b"abab") == pytest.approx(math.log(2))


def test_a_folder_with_a_tokenizer_reads_its_tokens(tmp_path: Path):
    """The text becomes the tokenizer's tokens; one that does not fit the model is refused."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("a b c\nb a a\n" * 10)
    folder = {"tokenizer": str(tmp_path), "length": 6}
    inputs, _ = text_samples(needs("causal-lm", **folder), text)[0]

    assert inputs["input_ids"].tolist() == [1, 2, 0, 2, 1, 1]
    with pytest.raises(RequestError, match="the tokenizer gives token 2, the model's vocabulary has 2"):
        text_samples(needs("causal-lm", vocabulary=2, **folder), text)
