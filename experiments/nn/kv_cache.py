"""What a decoder remembers: keys and values of the tokens before, so that each token is projected once.

Letters in shapes: B batch, G heads of keys and values, Dh size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.nn.checks import shaped


class KVCache:
    """Keys and values of all tokens so far, each (B, G, length, Dh), rotated where there are rotary positions.

    One cache per layer and batch. Under `no_grad` it writes into buffers of twice the length, so that a token costs
    no copy of those before it; elsewhere it concatenates, for autograd may hold on to what was given before.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v of new tokens (B, G, new, Dh); return those of all so far (B, G, length, Dh).

        Raises:
            ValueError: another batch size, number of heads or size of a head than before.
        """
        self.keys, self.values = self._behind(self.keys, k), self._behind(self.values, v)
        self.length += k.shape[2]
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _behind(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        """Return the buffer with the new rows after the old ones, a larger one where it was full."""
        if buffer is None:
            return new
        B, G, _, Dh = buffer.shape
        shaped("new keys and values of the cache", new, B, G, "new", Dh)

        # autograd needs a copy; without it the buffer doubles where it is full
        end = self.length + new.shape[2]
        if torch.is_grad_enabled():
            return torch.cat((buffer[:, :, : self.length], new), dim=2)
        if end > buffer.shape[2]:
            longer = new.new_empty(B, G, 2 * end, Dh)
            longer[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = longer
        buffer[:, :, self.length : end] = new
        return buffer
