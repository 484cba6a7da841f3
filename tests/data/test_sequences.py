# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Token sequences: equality with a slow reference, the same global order for any number of processes, exact resume."""

import itertools
import json
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from nt_transformers.data import (
    TextDataConfig,
    TokenSequences,
    load_documents,
    load_tokenizer,
    sequence_loader,
    training_sequences,
    validation_sequences,
)


LENGTH = 24
PACKING = pytest.mark.parametrize("packing", [False, True], ids=["truncate", "pack"])
STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="module")
def small(corpus_dir: Path) -> datasets.Dataset:
    """23 documents, two of them blank, so that an epoch is a few batches."""
    texts = load_documents(str(corpus_dir))[:21]["text"]
    return datasets.Dataset.from_dict({"text": [*texts[:4], "", *texts[4:], " \n"]})


def as_stream(documents: datasets.Dataset) -> datasets.IterableDataset:
    return documents.to_iterable_dataset(num_shards=3)


def sequences(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, streaming: bool = False, **options: object
) -> TokenSequences:
    defaults = {"sequence_length": LENGTH, "batch_size": 2, "seed": 3}
    return TokenSequences(as_stream(documents) if streaming else documents, tokenizer, **(defaults | options))


def take(stream: TokenSequences, count: int | None = None) -> list[dict]:
    return list(itertools.islice(stream, count))


def same(ours: list[dict], theirs: list[dict]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a["input_ids"], b["input_ids"])
        and torch.equal(a["labels"], b["labels"])
        and a["position"] == b["position"]
        for a, b in zip(ours, theirs, strict=True)
    )


def rows(batches: list[dict]) -> list[list[int]]:
    """The sequences without their padding, empty rows left out."""
    lists = ([t for t in row if t != -100] for batch in batches for row in batch["labels"].tolist())
    return [row for row in lists if row]


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def reference(texts: list[str], tokenizer: PreTrainedTokenizerBase, packing: bool) -> list[list[int]]:
    documents = [tokens_of(text, tokenizer) for text in texts if text.strip()]
    if not packing:
        return [tokens[:LENGTH] for tokens in documents]
    joined = [token for tokens in documents for token in tokens]
    return [joined[begin : begin + LENGTH] for begin in range(0, len(joined), LENGTH)]


@PACKING
@STREAMING
def test_one_pass_equals_the_reference(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, packing: bool, streaming: bool
) -> None:
    batches = take(sequences(small, tokenizer, streaming, packing=packing, training=False))
    assert rows(batches) == reference(small["text"], tokenizer, packing)


@PACKING
def test_padding_is_ignored_in_the_loss(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, packing: bool
) -> None:
    for batch in take(sequences(small, tokenizer, packing=packing, training=False, batch_size=4)):
        assert set(batch) == {"input_ids", "labels", "position"}
        assert batch["input_ids"].shape == batch["labels"].shape == (4, LENGTH)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        padding = batch["labels"] == -100
        assert torch.equal(batch["input_ids"][~padding], batch["labels"][~padding])
        assert torch.all(batch["input_ids"][padding] == tokenizer.pad_token_id)
        assert torch.equal(padding, padding.sort(dim=1, stable=True).values), "padding is on the right"


@STREAMING
def test_training_covers_every_document_once_an_epoch_in_another_order(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, streaming: bool
) -> None:
    epochs = rows(take(sequences(small, tokenizer, streaming, batch_size=21), 4))
    expected = sorted(reference(small["text"], tokenizer, packing=False))
    orders = [epochs[21 * epoch : 21 * (epoch + 1)] for epoch in range(4)]
    assert all(sorted(order) == expected for order in orders)
    assert len({str(order) for order in orders}) > 1
    other_seed = rows(take(sequences(small, tokenizer, streaming, batch_size=21, seed=4), 4))
    assert other_seed != epochs


def test_whole_corpus_is_shuffled_across_shards(corpus_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    documents = load_documents(str(corpus_dir))
    in_order = reference(documents["text"], tokenizer, packing=False)
    shuffled = rows(take(TokenSequences(documents, tokenizer, sequence_length=LENGTH, batch_size=100), 3))
    assert sorted(shuffled) == sorted(in_order)
    assert sum(a == b for a, b in zip(shuffled, in_order, strict=True)) < 30


@STREAMING
def test_packing_carries_the_remainder_over_epochs(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, streaming: bool
) -> None:
    """Three epochs, packed, are the three epochs' documents joined: no token lost, none twice."""
    long_rows = {"sequence_length": 4096, "batch_size": 21}
    epochs = rows(take(sequences(small, tokenizer, streaming, **long_rows), 3))
    joined = [token for document in epochs for token in document]
    packed = rows(take(sequences(small, tokenizer, streaming, packing=True, batch_size=1), len(joined) // LENGTH))
    assert [token for row in packed for token in row] == joined[: len(joined) // LENGTH * LENGTH]
    assert {len(row) for row in packed} == {LENGTH}


@PACKING
@STREAMING
@pytest.mark.parametrize("training", [True, False], ids=["training", "one-pass"])
def test_processes_together_see_what_one_sees(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, packing: bool, streaming: bool, training: bool
) -> None:
    options = {"packing": packing, "training": training}
    count = 40 if training else None
    one = take(sequences(small, tokenizer, streaming, batch_size=8, **options), count)
    for world_size in (2, 4):
        ranks = [
            take(
                sequences(
                    small,
                    tokenizer,
                    streaming,
                    batch_size=8 // world_size,
                    rank=rank,
                    world_size=world_size,
                    **options,
                ),
                count,
            )
            for rank in range(world_size)
        ]
        joined = [
            {key: torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "labels")}
            | {"position": batches[0]["position"]}
            for batches in zip(*ranks, strict=True)
        ]
        assert same(joined, one)
        assert all(len({str(batch["position"]) for batch in batches}) == 1 for batches in zip(*ranks, strict=True))


@PACKING
@STREAMING
@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_after_every_batch(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, packing: bool, streaming: bool, world_size: int
) -> None:
    """Over two epochs and into the third, so that every kind of boundary is met."""
    options = {"packing": packing, "batch_size": 4 // world_size, "rank": world_size - 1, "world_size": world_size}
    whole = take(sequences(small, tokenizer, streaming, **options), 120)
    whole = [batch for batch in whole if batch["position"]["epoch"] < 3]
    assert 10 < len(whole) < 120, "two epoch boundaries at least"
    for done in range(1, len(whole)):
        position = json.loads(json.dumps(whole[done - 1]["position"]))
        following = whole[done : done + 4]
        resumed = take(sequences(small, tokenizer, streaming, position=position, **options), len(following))
        assert same(resumed, following)


@PACKING
@STREAMING
def test_resume_with_another_split_continues_at_the_same_sequence(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, packing: bool, streaming: bool
) -> None:
    whole = rows(take(sequences(small, tokenizer, streaming, packing=packing, batch_size=1), 60))
    position = take(sequences(small, tokenizer, streaming, packing=packing, batch_size=5), 5)[-1]["position"]
    resumed = sequences(small, tokenizer, streaming, packing=packing, batch_size=3, world_size=2, position=position)
    assert rows(take(resumed, 1)) == whole[25:28]


@PACKING
@STREAMING
def test_one_pass_resumes_too(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, packing: bool, streaming: bool
) -> None:
    options = {"packing": packing, "training": False}
    whole = take(sequences(small, tokenizer, streaming, **options))
    for done, batch in enumerate(whole, start=1):
        assert same(take(sequences(small, tokenizer, streaming, position=batch["position"], **options)), whole[done:])


@PACKING
@pytest.mark.parametrize("max_tokens", [1, 100, 101, 10**9])
def test_limit_counts_predicted_tokens_exactly(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, packing: bool, max_tokens: int
) -> None:
    expected = reference(small["text"], tokenizer, packing)
    available = sum(len(row) - 1 for row in expected)
    found = rows(take(sequences(small, tokenizer, packing=packing, training=False, max_tokens=max_tokens)))
    assert sum(len(row) - 1 for row in found) == min(max_tokens, available)
    assert found[:-1] == expected[: len(found) - 1]
    assert found[-1] == expected[len(found) - 1][: len(found[-1])]


@PACKING
def test_limited_pass_is_the_same_for_any_number_of_processes(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, packing: bool
) -> None:
    options = {"packing": packing, "training": False, "max_tokens": 150}
    one = sorted(rows(take(sequences(small, tokenizer, **options))))
    ranks = [take(sequences(small, tokenizer, rank=rank, world_size=3, **options)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(row for batches in ranks for row in rows(batches)) == one


def test_documents_begin_and_end_as_the_tokenizer_says(small: datasets.Dataset, tokenizer_dir: Path) -> None:
    """A tokenizer that adds special tokens of its own: a beginning is kept, an end is not doubled."""
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|padding|> $A <|endoftext|>", special_tokens=[("<|padding|>", 1), ("<|endoftext|>", 0)]
    )
    batch = take(sequences(small, tokenizer, training=False, batch_size=1, sequence_length=512), 1)[0]
    (row,) = rows([batch])
    assert row[0] == 1
    assert row[-1] == 0
    assert row[-2] != 0
    assert tokenizer.decode(row[1:-1]) == small[0]["text"]


@PACKING
@STREAMING
def test_damaged_records_are_passed_over_counted_and_resumed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, packing: bool, streaming: bool
) -> None:
    texts = [f"document {number} of the corpus" for number in range(12)]
    bad = {0, 5, 6, 11}
    lines = ["{" if number in bad else json.dumps({"text": text}) for number, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    documents = load_documents(str(tmp_path), streaming=streaming, on_bad_record="skip")

    def stream(**options: object) -> TokenSequences:
        defaults = {"sequence_length": LENGTH, "batch_size": 1, "packing": packing}
        return TokenSequences(documents, tokenizer, **(defaults | options))

    kept = [text for number, text in enumerate(texts) if number not in bad]
    assert rows(take(stream(training=False))) == reference(kept, tokenizer, packing)
    whole = take(stream(), 20)
    epochs = [batch["position"]["epoch"] for batch in whole]
    counts = [batch["position"]["skipped_records"] for batch in whole]
    assert counts == sorted(counts)
    assert counts[epochs.index(2)] >= len(bad) * 2
    for done in (1, 4, 9):
        assert same(take(stream(position=whole[done - 1]["position"]), 20 - done), whole[done:])


@pytest.mark.parametrize("texts", [[], ["", "  "], [None]])
@pytest.mark.parametrize("training", [True, False])
def test_corpus_without_text(tokenizer: PreTrainedTokenizerBase, texts: list[str | None], training: bool) -> None:
    features = datasets.Features({"text": datasets.Value("string")})
    documents = datasets.Dataset.from_dict({"text": texts}, features=features)
    with pytest.raises(ValueError, match="no document of the corpus holds any text"):
        take(sequences(documents, tokenizer, training=training), 1)


def test_bad_batch_size(small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        sequences(small, tokenizer, batch_size=0)


@STREAMING
def test_prefetching_process_changes_nothing(
    corpus_dir: Path, tokenizer: PreTrainedTokenizerBase, streaming: bool
) -> None:
    config = TextDataConfig(train=str(corpus_dir), streaming=streaming, sequence_length=LENGTH, packing=True)
    stream = training_sequences(config, tokenizer, batch_size=4)
    expected = take(stream, 12)
    loader = sequence_loader(stream, num_workers=1)
    ahead = list(itertools.islice(loader, 6))
    assert same(ahead, expected[:6])
    rest = training_sequences(config, tokenizer, batch_size=4, position=ahead[-1]["position"])
    assert same(list(itertools.islice(sequence_loader(rest, num_workers=0), 6)), expected[6:])


def test_validation_pass_repeats_exactly(corpus_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = TextDataConfig(train=str(corpus_dir), sequence_length=LENGTH, eval_tokens=500)
    loader = sequence_loader(validation_sequences(config, tokenizer, batch_size=4))
    first = list(loader)
    assert same(list(loader), first)
    assert sum(len(row) - 1 for row in rows(first)) == 500


def test_prefetching_does_not_hang_on_a_tokenizer_that_has_used_threads(
    small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    tokenizer(small["text"][:] * 20)
    loader = sequence_loader(sequences(small, tokenizer), num_workers=1)
    loader.timeout = 20
    assert len(list(itertools.islice(loader, 3))) == 3


def test_bad_num_workers(small: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="num_workers is 2"):
        sequence_loader(sequences(small, tokenizer), num_workers=2)
