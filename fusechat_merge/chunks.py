"""How a pass over a tensor is divided: pieces and threads.

Each thread takes the next piece when it is free, so a thread that loses its processor to another program delays one
piece and not every operation. Pieces consist of whole blocks, squares are added block by block first, and no piece
reads what another wrote: neither the number of elements per piece nor the number of threads can change a bit of the
result.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def pieces(elements: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of a tensor, of `size` elements (whole blocks) but the last."""
    return [(start, min(start + size, elements)) for start in range(0, elements, size)]


def spread(step: Callable, items: Sequence, device: torch.device) -> list:
    """Results of `step(item)` for all items, in their order, from PyTorch's number of threads on a CPU.

    PyTorch's own division of single operations between threads is off meanwhile: it waits for the slowest thread after
    every operation.
    """
    if device.type != "cpu":
        return [step(item) for item in items]
    total, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(item):
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
