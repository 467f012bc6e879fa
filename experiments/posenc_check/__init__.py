"""Absolute and rotary position encodings, checked against their formulas."""

from experiments.posenc_check.task import PosEncCheck

__all__ = ["PosEncCheck"]
