# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Documents: every accepted form gives the same texts, and every kind of bad input a clear error."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nt_transformers.data import TextDataConfig, load_documents


TEXTS = ["First document.", "Second one,\nof two lines.", "Träume, 本, 🙂"]


def write_lines(path: Path, lines: list[str | bytes]) -> Path:
    data = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(texts: list[str], column: str = "text") -> list[str | bytes]:
    return [json.dumps({column: text}) for text in texts]


def write_texts(path: Path) -> Path:
    table = pa.table({"url": ["u"] * len(TEXTS), "text": TEXTS})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        write_lines(path, json_lines(TEXTS))
    return path


def texts_of(documents: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    assert list(documents.features) == ["text"]
    return [document["text"] for document in documents]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".json.gz", ".jsonl.gz", ".json", ".jsonl", ".parquet", ".arrow"])
def test_every_form_gives_the_same_texts(tmp_path: Path, ending: str, streaming: bool) -> None:
    file = write_texts(tmp_path / f"a{ending}")
    for source in (str(file), str(tmp_path), f"{tmp_path}/*"):
        assert texts_of(load_documents(source, streaming=streaming)) == TEXTS


def test_arrow_file_format_and_parts_of_a_saved_dataset(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert texts_of(load_documents(str(tmp_path / "a.arrow"))) == TEXTS
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert texts_of(load_documents(f"{tmp_path}/saved/*.arrow")) == TEXTS


def test_local_is_a_map_by_default_and_a_stream_on_request(corpus_dir: Path) -> None:
    documents = load_documents(str(corpus_dir), "train")
    assert isinstance(documents, datasets.Dataset)
    assert len(documents) == 300
    stream = load_documents(str(corpus_dir), "train", streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert stream.num_shards == 3
    assert texts_of(stream) == texts_of(documents)


def test_other_columns_may_differ_between_shards(tmp_path: Path) -> None:
    """C4's timestamps, read as times, and an empty one: the loader of `datasets` fails on these."""
    write_lines(tmp_path / "a.jsonl", ['{"text": "a", "timestamp": "2019-04-25T12:57:54Z"}'])
    write_lines(tmp_path / "b.jsonl", ['{"text": "b", "timestamp": "", "extra": [1]}', "", '{"text": null}'])
    assert texts_of(load_documents(str(tmp_path))) == ["a", "b", ""]


def test_changed_shards_are_read_again(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", json_lines(["old"]))
    assert texts_of(load_documents(str(file))) == ["old"]
    write_lines(file, json_lines(["new"]))
    os.utime(file, ns=(1, 1))
    assert texts_of(load_documents(str(file))) == ["new"]


def test_column_of_another_name(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", json_lines(["x"], column="content"))
    assert texts_of(load_documents(str(file), text_column="content")) == ["x"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.jsonl", ['{"content": "x", "id": 1}'], r"a\.jsonl, line 1 has no column 'text' .*'content', 'id'"),
        ("a.jsonl", ["3"], r"a\.jsonl, line 1 is not a JSON object"),
        ("a.jsonl", ['{"text": 3}'], r"a\.jsonl, line 1: 'text' is not text but int"),
        ("a.jsonl", [r'{"text": "\ud800"}'], r"a\.jsonl, line 1: 'text' is not valid Unicode"),
        ("a.json.gz", ['{"text": "x'], r"a\.json\.gz, line 1 is not JSON"),
        ("a.jsonl", [b'{"text": "\xff"}'], r"a\.jsonl, line 1 is not JSON in UTF-8"),
        ("a.jsonl", [], "is empty"),
        ("a.json.gz", [], "is empty"),
        ("a.txt", ["x"], r"no files to read at .*\.json\.gz, "),
    ],
)
def test_bad_first_record(tmp_path: Path, name: str, lines: list[str | bytes], message: str, streaming: bool) -> None:
    write_lines(tmp_path / name, lines)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path), streaming=streaming)


@pytest.mark.parametrize("bad", ['{"text": "x', '{"content": "x"}', b'{"text": "\xff"}'])
def test_bad_record_is_named_by_file_and_line(tmp_path: Path, bad: str | bytes) -> None:
    write_lines(tmp_path / "a.jsonl", json_lines(TEXTS))
    write_lines(tmp_path / "b.jsonl", [*json_lines(["x"] * 500), bad, *json_lines(["x"] * 500)])
    with pytest.raises(ValueError, match=r"b\.jsonl, line 501 "):
        load_documents(str(tmp_path))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 501 "):
        list(load_documents(str(tmp_path), streaming=True))


BAD_LINES: list[str | bytes] = [
    '{"text": "x',
    '{"content": "x"}',
    b'{"text": "\xff"}',
    '{"text": 3}',
    r'{"text": "\ud800"}',
    "[]",
    "[" * 100_000,
    '{"text": ' + "1" * 5000 + "}",
]


@pytest.mark.parametrize("streaming", [False, True])
def test_skipping_leaves_a_gap_for_every_bad_record_and_names_it(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [*json_lines(TEXTS), *BAD_LINES, *json_lines(TEXTS)]
    file = write_lines(tmp_path / "a.json.gz", lines)
    for number, bad in enumerate(BAD_LINES, start=len(TEXTS) + 1):
        alone = write_lines(tmp_path / "alone.jsonl", [*json_lines(TEXTS), bad])
        with pytest.raises(ValueError, match=r"alone\.jsonl, line 4"):
            list(load_documents(str(alone), streaming=streaming))
        assert f"{file}, line {number}" not in caplog.text
    documents = load_documents(str(file), streaming=streaming, on_bad_record="skip")
    assert texts_of(documents) == [*TEXTS, *[None] * len(BAD_LINES), *TEXTS]
    for number in range(len(TEXTS) + 1, len(TEXTS) + len(BAD_LINES) + 1):
        assert f"skipping: data: {file}, line {number}" in caplog.text


@pytest.mark.parametrize("ending", [".json.gz", ".parquet", ".arrow"])
def test_skipping_passes_over_the_rest_of_a_damaged_shard(tmp_path: Path, ending: str) -> None:
    write_texts(tmp_path / f"a{ending}")
    broken = write_texts(tmp_path / f"b{ending}")
    broken.write_bytes(broken.read_bytes()[:-30])
    write_texts(tmp_path / f"c{ending}")
    read = texts_of(load_documents(str(tmp_path), on_bad_record="skip"))
    assert read[: len(TEXTS)] == read[-len(TEXTS) :] == TEXTS
    assert read[len(TEXTS) : -len(TEXTS)].count(None) == 1


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["{", "["])
    with pytest.raises(ValueError, match="is empty: its 1 files hold no document"):
        load_documents(str(tmp_path), on_bad_record="skip")


def test_an_arrow_stream_cut_between_two_batches_is_damaged(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.arrow")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.arrow is damaged after row 0 .*the end of the stream is missing"):
        load_documents(str(file))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_a_table_of_wrongly_encoded_text_is_damaged(tmp_path: Path, ending: str) -> None:
    binary = pa.array([b"fine", b"\xe9t\xe9"])
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, binary.buffers())})
    file = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match=rf"a\{ending} is damaged after row 0 .*UTF"):
        load_documents(str(file))


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.json.gz", [json.dumps({"text": os.urandom(40).hex()}) for _ in range(1000)])
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.json\.gz is damaged after line \d+"):
        load_documents(str(file))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_bad_tables(tmp_path: Path, ending: str) -> None:
    file = write_texts(tmp_path / f"a{ending}")
    with pytest.raises(ValueError, match=rf"a\{ending} has no column 'content' .*'url', 'text'"):
        load_documents(str(file), text_column="content")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"a\{ending} is damaged"):
        load_documents(str(file))
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"a\{ending} is damaged"):
        load_documents(str(file))


def test_column_that_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'text' is not text but int64"):
        load_documents(str(tmp_path))


def test_mixed_formats(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.parquet")
    write_texts(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match=r"several formats \(json, parquet\)"):
        load_documents(str(tmp_path))
    assert texts_of(load_documents(f"{tmp_path}/*.parquet")) == TEXTS


@pytest.mark.parametrize(
    "source", ["/nowhere/c4", "./nowhere/*.json.gz", "nowhere.parquet", "~nowhere/c4", f"/nowhere/{'x' * 300}"]
)
def test_no_such_path(source: str) -> None:
    with pytest.raises(ValueError, match="no files to read at .*nowhere"):
        load_documents(source)


@pytest.mark.parametrize("streaming", [None, False])
def test_hub_out_of_reach(streaming: bool | None) -> None:
    with pytest.raises(ValueError, match="cannot load 'nowhere/c4' .* not a local path"):
        load_documents("nowhere/c4", streaming=streaming)


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_documents_keep_only_their_text(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    def load_dataset(source: str, name: str | None, split: str, streaming: bool) -> object:
        assert (source, name, split) == ("some/corpus", "en", "validation")
        documents = datasets.Dataset.from_dict({"content": TEXTS, "url": ["u"] * 3})
        return documents.to_iterable_dataset() if streaming else documents

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"name": "en", "streaming": streaming}
    assert texts_of(load_documents("some/corpus", "validation", text_column="content", **options)) == TEXTS
    with pytest.raises(ValueError, match="some/corpus has no column 'text' .*'content', 'url'"):
        load_documents("some/corpus", "validation", **options)


def test_config_loads_both_splits(corpus_dir: Path) -> None:
    config = TextDataConfig(train=str(corpus_dir))
    assert len(config.load("train")) == 300
    assert len(config.load("validation")) == 40
    explicit = TextDataConfig(train=str(corpus_dir / "train"), validation=str(corpus_dir / "test"))
    assert texts_of(explicit.load("validation")) == texts_of(load_documents(str(corpus_dir), "test"))


def test_training_documents_are_never_taken_for_validation(corpus_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.validation is not set"):
        TextDataConfig(train=str(corpus_dir / "train")).load("validation")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train", ""),
        ("tokenizer", ""),
        ("text_column", ""),
        ("sequence_length", 1),
        ("eval_tokens", 0),
        ("num_workers", 2),
        ("on_bad_record", "ignore"),
    ],
)
def test_bad_config(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field}"):
        TextDataConfig(**{field: value})
