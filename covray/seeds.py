"""Seeds and other numbers that follow from text alone, the same on every machine.

They are bits of a SHA-256, so that texts that differ in one letter give unrelated numbers. Datasets, splits and answers
depend on these bits: what a caller hashes must not change.
"""

from __future__ import annotations

import hashlib

_DIGEST_BITS = 256


def hash_number(text: str, bits: int = _DIGEST_BITS) -> int:
    """Return the first ``bits`` (at most 256) bits of the SHA-256 of ``text`` as an integer in [0, 2**bits).

    Names of files that are no valid UTF-8 (Python reads them as surrogates) are hashed by their bytes.
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest, "big") >> (_DIGEST_BITS - bits)


def seed_of(*parts: int | str) -> int:
    """Return a seed of 63 bits, which every generator takes, that follows from ``parts`` and their order alone."""
    return hash_number("\0".join(map(str, parts)), bits=63)
