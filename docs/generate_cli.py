"""Write docs/cli.md, every key and flag, from the comments in conf/ and from `--help`: `make docs`."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from runner.__main__ import main
from runner.config.options import explained_keys

REPO = Path(__file__).resolve().parent.parent
CONF = REPO / "conf"
PAGE = REPO / "docs" / "cli.md"
GROUPS = {
    "experiment": "What is trained and measured: `experiment=NAME`.",
    "preset": "An experiment's other settings: `preset=NAME`.",
    "debug": "Short runs that look for faults: `debug=NAME`.",
    "loop": "How long to train, when to evaluate, how to step.",
    "optimizer": "The optimiser: `optimizer=NAME`, or one key of it, `optimizer.lr=0.1`.",
    "schedule": "The learning rate over the steps: `schedule=NAME`.",
    "data": "The data set: `data=NAME`; an experiment chooses its own.",
    "model": "The network: `model=NAME`; an experiment chooses its own.",
    "sweep": "Sweeps and searches, with `-m`: `sweep=NAME`; see [sweeps](sweeps.md).",
}


def render() -> str:
    """Return the text of docs/cli.md."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main(["--help"])
    commands, flags = (_section(output.getvalue(), title) for title in ("Usual commands", "Flags"))
    parts = [
        "# Keys and flags\n\n<!-- written by `make docs` from the comments in conf/ and `--help`; edit those -->",
        "A key is set on the command line as `key=value`; it overrides the preset, which overrides the experiment.",
        f"## Commands\n\nEach after `runner`, or `python -m runner`.\n\n```text\n{commands}\n```",
        f"## Flags\n\n```text\n{flags}\n```",
        f"## Keys of every run\n\n{_table(CONF / 'config.yaml', '')}",
    ]
    for group, purpose in GROUPS.items():
        parts.append(f"## {group}\n\n{purpose}")
        parts += [_option(file) for file in sorted((CONF / group).glob("*.yaml"))]
    return "\n\n".join(parts) + "\n"


def _section(text: str, title: str) -> str:
    match = re.search(rf"^{title}\b[^\n]*:\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"--help has no section {title}"
    return match[1].rstrip()


def _option(file: Path) -> str:
    """Return the section of one option: its opening comment and its keys."""
    text = file.read_text(encoding="utf-8")
    opening = re.match(r"(#.*\n)*", text)[0]  # type: ignore[index]
    lines = [line.removeprefix("#").strip() for line in opening.splitlines() if "@package" not in line]
    about = re.sub(r"python -m (runner.*)", r"`\1`", "\n".join(lines))
    prefix = "" if "@package _global_" in text else f"{file.parent.name}."
    parts = (f"### `{file.parent.name}={file.stem}`", about, _table(file, prefix))
    return "\n\n".join(filter(None, parts))


def _table(file: Path, prefix: str) -> str:
    """Return the keys that a file explains as a table, and those that it only sets as a line below it."""
    keys = [row for row in explained_keys(file) if row[1] != "???"]
    rows = [f"| `{prefix}{key}` | `{value}` | {meaning} |" for key, value, meaning in keys if meaning]
    settings = [f"`{prefix}{key}={value}`" for key, value, meaning in keys if not meaning]

    head = ["| key | value | meaning |", "| --- | --- | --- |"] if rows else []
    table, line = "\n".join([*head, *rows]), f"Sets {', '.join(settings)}." if settings else ""
    return "\n\n".join(filter(None, (table, line)))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
