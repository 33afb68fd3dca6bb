"""How a pass over a tensor is divided: into chunks, and the chunks among threads.

Each thread takes the next chunk when it is free, so a thread that loses its processor to another program delays one
chunk and not every operation. Chunks consist of whole blocks, squares are added block by block first, and no chunk
reads what another wrote: neither the number of elements per chunk nor the number of threads can change a bit of the
result.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def map_chunks(step: Callable[[slice], Result], elements: int, size: int, device: torch.device) -> list[Result]:
    """Results of `step` for each chunk of `size` elements (an empty one if there are none), in their order, from
    PyTorch's number of threads on a CPU.

    PyTorch's own division of single operations between threads is off meanwhile: it waits for the slowest thread after
    every operation.
    """
    chunks = [slice(start, min(start + size, elements)) for start in range(0, max(elements, 1), size)]
    if device.type != "cpu":
        return [step(chunk) for chunk in chunks]
    total, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(chunk: slice) -> Result:
        with torch.inference_mode(inference):  # a thread does not inherit it
            return step(chunk)

    try:
        if len(chunks) < 2 or total < 2:
            torch.set_num_threads(1)
            return [step(chunk) for chunk in chunks]
        with ThreadPoolExecutor(total, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, chunks))
    finally:
        torch.set_num_threads(total)  # what later threads inherit
