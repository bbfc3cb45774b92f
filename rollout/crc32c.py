"""CRC-32C of joined bytes from the CRCs of the pieces, so that parts may be checked in any order and only once.

A CRC is linear over GF(2): appending n zero bytes to a message multiplies its CRC by a fixed 32×32 bit matrix, and the
CRC of a concatenation is that product XOR the CRC of the second piece (M. Adler's `crc32_combine` in zlib).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bit-reversed: RFC 3720, appendix B.4."""

_Matrix = tuple[int, ...]
"""Column i is the image of bit i."""


def combine(crc: int, next_crc: int, next_size_bytes: int) -> int:
    """CRC-32C of a message of CRC `crc`, followed by `next_size_bytes` bytes of CRC `next_crc`."""
    return _apply(_append_zero_bytes(next_size_bytes), crc) ^ next_crc


def combine_all(pieces: Iterable[tuple[int, int]]) -> int:
    """CRC-32C of consecutive pieces, each given as (CRC, size in bytes)."""
    total = 0
    for crc, size_bytes in pieces:
        total = combine(total, crc, size_bytes)
    return total


@lru_cache(maxsize=64)
def _append_zero_bytes(count: int) -> _Matrix:
    result: _Matrix = tuple(1 << bit for bit in range(32))
    power = _ONE_ZERO_BYTE
    while count:
        if count & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        count >>= 1
    return result


def _apply(matrix: _Matrix, vector: int) -> int:
    product = 0
    for column in matrix:
        if vector & 1:
            product ^= column
        vector >>= 1
    return product


def _multiply(left: _Matrix, right: _Matrix) -> _Matrix:
    return tuple(_apply(left, column) for column in right)


def _one_zero_bit() -> _Matrix:
    return (_POLYNOMIAL, *(1 << bit for bit in range(31)))


def _squared(matrix: _Matrix, times: int) -> _Matrix:
    for _ in range(times):
        matrix = _multiply(matrix, matrix)
    return matrix


_ONE_ZERO_BYTE = _squared(_one_zero_bit(), 3)
