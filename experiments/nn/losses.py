"""Losses, written from their formulas."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.nn.checks import within


class CrossEntropy(nn.Module):
    """Cross-entropy of logits, −Σ_c q_c log p_c, the mean over the batch.

    With label smoothing ε the target is q_c = (1 − ε) δ_{c,y} + ε / C (Szegedy et al. 2016, section 7).
    """

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        within(0, 1, label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (B, C), targets (B,) int64 → scalar."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 has 3 digits: too few
        log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)  # (B, C)
        log_p_target = log_p.gather(1, targets[:, None]).squeeze(1)  # (B,)
        if self.label_smoothing == 0:
            return -log_p_target.mean()
        smoothed = (1 - self.label_smoothing) * log_p_target + self.label_smoothing * log_p.mean(1)
        return -smoothed.mean()
