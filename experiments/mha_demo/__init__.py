"""Multi-head attention, step by step."""

from experiments.mha_demo.task import MHADemo

__all__ = ["MHADemo"]
