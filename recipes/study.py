# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Compares methods on text or images: a grid of training runs, their learning rates tuned, test data touched once.

python -m nt_transformers.data.prepare --output data/study --sources boolq --vocab-size 1024
python recipes/study.py --config recipes/configs/study_text.yaml    # --dry_run true shows the runs and their cost
python -m nt_transformers.report runs/study_text --output report.html

python recipes/study.py --config recipes/configs/study_vision.yaml

The same command continues a study that was stopped. Any field can be given again as --field value; what is inside
`training` and `methods` is changed in the file.
"""

from nt_transformers.study import StudyConfig, run_study
from nt_transformers.training import run_recipe


def main() -> None:
    run_recipe(StudyConfig, run, __doc__)


def run(config: StudyConfig) -> None:
    rows = run_study(config)
    broken = [row["run"] for row in rows if row["status"] == "failed"]
    if broken:
        raise SystemExit(f"{len(broken)} of {len(rows)} runs broke: {', '.join(broken)}")


if __name__ == "__main__":
    main()
