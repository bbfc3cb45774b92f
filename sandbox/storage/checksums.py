"""The checksums of Cloud Storage: CRC32C of everything, MD5 where it is asked for; both in base64, big-endian."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import google_crc32c

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's polynomial, reflected (RFC 3720, appendix B.4)."""

READ_BYTES = 1 << 20


def extend_crc32c(crc: int, data: bytes) -> int:
    return int(google_crc32c.extend(crc, data))


def encode_crc32c(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def file_crc32c(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            crc = extend_crc32c(crc, chunk)
    return crc


def files_md5(paths: Iterable[Path]) -> str:
    """Base64 MD5 of the files' concatenation."""
    digest = hashlib.md5(usedforsecurity=False)
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
    return base64.b64encode(digest.digest()).decode()


def combine_crc32c(first: int, second: int, second_bytes: int) -> int:
    """CRC32C of A+B from that of A, that of B and the length of B: appending n bytes is a linear map over GF(2).

    So composing and completing multipart uploads read no data. Source of the method: zlib's crc32_combine.
    """
    exponent = 0
    while second_bytes:
        if second_bytes & 1:
            first = _apply(_zero_bytes_operator(exponent), first)
        second_bytes >>= 1
        exponent += 1
    return first ^ second


def _apply(matrix: tuple[int, ...], vector: int) -> int:
    result = 0
    for column in matrix:
        if not vector:
            break
        if vector & 1:
            result ^= column
        vector >>= 1
    return result


@functools.cache
def _zero_bytes_operator(exponent: int) -> tuple[int, ...]:
    """The matrix (by columns) that appends 2**exponent zero bytes."""
    if exponent == 0:
        one_bit = (_POLYNOMIAL, *(1 << bit for bit in range(31)))
        return functools.reduce(lambda matrix, _: _square(matrix), range(3), one_bit)
    return _square(_zero_bytes_operator(exponent - 1))


def _square(matrix: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_apply(matrix, column) for column in matrix)


def parse_goog_hash(values: Iterable[str]) -> dict[str, str]:
    """`x-goog-hash: crc32c=…,md5=…` (repeatable) as a mapping; a value's base64 padding may contain `=`."""
    hashes: dict[str, str] = {}
    for item in ",".join(values).split(","):
        name, separator, value = item.strip().partition("=")
        if separator:
            hashes[name] = value
    return hashes
