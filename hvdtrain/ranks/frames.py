"""What travels between a rank and the ranks' store: frames, each signed with a key that both sides have proved to hold.

A listener sends a nonce, whoever connects answers with its own and a proof of the job's secret, and the listener proves
the same. From both nonces comes the connection's key. A frame's signature covers its direction and its number, so that
none can be changed, left out, repeated or sent back. Frames are not encrypted. Nothing is unpickled.

The standard library alone: the store's process starts with it in some hundredths of a second.
"""

from __future__ import annotations

import hmac
import secrets
import struct

LARGEST_BYTES = 256 * 2**20
GREETING_BYTES = 4096  # of a frame before both sides have proved who they are
NONCE_BYTES = 32
_SIGNATURE_BYTES = 16
_LENGTH = struct.Struct("!I")
_NUMBER = struct.Struct("!Q")


class Refused(Exception):
    """What came is not signed by a holder of the secret, or is larger than anything that is sent."""


def nonce() -> bytes:
    """Bytes that were never used before."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, role: str, *parts: bytes | memoryview) -> bytes:
    """What shows that whoever sends it holds the secret; parts are of known lengths, but for the last."""
    signed = hmac.new(secret, b"hvdtrain|" + role.encode(), "sha256")
    for part in parts:
        signed.update(b"|")
        signed.update(part)
    return signed.digest()


def same(one: bytes, other: bytes) -> bool:
    """Compare proofs in a time that does not depend on them."""
    return hmac.compare_digest(one, other)


def frame(body: bytes) -> bytes:
    """A body with its length in front."""
    return _LENGTH.pack(len(body)) + body


class Buffer:
    """What has been received, cut into frames."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._bytes = bytearray()

    def feed(self, received: bytes) -> None:
        """Append."""
        self._bytes += received

    def take(self) -> bytes | None:
        """The next body; None if it is not complete.

        Raises:
            Refused: It announces more than ``largest`` bytes.
        """
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        if length > self.largest:
            raise Refused(f"a frame of {length} bytes")
        end = _LENGTH.size + length
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_LENGTH.size : end])
        del self._bytes[:end]
        return body


class Signer:
    """Signs and checks the frames of one connection.

    Args:
        secret: The job's.
        listener: The listener's nonce.
        caller: The other side's.
        listens: Which of the two this is.
    """

    def __init__(self, secret: bytes, listener: bytes, caller: bytes, *, listens: bool) -> None:
        self._key = proof(secret, "session", listener, caller)
        self._here, self._there = (b"<", b">") if listens else (b">", b"<")
        self._sent = self._received = 0

    def sign(self, payload: bytes) -> bytes:
        """The frame of a payload, to be sent next."""
        self._sent += 1
        return frame(self._signature(self._here, self._sent, payload) + payload)

    def check(self, body: bytes) -> bytes:
        """The payload of the frame received next.

        Raises:
            Refused: It is not what the other side sent.
        """
        self._received += 1
        payload = body[_SIGNATURE_BYTES:]
        if not same(body[:_SIGNATURE_BYTES], self._signature(self._there, self._received, payload)):
            raise Refused("a frame that the other side has not signed")
        return payload

    def _signature(self, direction: bytes, number: int, payload: bytes) -> bytes:
        return hmac.digest(self._key, direction + _NUMBER.pack(number) + payload, "sha256")[:_SIGNATURE_BYTES]
