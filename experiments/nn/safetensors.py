"""Weights in the safetensors format, which other programs read without running any code.

8 bytes: N, the length of the header, little-endian
N bytes: JSON, for each tensor its dtype, its shape and where its bytes begin and end
the rest: the tensors' bytes, little-endian, row after row
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def dumps(weights: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file that holds these tensors.

    Raises:
        ValueError: a tensor of a dtype other than float32, float16, bfloat16 and int64.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # readers ask which framework wrote it
    parts, position = [], 0
    for name, tensor in weights.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name} is {tensor.dtype}; {', '.join(NAMES.values())} can be written")
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        places = [position, position + len(content)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        parts.append(content)
        position += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + b"".join(parts)
