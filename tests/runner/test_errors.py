"""A lack of memory, reported with what to try, and the spelling that was meant."""

from __future__ import annotations

import pytest
import torch

from runner.errors import UserError, lacks_memory, memory_for, nearest, out_of_memory_hint

OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1 GiB free."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000 bytes."),
    "python": MemoryError(),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_half_of_the_samples_are_proposed(error: Exception) -> None:
    hint = out_of_memory_hint("loading the data", "less")
    with pytest.raises(UserError, match=r"^out of memory loading the data; try less$"), hint:
        raise error
    with pytest.raises(UserError, match=r"^out of memory at n=9; try n=4$") as caught, memory_for("n", 9):
        raise error
    assert (caught.value.wrong, caught.value.right) == ("n=9", "n=4")
    with pytest.raises(UserError, match=r"^out of memory at n=1; try a smaller network$"), memory_for("n", 1):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("memory"), UserError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory_hint("here", "less"):
        raise error
    assert caught.value is error


def test_torchs_own_message_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**61, dtype=torch.uint8)
    assert lacks_memory(caught.value)


@pytest.mark.parametrize(
    ("word", "name"),
    [("sdg", "sgd"), ("ADAM", "adam"), ("cos", "cosine"), ("exponential", None), ("ada", "adam"), ("", None)],
)
def test_the_nearest_spelling(word: str, name: str | None) -> None:
    assert nearest(word, ["sgd", "adam", "adamw", "cosine"]) == name
