"""How many bytes this rank sends, counted where they are handed to the engine.

An engine does not say what leaves the machine, so each operation counts what it must send at least of what it is given:
the share of a ring, and of every algorithm where there are two ranks. Headers and acknowledgements come on top. What ranks
say beside the engine (the watch, the store) and what torch's FSDP2 moves by itself is not counted, nor are sparse gradients
with backend torch.
"""

from __future__ import annotations

from collections.abc import Sequence


class Traffic:
    """Counts the bytes that one rank sends.

    Attributes:
        sent_bytes: So far.
        early_bytes: Of those, of exchanges that were to go on in later steps and were waited for, by an evaluation or a checkpoint.
    """

    def __init__(self) -> None:
        self.sent_bytes = 0.0
        self.early_bytes = 0.0

    def all_reduce(self, size_bytes: int, ranks: int) -> None:
        """Count a reduction whose result all get: in a ring, every part leaves once to be summed and once as a sum."""
        self.sent_bytes += 2 * size_bytes * (ranks - 1) / ranks

    def reduce_scatter(self, size_bytes: int, ranks: int) -> None:
        """Count a reduction of which each rank keeps its part; ``size_bytes`` is that of the whole."""
        self.sent_bytes += size_bytes * (ranks - 1) / ranks

    def all_gather(self, size_bytes: int, ranks: int) -> None:
        """Count what every other rank gets; ``size_bytes`` is this rank's own."""
        self.sent_bytes += size_bytes * (ranks - 1)

    def all_to_all(self, sizes_bytes: Sequence[int], rank: int) -> None:
        """Count what goes to each of the others."""
        self.sent_bytes += sum(sizes_bytes) - sizes_bytes[rank]

    def rooted(self, size_bytes: int, ranks: int) -> None:
        """Count a broadcast, or a reduction to one rank: all but one send it once, taken together."""
        self.sent_bytes += size_bytes * (ranks - 1) / ranks

    def message(self, size_bytes: int) -> None:
        """Count what goes to one other rank."""
        self.sent_bytes += size_bytes
