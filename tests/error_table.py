"""Collects every error id of the source, its exit code and its message, and renders docs/errors.md.

Run ``python tests/error_table.py`` to write the page again.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compressor", "exporters", "validators")
PAGE = ROOT / "docs" / "errors.md"

HEAD = """# Errors

Every error has a stable id, one line that says what was expected and what came, and one line that says what to do.
`--json` prints the same as one object. The exit code tells a pipeline what kind of trouble it is:

| code | meaning |
|---|---|
| 0 | done; every gate passed |
| 1 | a fault of the program; the traceback is in the log file that is named |
| 2 | usage or recipe |
| 3 | input refused: unsafe, corrupt, altered or unsupported |
| 4 | a measured gate failed; the output is complete and its report says which |
| 5 | resources: memory, disk, device, execution provider |
| 6 | the output exists, is locked or cannot be written |
| 7 | hub or network |
| 75 | stopped safely between two blocks; run the same command again |
| 130, 143 | stopped at once by a second signal |

`…` stands for what the message fills in.

"""


def error_calls() -> Iterator[tuple[str, str, str]]:
    """(id, name of what is called, message) for every call in the source whose first text argument is an id."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    texts = [_template(argument) for argument in node.args]
                    if texts and texts[0].startswith("E-"):
                        yield texts[0], ast.unparse(node.func), texts[1] if len(texts) > 1 else ""


def mentioned_ids() -> set[str]:
    """Every text in the source that is an error id, wherever it stands."""
    found = set()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_id(node.value):
                    found.add(node.value)
    return found


def render() -> str:
    """The whole page."""
    messages: dict[str, list[str]] = {error_id: [] for error_id in mentioned_ids()}
    for error_id, _, message in error_calls():
        if error_id in messages and message and message not in messages[error_id]:
            messages[error_id].append(message)
    rows = [
        f"| `{error_id}` | {'; or: '.join(_cell(text) for text in sorted(texts)) or 'see the message'} |"
        for error_id, texts in sorted(messages.items())
    ]
    return HEAD + "| id | message |\n|---|---|\n" + "\n".join(rows) + "\n"


def _is_id(text: str) -> bool:
    return (
        text.startswith("E-") and len(text) > 4 and text.replace("-", "").isalnum() and text == text.upper()
    )


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "…"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
