# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot evaluation gives lm-eval's own results, for the vote and for every head."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from made_up import SHAPE, make_model
from transformers import LlamaConfig, LlamaForCausalLM

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.evaluation import SUITES, NeuroTrailsLM, PerHeadTaskManager, evaluate_zero_shot
from nt_transformers.evaluation.offline import write_tasks


ROOT = Path(__file__).parents[2]
REAL_DATA = ROOT / "data" / "eval"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no data/eval: run `make eval-data`")
TASKS = ["piqa", "arc_easy", "lambada_openai"]


def scores(results: dict[str, Any], member: str = "none") -> dict[str, dict[str, float]]:
    """Metrics and standard errors by task, but for the error of a perplexity, which is drawn."""
    return {
        task: {
            key: metrics[f"{key},{member}"]
            for key, _, name in (key.partition(",") for key in metrics)
            if name == member and key != "perplexity_stderr"
        }
        for task, metrics in results["results"].items()
    }


def test_every_member_scores_as_the_model_that_has_no_other(
    checkpoint: Path, save_checkpoint: Callable[[torch.nn.Module], Path], offline_data: Path
) -> None:
    tasks = ["piqa", "arc_easy"]
    results = evaluate_zero_shot(str(checkpoint), tasks, per_head=True, offline=offline_data, device="cpu")
    singles = {("head_1",): make_model().extract_head(1), ("none", "probs_vote"): make_model()}
    singles[("logits_vote",)] = make_model(vote="logits")
    for members, single in singles.items():
        alone = evaluate_zero_shot(str(save_checkpoint(single)), tasks, offline=offline_data, device="cpu")
        for member in members:
            assert scores(results, member) == scores(alone), member
    assert len({json.dumps(scores(results, f"head_{m}")) for m in range(3)}) > 1


def test_groups_are_aggregated_for_every_member(checkpoint: Path, offline_data: Path) -> None:
    results = evaluate_zero_shot(str(checkpoint), ["mmlu"], per_head=True, offline=offline_data, device="cpu")
    subjects = [metrics for task, metrics in results["results"].items() if task not in results["group_subtasks"]]
    assert len(subjects) == 57
    for member in ("none", "head_2", "logits_vote"):
        mean = sum(metrics[f"acc,{member}"] for metrics in subjects) / len(subjects)
        assert results["groups"]["mmlu"][f"acc,{member}"] == pytest.approx(mean)


def test_results_say_what_was_run(checkpoint: Path, offline_data: Path) -> None:
    results = evaluate_zero_shot(str(checkpoint), ["piqa"], offline=offline_data, batch_size=3, limit=5, device="cpu")
    assert results["model"] == str(checkpoint)
    assert results["n-shot"] == {"piqa": 0}
    assert results["n-samples"]["piqa"] == {"original": 12, "effective": 5}
    assert results["package_versions"]["lm_eval"] == lm_eval.__version__
    assert results["config"]["batch_size"] == 3


def test_the_published_set() -> None:
    assert SUITES["published"] == ("boolq", "arc_easy", "piqa", "hellaswag", "openbookqa", "winogrande")


@pytest.mark.parametrize("size", [0, -4])
def test_a_batch_holds_something(checkpoint: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={size}"):
        evaluate_zero_shot(str(checkpoint), ["piqa"], batch_size=size)


def test_a_checkpoint_needs_a_tokenizer(tmp_path: Path, offline_data: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: "):
        evaluate_zero_shot(str(tmp_path), ["piqa"], offline=offline_data)


def test_missing_offline_data_name_the_make_target(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make eval-data"):
        evaluate_zero_shot(str(checkpoint), ["piqa"], offline=tmp_path)


@pytest.mark.slow
def test_an_unknown_task_is_told_with_similar_names(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"no 'arc_eazy': did you mean .*arc_easy"):
        evaluate_zero_shot(str(checkpoint), ["arc_eazy"])


def test_only_choices_can_be_scored_for_every_head(tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text('{"text": "the river"}\n')
    task = {
        "task": "continue",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_target": "text",
    }
    manager = PerHeadTaskManager(["head_0"], include_path=tmp_path, include_defaults=False)
    with pytest.raises(ValueError, match="per_head: the task 'continue' is of type generate_until"):
        manager.load([task])


def test_lm_eval_is_needed_for_evaluation_only_and_its_extra_is_named() -> None:
    code = "import sys, nt_transformers; assert 'lm_eval' not in sys.modules; sys.modules['lm_eval'] = None\n"
    code += "import nt_transformers.evaluation"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert 'pip install "nt_transformers[eval]"' in run.stderr


def _environment() -> dict[str, str]:
    # One thread, as in this process: more of them may round otherwise.
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_three_ways_agree_exactly(checkpoint: Path, offline_data: Path, tmp_path: Path) -> None:
    """Our script, lm-eval's command line with the checkpoint's own code, and the registered model in Python."""
    script = [sys.executable, "eval/zero_shot.py", "--model", checkpoint, "--tasks", ",".join(TASKS), "--per_head"]
    script += ["--offline", offline_data, "--output", tmp_path / "script.json", "--batch_size", "4", "--device", "cpu"]
    run = subprocess.run(script, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True)
    assert "|head_2" in run.stdout

    # Where the package cannot be imported.
    model_args = f"pretrained={checkpoint},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model_args]
    command += ["--include_path", offline_data / "tasks", "--tasks", *TASKS, "--device", "cpu", "--batch_size", "4"]
    command += ["--output_path", tmp_path / "command.json"]
    environment = {name: value for name, value in _environment().items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)

    write_tasks(offline_data, tmp_path)
    registered = lm_eval.simple_evaluate(
        model="neurotrails",
        model_args={"pretrained": str(checkpoint)},
        tasks=TASKS,
        batch_size=4,
        device="cpu",
        bootstrap_iters=1000,
        task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
    )
    results = [
        json.loads((tmp_path / "script.json").read_text()),
        json.loads(next(tmp_path.glob("command*.json")).read_text()),
        registered,
    ]
    first, second, third = (scores(result) for result in results)
    assert first == second == third
    assert set(first) == set(TASKS)


@pytest.mark.slow
@needs_real_data
def test_a_wrapped_llama_scores_as_the_stock_one_on_real_tasks(
    save_checkpoint: Callable[[torch.nn.Module], Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**SHAPE))
    wrapped = NeuroTrailsLlamaForCausalLM.from_dense(stock, num_ensemble_heads=1, num_head_layers=2)
    write_tasks(REAL_DATA, tmp_path)
    tasks = ["boolq", "piqa", "winogrande", "copa"]
    results = [
        lm_eval.simple_evaluate(
            NeuroTrailsLM(str(save_checkpoint(model)), device="cpu", batch_size=8),
            tasks=tasks,
            limit=25,
            task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
        )
        for model in (stock, wrapped)
    ]
    assert scores(results[0]) == scores(results[1])
    for task in tasks:
        logprobs = [
            torch.tensor([response[0][0] for doc in result["samples"][task] for response in doc["resps"]])
            for result in results
        ]
        torch.testing.assert_close(*logprobs, rtol=0, atol=1e-4)


@pytest.mark.slow
@needs_real_data
def test_an_untrained_model_is_at_chance(save_checkpoint: Callable[[torch.nn.Module], Path]) -> None:
    """Four tasks whose right answers are neither the short ones nor mostly of one kind; two standard errors."""
    chance = {"hellaswag": 1 / 4, "piqa": 1 / 2, "social_iqa": 1 / 3, "winogrande": 1 / 2}
    torch.manual_seed(0)
    config = NeuroTrailsLlamaConfig(**SHAPE | {"initializer_range": 0.02}, num_head_layers=2)
    folder = save_checkpoint(NeuroTrailsLlamaForCausalLM(config))
    results = evaluate_zero_shot(str(folder), list(chance), offline=REAL_DATA, limit=200, batch_size=16, device="cpu")
    for task, expected in chance.items():
        metrics = results["results"][task]
        assert metrics["acc,none"] == pytest.approx(expected, abs=2 * metrics["acc_stderr,none"]), task
