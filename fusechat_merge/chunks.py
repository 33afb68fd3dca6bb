"""How a pass over a tensor is divided: into chunks, and the chunks among threads.

Each thread takes the next chunk when it is free, so a thread that loses its processor to another program delays one
chunk and not every operation. Chunks consist of whole blocks, squares are added block by block first, and no chunk
reads what another wrote: neither the number of elements per chunk nor the number of threads can change a bit of the
result.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def split(elements: int, size: int) -> list[slice]:
    """The chunks of a tensor: `size` elements each (whole blocks), the last one what is left."""
    return [slice(start, min(start + size, elements)) for start in range(0, elements, size)]


def map_threads(step: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """Results of `step(item)` for all items, in their order, from PyTorch's number of threads on a CPU.

    PyTorch's own division of single operations between threads is off meanwhile: it waits for the slowest thread after
    every operation.
    """
    if device.type != "cpu":
        return [step(item) for item in items]
    total, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode(inference):  # a thread does not inherit it
            return step(item)

    try:
        if len(items) < 2 or total < 2:
            torch.set_num_threads(1)
            return [step(item) for item in items]
        with ThreadPoolExecutor(total, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, items))
    finally:
        torch.set_num_threads(total)  # what later threads inherit
