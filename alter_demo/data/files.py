"""Reading the user's own data: JSONL, JSON or CSV files with `question,answer` or with `text`."""

import csv
import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .built_in import with_general_prompts
from .schema import Example, ForgetSet, paraphrased

MAX_MB = 50
FIELDS = ("question", "answer", "paraphrased_question", "paraphrased_answer")


def forget_set_from_files(forget_path: Path, retain_path: Path | None) -> ForgetSet:
    """A forget set from a file of what to forget and, optionally, one of what to keep.

    The held-out groups are the paraphrases. Without paraphrases, half of the retain examples
    become the neighbours, and the forget examples are measured as they are trained on.
    """
    forget = read_file(forget_path)
    retain = read_file(retain_path) if retain_path else []
    neighbours = paraphrased(retain)
    if not neighbours and len(retain) > 1:
        retain, neighbours = retain[::2], retain[1::2]
    return with_general_prompts(forget_path.stem, forget, retain, neighbours)


def read_file(path: Path, limit: int | None = None) -> list[Example]:
    """The examples of a JSONL, JSON (a list, or one object per line) or CSV file.

    Args:
        limit: read only the first `limit` examples; a JSONL file may then have any size.

    Raises:
        UserError: the file is missing, larger than 50 MB, not UTF-8, malformed (with line and
            column), or has no examples, or a column is missing.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, it accepts overlong names and null bytes
        raise UserError(f"File {path} not found.")
    name, suffix = path.name, path.suffix.lower()
    partial = limit is not None and suffix == ".jsonl"
    megabytes = path.stat().st_size / 2**20
    if megabytes > MAX_MB and not partial:
        raise UserError(f"{name} must be at most {MAX_MB} MB, got {megabytes:.0f} MB.")
    try:
        with path.open(encoding="utf-8-sig") as handle:
            text = "".join(itertools.islice(handle, limit)) if partial else handle.read()
    except UnicodeDecodeError as error:
        at = error.start
        raise UserError(f"{name} is not UTF-8 text (byte {at}). Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"Cannot read {name} ({error.strerror}).") from None
    parsers = {".jsonl": parse_jsonl, ".json": parse_json, ".csv": parse_csv}
    if suffix not in parsers:
        raise UserError(f"{name} must end in .jsonl, .json or .csv.")
    rows = parsers[suffix](text, name)
    examples = [make_example(row, f"{name}, line {line}") for line, row in rows]
    if not examples:
        raise UserError(f"{name} has no examples.")
    return examples[:limit]


def parse_jsonl(text: str, name: str) -> Iterator[tuple[int, object]]:
    """As every parser here, yields (line or position, row)."""
    for line, content in enumerate(text.split("\n"), 1):  # splitlines would split inside strings
        if content.strip():
            yield line, parse_value(content, name, line)


def parse_json(text: str, name: str) -> Iterator[tuple[int, object]]:
    try:
        rows = parse_value(text, name) if text.strip() else []
    except UserError:
        if not text.lstrip().startswith("{"):
            raise
        return parse_jsonl(text, name)  # TOFU's own .json files have one object per line
    if not isinstance(rows, list):
        raise UserError(f"{name} must contain a list of examples, got {type(rows).__name__}.")
    return enumerate(rows, 1)


def parse_csv(text: str, name: str) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            place = f"{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place}: the number of columns differs from the header.")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{name} is not valid CSV near line {reader.line_num}: {error}.") from None


def parse_value(content: str, name: str, first_line: int = 1):
    """One JSON value. Raises UserError with its line and column in the file."""
    line, column = first_line, 1
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line, column, reason = line + error.lineno - 1, error.colno, error.msg
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError:
        reason = "a number is too long"
    raise UserError(f"{name} is not valid JSON at line {line}, column {column}: {reason}.")


def make_example(row, source: str) -> Example:
    """An `Example` from a row: question and answer, or text, or prompt and gt (MUSE).

    An error message starts with `source`, the file and line.
    """
    if not isinstance(row, dict):
        raise UserError(
            f"{source}: an example must be an object with question and answer, or with text."
        )
    if "text" in row and "answer" not in row:
        row = {"question": "", "answer": row["text"]}
    if "prompt" in row and "gt" in row:  # MUSE's verbatim memorization
        row = {"question": row["prompt"], "answer": row["gt"]}
    if missing := [field for field in ("question", "answer") if field not in row]:
        raise UserError(
            f"{source}: {' and '.join(missing)} missing, got "
            f"{', '.join(map(str, row)) or 'nothing'}. Each example needs question and answer, "
            "or text."
        )
    fields = {name: row[name] for name in FIELDS if row.get(name) or name in FIELDS[:2]}
    perturbed = row.get("perturbed_answer")
    perturbed = perturbed if isinstance(perturbed, list) else []
    for name, value in [*fields.items(), *(("perturbed_answer", p) for p in perturbed)]:
        if not isinstance(value, str):
            raise UserError(f"{source}: {name} must be text, got {type(value).__name__}.")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{source}: {name} contains half a character (a lone surrogate).")
    if not fields["answer"].strip():
        raise UserError(f"{source}: the answer is empty.")
    return Example(**fields, perturbed_answer=perturbed)
