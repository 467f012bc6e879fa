"""What a checkpoint gives back, and messages for what is no checkpoint."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.engine import checkpoint
from runner.errors import UserError
from tests.runner.engine.helpers import assert_equal

PARTS: dict[str, Any] = {
    "model": {"": OrderedDict(weight=torch.randn(4, 3))},
    "optimizer": {"": {"state": {0: {"momentum_buffer": torch.randn(4, 3)}}, "param_groups": [{"lr": 0.1}]}},
    "ema": {},
    "step": 7,
    "progress": {"step": 7, "best_value": None, "before": {"loss": float("inf")}},
    "task": {"seen": [1, 2.5, "x", None, True, (3, b"y"), {"t": torch.zeros(2)}]},
    "config": {"name": "toy", "loop": {"steps": 9}},
}


def test_what_was_saved_is_loaded(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(path, PARTS)
    assert_equal(checkpoint.load(path), PARTS)
    assert checkpoint.find_unsafe(PARTS["task"]) is None
    assert checkpoint.find_unsafe(torch.nn.Parameter(torch.ones(1))) is None
    assert list(path.parent.iterdir()) == [path]


class Hostile:
    """Unpickling it would call a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("opened"),)


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def zipped() -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    return file.getvalue()


FOREIGN = {
    "empty": (b"", "truncated, or another format (0 bytes)"),
    "text": (b"hello, world\n" * 9, "another format (117 bytes)"),
    "truncated": (saved(PARTS)[:-200], "truncated"),
    "start_only": (saved(PARTS)[:300], "truncated"),
    "zip": (zipped(), "another format"),
    "pickle": (pickle.dumps({"model": 1}), "another format"),
    "state_dict": (saved({"weight": torch.zeros(2)}), "no model, optimizer, ema, step, progress"),
    "tensor": (saved(torch.zeros(2)), "no model"),
    "older": (saved({k: v for k, v in PARTS.items() if k != "progress"}), "no progress."),
    "module": (saved(torch.nn.Linear(2, 2)), "holds code"),
    "hostile": (saved(PARTS | {"task": Hostile()}), "holds code"),
    "folder": (None, "got a folder"),
    "missing": ("", "no such file"),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_checkpoint_is_refused_and_runs_no_code(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt"
    if content != "":
        path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert str(path) in text and message in text
    assert "\n" not in text and "trust" not in text, "one line, without torch's advice to run what it holds"
    assert not Path("opened").exists()
