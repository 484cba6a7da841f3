# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Documents of a text corpus, from the hub or from local shards in C4's form.

Local shards are read here rather than by the loaders of `datasets`: those cast every column of every shard to the
first one's schema (C4's `timestamp` is enough to break it), and do not name the file and line of a damaged record.
"""

import glob
import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..validation import check, check_types


logger = logging.getLogger(__name__)

Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset
OnBadRecord: TypeAlias = Literal["error", "skip"]

JSON_ENDINGS = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
# Closes an arrow stream; without it the reader takes a cut between two batches for the end.
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
SHARD_ENDINGS = (*JSON_ENDINGS, ".parquet", ".arrow")


class BadRecordError(ValueError):
    """A record, or what is left of a shard, that cannot be read; the message names the file and the place."""


@dataclass
class TextDataConfig:
    """Which text a language model trains on, and how it is cut into sequences.

    Args:
        train: Training documents: a data set id of the hub, or a local file, folder or glob of JSON lines (`*.json.gz`
            as in C4, `*.jsonl`, `*.json`), `*.parquet` or `*.arrow`. A subfolder `train` of a folder is what is read.
        name: Configuration of the hub's data set; local files have none.
        validation: Held-out documents, in the same forms. Default: the split `validation` of `train`.
        text_column: Column or JSON field that holds the text.
        streaming: Read documents in the order of the shards, which are shuffled every epoch, instead of shuffling all
            documents. Default: the hub is streamed; local files are memory-mapped and fully shuffled.
        tokenizer: Tokenizer, a hub id or a local folder. Its size must equal the model's `vocab_size`.
        sequence_length: Tokens in a sequence.
        packing: Join documents and cut them into full sequences, instead of truncating or padding each document.
        on_bad_record: What to do with a damaged record or shard of local files. `error` stops and names it. `skip`
            passes over the record, or the rest of the shard, names it in the log and counts it in the metrics.
        eval_tokens: Predicted tokens of the held-out documents on which an evaluation runs (the first so many).
        num_workers: Background processes that tokenize ahead of the training step, 0 (none) or 1.
    """

    train: str = "allenai/c4"
    name: str | None = "en"
    validation: str | None = None
    text_column: str = "text"
    streaming: bool | None = None
    tokenizer: str = "hf-internal-testing/llama-tokenizer"
    sequence_length: int = 256
    packing: bool = False
    on_bad_record: OnBadRecord = "error"
    eval_tokens: int = 10_000_000
    num_workers: int = 1

    def __post_init__(self) -> None:
        check_types(self, "data.")
        for field in ("train", "validation", "name", "text_column", "tokenizer"):
            check(getattr(self, field) != "", f"data.{field}", "", "name one")
        remedy = "predicting a token takes at least 2"
        check(self.sequence_length >= 2, "data.sequence_length", self.sequence_length, remedy)
        check(self.eval_tokens >= 1, "data.eval_tokens", self.eval_tokens, "an evaluation needs at least 1")
        remedy = "choose 0 (in the training process) or 1"
        check(self.num_workers in (0, 1), "data.num_workers", self.num_workers, remedy)

    def load(self, split: str) -> Documents:
        """Load the documents of `split`, "train" or "validation"; errors as for `load_documents`."""
        source = self.train
        if split == "validation":
            if self.validation is not None:
                source = self.validation
            elif is_local(source) and not os.path.isdir(os.path.join(os.path.expanduser(source), split)):
                raise ValueError(
                    f"data.validation is not set and data.train = {source!r} has no folder {split!r}: "
                    "set data.validation to the held-out documents."
                )
        return load_documents(
            source,
            split,
            name=self.name,
            text_column=self.text_column,
            streaming=self.streaming,
            on_bad_record=self.on_bad_record,
        )


def load_documents(
    source: str,
    split: str = "train",
    *,
    name: str | None = None,
    text_column: str = "text",
    streaming: bool | None = None,
    on_bad_record: OnBadRecord = "error",
) -> Documents:
    """Load documents as a data set with the single column `text`.

    With `on_bad_record="skip"` a record that cannot be read is there with the text None, and so is, once, what cannot
    be read of a shard: documents keep their numbers whichever of them are damaged.

    Args:
        source: A data set id of the hub, or a local file, folder or glob of shards.
        split: The hub's split, or the subfolder to read if the local folder has one of that name.
        name: Configuration of the hub's data set.
        text_column: Column or JSON field that holds the text.
        streaming: True for an `IterableDataset`, False for a memory-mapped `Dataset`; None streams the hub only.
        on_bad_record: `error` or `skip`, for local files.

    Raises:
        ValueError: nothing to read at `source`, shards of several formats, a corpus without documents; unless they
            are to be skipped, a record or shard that is damaged or without `text_column` (with file and line).
    """
    if not is_local(source):
        return _load_hub(source, name, split, text_column, streaming is not False)
    paths = _find_shards(source, split)
    filled = [_has_documents(path, text_column, on_bad_record) for path in paths]
    if not any(filled):
        raise ValueError(f"data: the corpus {source!r} is empty: its {len(paths)} files hold no document.")
    features = datasets.Features({"text": datasets.Value("string")})
    # Sizes and times are there for the fingerprint under which `datasets` caches: changed shards are read again.
    shards = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    arguments = {"shards": shards, "text_column": text_column, "on_bad_record": on_bad_record}
    if streaming:
        return datasets.IterableDataset.from_generator(_read_shards, features=features, gen_kwargs=arguments)
    try:
        documents = datasets.Dataset.from_generator(_read_shards, features=features, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    if bad := documents.data.column("text").null_count:
        logger.warning(f"{bad} of the {len(documents)} records of {source} cannot be read and will be skipped")
    return documents


def is_local(source: str) -> bool:
    looks_local = source.startswith((".", "/", "~")) or source.endswith(SHARD_ENDINGS) or glob.has_magic(source)
    return looks_local or os.path.exists(source)


def _load_hub(source: str, name: str | None, split: str, text_column: str, streaming: bool) -> Documents:
    try:
        documents = datasets.load_dataset(source, name, split=split, streaming=streaming)
        columns = documents.column_names or list(next(iter(documents), {}))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data: cannot load {source!r} (configuration {name!r}, split {split!r}): it is not a local path, and the "
            f"hub answers: {error}. Check the name and the connection, or name local files."
        ) from error
    if not columns:
        raise ValueError(f"data: split {split!r} of {source!r} is empty.")
    _check_column(text_column, columns, source)
    return documents.select_columns([text_column]).rename_columns(
        {text_column: "text"} if text_column != "text" else {}
    )


def _find_shards(source: str, split: str) -> list[Path]:
    # The functions of os.path, unlike pathlib's, take what cannot be a path for one that does not exist.
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        path = path / split if (path / split).is_dir() else path
        candidates = list(path.iterdir())
    else:
        candidates = [Path(match) for match in glob.glob(str(path), recursive=True)]
    shards = sorted(c for c in candidates if c.is_file() and c.name.endswith(SHARD_ENDINGS))
    if not shards:
        raise ValueError(
            f"data: no files to read at {str(path)!r}: expected a file, a folder or a glob of files ending in "
            f"{', '.join(SHARD_ENDINGS)}."
        )
    formats = {"json" if shard.name.endswith(JSON_ENDINGS) else shard.suffix[1:] for shard in shards}
    if len(formats) > 1:
        raise ValueError(
            f"data: {str(path)!r} holds files of several formats ({', '.join(sorted(formats))}): "
            "name those of one, for example by a glob."
        )
    return shards


def _has_documents(path: Path, text_column: str, on_bad_record: OnBadRecord) -> bool:
    texts = _read_shard(str(path), text_column, on_bad_record)
    return any(text is not None for text in texts)


def _read_shards(
    shards: list[tuple[str, int, int]], text_column: str, on_bad_record: OnBadRecord
) -> Iterator[dict[str, str | None]]:
    for path, _, _ in shards:
        for text in _read_shard(path, text_column, on_bad_record):
            yield {"text": text}


def _read_shard(path: str, text_column: str, on_bad_record: OnBadRecord) -> Iterator[str | None]:
    """The texts of a shard; with `skip` None for each record, or rest of the shard, that cannot be read."""
    for record in (_read_json if path.endswith(JSON_ENDINGS) else _read_table)(path, text_column):
        if isinstance(record, BadRecordError):
            if on_bad_record == "error":
                raise record
            logger.warning(f"skipping: {record}")
            yield None
        else:
            yield record


def _read_json(path: str, text_column: str) -> Iterator[str | BadRecordError]:
    number = 0
    try:
        # Bytes, because a text reader decodes ahead and would put a wrong encoding down to an earlier line.
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield _text_or_error(line, text_column, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        yield BadRecordError(f"data: {path} is damaged after line {number} ({error}): fetch it again.")


def _text_or_error(line: bytes, text_column: str, place: str) -> str | BadRecordError:
    try:
        return _text_of(json.loads(line.decode()), text_column, place)
    except BadRecordError as error:
        return error
    except (ValueError, RecursionError) as error:
        return BadRecordError(f"data: {place} is not JSON in UTF-8 ({error}): repair or remove it.")


def _text_of(record: object, text_column: str, place: str) -> str:
    if not isinstance(record, dict):
        raise BadRecordError(f"data: {place} is not a JSON object: expected one object a line.")
    _check_column(text_column, list(record), place)
    text = record[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadRecordError(f"data: {place}: {text_column!r} is not text but {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"data: {place}: {text_column!r} is not valid Unicode ({error}).") from error
    return text


def _read_table(path: str, text_column: str) -> Iterator[str | BadRecordError]:
    row = 0
    try:
        for batch in _record_batches(path, text_column):
            texts = batch.column(text_column)
            # Readers do not check: offsets may point outside the data, bytes may not be UTF-8.
            texts.validate(full=True)
            yield from (text or "" for text in texts.to_pylist())
            row += len(texts)
    except BadRecordError as error:
        yield error
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        yield BadRecordError(f"data: {path} is damaged after row {row} ({error}): fetch it again.")


def _record_batches(path: str, text_column: str) -> Iterator[pa.RecordBatch]:
    """Batches that hold the text column, of a parquet file or of an arrow file in either of its two formats."""
    if path.endswith(".parquet"):
        with pq.ParquetFile(path) as file:
            _check_schema(file.schema_arrow, text_column, path)
            yield from file.iter_batches(columns=[text_column])
        return
    with pa.memory_map(path) as memory:
        is_file_format = memory.read(6) == b"ARROW1"
        memory.seek(max(0, memory.size() - len(END_OF_STREAM)))
        if not is_file_format and memory.read() != END_OF_STREAM:
            raise pa.ArrowInvalid("the end of the stream is missing")
        memory.seek(0)
        with pa.ipc.open_file(memory) if is_file_format else pa.ipc.open_stream(memory) as reader:
            _check_schema(reader.schema, text_column, path)
            if is_file_format:
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from reader


def _check_schema(schema: pa.Schema, text_column: str, path: str) -> None:
    _check_column(text_column, schema.names, path)
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise BadRecordError(f"data: {path}: column {text_column!r} is not text but {kind}.")


def _check_column(text_column: str, columns: list[str], place: str) -> None:
    if text_column not in columns:
        raise BadRecordError(
            f"data: {place} has no column {text_column!r} (it has {', '.join(map(repr, columns)) or 'none'}): "
            "set data.text_column."
        )
