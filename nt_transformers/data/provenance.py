# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What a body of text truly is, for a reader who does not have the disk it lies on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .documents import is_local
from .sources import describe_sources


@dataclass(frozen=True)
class Provenance:
    """`name` fits into a sentence, `description` is Markdown; `hub_id` is the data set's, if the hub has it."""

    name: str
    description: str
    hub_id: str | None = None


def text_provenance(source: str, name: str | None = None) -> Provenance:
    """The provenance of `TextDataConfig.train`; `name` is the hub's configuration.

    A corpus that `prepare` built says what it is made of; of other local files only their own name is known.
    """
    if not is_local(source):
        full_name = f"{source}, configuration {name}" if name else source
        return Provenance(full_name, f"[{full_name}](https://huggingface.co/datasets/{source})", source)
    path = Path(source).expanduser()
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / "statistics.json").is_file():
            return _prepared(json.loads((folder / "statistics.json").read_text(encoding="utf-8")))
    return Provenance(
        f"local files ({path.name})", f"Local files named `{path.name}`; nothing more is known about them."
    )


def _prepared(statistics: dict[str, Any]) -> Provenance:
    train, sources = statistics["splits"]["train"], statistics["settings"]["sources"]
    description = (
        "A stand-in for C4, which it is not: short English texts from package registries, "
        f"{train['documents']:,} training documents of {train['characters']:,} characters.\n\n"
        f"{describe_sources(sources)}\n\n"
        "Do not report HellaSwag or BoolQ as zero-shot results of this model if they are among the sources."
    )
    return Provenance(f"a stand-in for C4 ({', '.join(sources)})", description)
