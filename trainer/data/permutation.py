"""A random permutation of 0 ... n - 1 that needs no memory: any element at once.

A Feistel network permutes the integers of an even number of bits; those at or beyond n are permuted again
until they land below it (cycle walking, Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
The domain is less than four times n, so this takes fewer than four rounds of it on average. A global
shuffle of any size can so be entered at any place, which is what resuming in O(1) needs.
"""

from __future__ import annotations

import hashlib

ROUNDS = 6
_MASK = (1 << 64) - 1


class Permutation:
    """A permutation of ``range(size)``, a pure function of (size, key)."""

    def __init__(self, size: int, *key: int | str) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 8 * ROUNDS, 8)]

    def __getitem__(self, index: int) -> int:
        """The element at ``index``.

        Raises:
            IndexError: The index is not in ``range(size)``.
        """
        if not 0 <= index < self.size:
            raise IndexError(index)
        while True:
            index = self._round_trip(index)
            if index < self.size:
                return index

    def _round_trip(self, value: int) -> int:
        left, right = value >> self._half, value & self._low
        for key in self._keys:
            # splitmix64's finalizer (Steele et al. 2014) as the round function.
            mixed = (right + key) & _MASK
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
            left, right = right, left ^ ((mixed >> 31) & self._low)
        return (left << self._half) | right
