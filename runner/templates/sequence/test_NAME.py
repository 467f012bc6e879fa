"""NAME learns: some seconds."""

from pathlib import Path

from runner import run


def test_learns(tmp_path: Path) -> None:
    outputs = f"outputs={tmp_path}"
    result = run("experiment=NAME", "threads=1", outputs, config_dir=Path(__file__).parent)
    assert result.metrics["val"]["accuracy"] > 0.8
    assert result.metrics["test"]["accuracy"] > 0.3 > 0.2 > result.metrics["before"]["test"]["accuracy"]
