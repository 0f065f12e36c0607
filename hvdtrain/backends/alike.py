"""Whether all ranks are about to do the same."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from hvdtrain.backends.wire import Wire

_DIGEST_BYTES = 16


def differing(wire: Wire, text: str) -> list[str]:
    """Compare what each rank says it is about to do, in one small message where all say the same.

    Args:
        wire: Of those that are compared; all of them call this.
        text: Without null characters.

    Returns:
        Every rank's text, or nothing if they are equal.
    """
    said = text.encode()
    digest = list(hashlib.sha256(said).digest()[:_DIGEST_BYTES])
    digests = _gathered(wire, torch.tensor([*digest, *len(said).to_bytes(8, "big")], dtype=torch.uint8, device="cpu"))
    if digests.count(digests[0]) == len(digests):
        return []
    longest = max(int.from_bytes(row[_DIGEST_BYTES:], "big") for row in digests)
    texts = _gathered(wire, torch.tensor(list(said.ljust(longest, b"\0")), dtype=torch.uint8, device="cpu"))
    return [row.rstrip(b"\0").decode() for row in texts]


def _gathered(wire: Wire, row: Tensor) -> list[bytes]:
    received = torch.empty((wire.size, len(row)), dtype=row.dtype, device=wire.device)
    wire.all_gather_into(received, row.to(wire.device)).wait()
    return [bytes(each) for each in received.tolist()]
