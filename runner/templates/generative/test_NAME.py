"""NAME learns: some seconds."""

from pathlib import Path

from runner import run


def test_learns(tmp_path: Path) -> None:
    outputs = f"outputs={tmp_path}"
    result = run("experiment=NAME", "threads=1", outputs, config_dir=Path(__file__).parent)
    assert result.metrics["test"]["energy"] < 0.03 < 0.1 < result.metrics["before"]["test"]["energy"]
