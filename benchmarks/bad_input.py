# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Random bad configurations and damaged shards: each has to end in one clear message.

    python benchmarks/bad_input.py [--configs N] [--shards N] [--seed N] [--quick] [--json FILE]

Configurations: the YAML file of a tiny run with one field, anywhere in it, given a random value (wrong type, out of
range, NaN, infinity, huge, empty, control characters, lists, ...), or broken as a file. The command line has to refuse
it with exit code 2 and a message that names the field or the file. What it accepts is trained for two steps, which has
to work or raise an error of ours; accepted values do not count towards the number of configurations.

Shards: JSON lines (plain and gzip), parquet and arrow with a record that is broken, wrongly encoded or typed, or lacks
its text, or cut short, zeroed, flipped, emptied. `on_bad_record="error"` has to name file and line; `"skip"` has to
pass over what is damaged, keep the rest and say how much is missing.

    configs_unclear, shards_unclear    cases without such a message; must be 0
    slowest_error_seconds              from the start to the message, of all cases that ended in one
"""

import argparse
import contextlib
import dataclasses
import gzip
import io
import json
import logging
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from accelerate.state import AcceleratorState
from harness import parse_args, report
from tiny_run import make_texts, prepare

from nt_transformers.data import load_documents
from nt_transformers.training import (
    CheckpointError,
    NonFiniteError,
    TextTrainingConfig,
    parse_arguments,
    train_language_model,
)


CONFIGS, SHARDS = 500, 100
QUICK_CONFIGS, QUICK_SHARDS = 60, 30

VALUES: tuple[Any, ...] = (
    *("many", "", " ", "null", "nan", "1e400", "é🙂", "a\0b", "\n", "../..", "x" * 10_000),
    *(0, -1, 3, 10**30, -(10**30), 0.5, 1.5, -0.5, 1e-30, 1e30, math.nan, math.inf, -math.inf, True, False, None),
    *([], [1, "a"], [[]], ["adam"], {}, {"a": 1}, {"density": 0.5}),
)

Fields = dict[str, Any]


def paths(fields: Fields, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The place of every field, sections included."""
    for name, value in fields.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, name))


def break_config(all_fields: list[tuple[str, ...]], fields: Fields, rng: random.Random) -> tuple[bytes, str]:
    """A configuration file with one mistake, and what its error has to name."""
    kind = rng.choice(["value"] * 12 + ["unknown", "not a mapping", "syntax", "encoding"])
    broken = json.loads(json.dumps(fields))
    if kind == "not a mapping":
        return rng.choice((b"- a\n- b\n", b"text", b"3")), "config"
    if kind == "syntax":
        return yaml.safe_dump(broken).encode() + rng.choice(
            (b"\n  : {", b"\nfoo: [1, 2", b'\n"', b"\n\tx: 1")
        ), "config"
    if kind == "encoding":
        return yaml.safe_dump(broken).encode() + rng.choice((b"\nname: \xff\xfe", b"\nname: \x00")), "config"
    path = rng.choice(all_fields)
    section = broken
    for name in path[:-1]:
        section = section.setdefault(name, {})
    if kind == "unknown":
        section[f"{path[-1]}x"] = 1
    else:
        section[path[-1]] = rng.choice(VALUES)
    return yaml.safe_dump(broken, allow_unicode=True).encode(), path[-1]


def try_config(file: Path, named: str) -> str:
    """What becomes of a configuration: `refused`, `trained`, or a description of an unclear end."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            config = parse_arguments(TextTrainingConfig, "A tiny run.", ["--config", str(file)])
    except SystemExit as stop:
        message = stderr.getvalue()
        clear = stop.code == 2 and named in message and "Traceback" not in message
        return "refused" if clear else f"exit code {stop.code}, {named!r} not in the message: {message[-300:]}"
    except Exception as error:
        return f"parsing raised {error!r:.300}"
    try:
        short = dataclasses.replace(config, max_steps=min(config.max_steps, 2), overwrite_output_dir=True)
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stderr):
            train_language_model(short)
    except (ValueError, NonFiniteError, CheckpointError):
        return "refused"
    except Exception as error:
        return f"training raised {error!r:.300}"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return "trained"


def json_lines(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text, "url": "u"}, ensure_ascii=False).encode() for text in texts]


BAD_LINES: tuple[Callable[[bytes], bytes], ...] = (
    lambda line: line[: len(line) // 2],
    lambda line: line.replace(b'"text"', b'"content"'),
    lambda line: b'{"text": 3}',
    lambda line: b'{"text": ["a"]}',
    lambda line: b'{"text": "\xe9t\xe9"}',
    lambda line: rb'{"text": "\ud800"}',
    lambda line: b"[1, 2]",
    lambda line: b"[" * 5000,
    lambda line: b'{"text": ' + b"1" * 5000 + b"}",
    lambda line: line.decode().encode("utf-16"),
    lambda line: line + b"}",
)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(1, len(content) - 1)]


def flip(content: bytes, rng: random.Random) -> bytes:
    # Behind the header of a gzip file, whose time and name nobody checks.
    place = rng.randrange(20, len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def zero_end(content: bytes, rng: random.Random) -> bytes:
    length = rng.randint(8, len(content) // 2)
    return content[:-length] + bytes(length)


def nothing(content: bytes, rng: random.Random) -> bytes:
    return b""


def noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(content))


def table_bytes(table: pa.Table, ending: str) -> bytes:
    sink = io.BytesIO()
    if ending == ".parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=20)
    return sink.getvalue()


def damaged_shard(texts: list[str], rng: random.Random) -> tuple[str, bytes, str]:
    """Ending and content of a damaged shard, and the place that its error has to name."""
    ending = rng.choice((".jsonl", ".json.gz", ".parquet", ".arrow"))
    if ending in (".parquet", ".arrow"):
        if rng.random() < 0.6:
            return (
                ending,
                rng.choice((cut, zero_end, nothing, noise))(table_bytes(pa.table({"text": texts}), ending), rng),
                "",
            )
        columns = rng.choice(({"content": texts}, {"text": list(range(len(texts)))}, {"text": [[t] for t in texts]}))
        return ending, table_bytes(pa.table(columns), ending), "text"
    lines = json_lines(texts)
    if ending == ".json.gz" and rng.random() < 0.5:
        content = gzip.compress(b"\n".join(lines) + b"\n")
        return ending, rng.choice((cut, flip, zero_end, noise))(content, rng), ""
    number = rng.randrange(len(lines))
    lines[number] = rng.choice(BAD_LINES)(lines[number])
    content = b"\n".join(lines) + b"\n"
    return ending, gzip.compress(content) if ending == ".json.gz" else content, f"line {number + 1}"


def try_shard(file: Path, place: str, texts: list[str], streaming: bool) -> str:
    """`clear`, or how the handling of a damaged shard was not."""
    try:
        list(load_documents(str(file), streaming=streaming))
        return "read without an error"
    except ValueError as error:
        if file.name not in str(error) or place not in str(error):
            return f"{file.name} or {place!r} not named: {error}"
    except Exception as error:
        return f"raised {error!r:.300}"
    try:
        read = [row["text"] for row in load_documents(str(file), streaming=streaming, on_bad_record="skip")]
    except ValueError as error:
        return "clear" if "is empty" in str(error) else f"skipping raised {error}"
    except Exception as error:
        return f"skipping raised {error!r:.300}"
    whole = [text for text in read if text is not None]
    # gzip notices a flipped bit only at its end, after it gave the text before.
    exact = place != "" or file.suffix != ".gz"
    if len(whole) == len(read) or (exact and not set(whole) <= set(texts)):
        return f"skipping gave {len(whole)} of {len(texts)} texts and {len(read) - len(whole)} gaps"
    return "clear"


def main() -> None:
    """Break, try, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", type=int, help=f"default: {CONFIGS}, with --quick {QUICK_CONFIGS}")
    parser.add_argument("--shards", type=int, help=f"default: {SHARDS}, with --quick {QUICK_SHARDS}")
    parser.add_argument("--seed", type=int, default=0)
    args = parse_args(parser)
    rng = random.Random(args.seed)
    logging.disable(logging.WARNING)
    unclear: dict[str, list[str]] = {"configs": [], "shards": []}
    slowest, refused, trained = 0.0, 0, 0

    with tempfile.TemporaryDirectory(prefix="bad-input-") as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "cache")
        # Some of the paths tried are relative.
        os.chdir(folder)
        fields = prepare(folder)
        complete = dataclasses.asdict(
            parse_arguments(TextTrainingConfig, "", ["--config", str(write(folder, fields))])
        )
        all_fields = list(paths(complete))
        while refused + len(unclear["configs"]) < (args.configs or (QUICK_CONFIGS if args.quick else CONFIGS)):
            content, named = break_config(all_fields, fields, rng)
            file = folder / "config.yaml"
            file.write_bytes(content)
            start = time.monotonic()
            outcome = try_config(file, named)
            if outcome != "trained":
                slowest = max(slowest, time.monotonic() - start)
            refused += outcome == "refused"
            trained += outcome == "trained"
            if outcome not in ("refused", "trained"):
                unclear["configs"].append(f"{named}: {outcome}\n{content.decode(errors='replace')[-100:]}")

        shards = args.shards or (QUICK_SHARDS if args.quick else SHARDS)
        for index in range(shards):
            texts = make_texts(60, seed=index)
            ending, content, place = damaged_shard(texts, rng)
            file = folder / f"shard_{index}{ending}"
            file.write_bytes(content)
            start = time.monotonic()
            outcome = try_shard(file, place, texts, streaming=rng.random() < 0.5)
            slowest = max(slowest, time.monotonic() - start)
            if outcome != "clear":
                unclear["shards"].append(f"{file.name}: {outcome}")
    report(
        {
            "configs_refused": refused,
            "configs_trained": trained,
            "configs_unclear": len(unclear["configs"]),
            "shards": shards,
            "shards_unclear": len(unclear["shards"]),
            "slowest_error_seconds": slowest,
        },
        args,
    )
    if any(unclear.values()):
        sys.exit("\n".join(f"{kind}: {case}" for kind, cases in unclear.items() for case in cases))


def write(folder: Path, fields: Fields) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
