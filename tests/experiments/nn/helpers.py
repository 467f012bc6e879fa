"""Shared by the tests of the parts: numbers to put in, comparison, and refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tables import table

F64 = torch.float64
BOTH_WAYS = pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])


def randn(*shape: int, grad: bool = False) -> Tensor:
    """Draw normal numbers in float64 from the global stream."""
    return torch.randn(*shape, dtype=F64, requires_grad=grad)


def near(found: Tensor, expected: Tensor, atol: float = 1e-10, rtol: float = 0.0) -> None:
    """Assert equal shapes, and numbers that differ by at most atol + rtol · |expected|."""
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=rtol)


def all_near(found: Any, expected: Any, atol: float = 1e-10, rtol: float = 0.0) -> None:
    """Assert `near` for each of several tensors."""
    for a, b in zip(found, expected, strict=True):
        near(a, b, atol, rtol)


def refused(message: str) -> Any:
    """Expect an error of ours whose message matches."""
    return pytest.raises((ValueError, AssertionError), match=message)


def refusals(section: str) -> Any:
    """Parametrize by the rows of a section of refusals.txt: an expression, and what its error says."""
    return table(Path(__file__).with_name("refusals.txt"), section, "call", "message")


def drawn(module: nn.Module) -> nn.Module:
    """Draw every weight anew, so that none is zero or one; in eval mode and float64."""
    module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(std=fan**-0.5)
    return module
