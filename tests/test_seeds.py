"""Seeds: datasets and answers hang on these numbers, so they are written down."""

from __future__ import annotations

import hashlib

from covray.seeds import hash_number, seed_of


def test_seeds_of_different_parts_differ() -> None:
    parts: list[tuple[int | str, ...]] = [(0, "a"), (0, "b"), (1, "a"), (0,), ("0a",), (0, "a", 0), (11, 1), (1, 11)]
    seeds = {seed_of(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "a") == 3426483283761622585  # on every machine


def test_a_number_is_the_first_bits_of_the_hash() -> None:
    digest = hashlib.sha256(b"covray \xff").digest()
    assert hash_number("covray \udcff") == int.from_bytes(digest, "big")  # a file name that is no UTF-8
    assert hash_number("covray \udcff", bits=64) == int.from_bytes(digest[:8], "big")
    assert hash_number("covray \udcff", bits=63) == int.from_bytes(digest[:8], "big") >> 1
