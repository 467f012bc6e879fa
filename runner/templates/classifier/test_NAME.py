"""NAME learns: some seconds."""

from pathlib import Path

from runner import run


def test_learns(tmp_path: Path) -> None:
    outputs = f"outputs={tmp_path}"
    result = run("experiment=NAME", "threads=1", outputs, config_dir=Path(__file__).parent)
    assert result.metrics["test"]["accuracy"] > 0.95 > 0.7 > result.metrics["before"]["test"]["accuracy"]
