"""Resource quantities: `80Gi`, `500m`, `92343412Ki`, `1e3`."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

_SUFFIXES = {"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1)}
_SUFFIXES |= {suffix: Decimal(10) ** (3 * power) for power, suffix in enumerate("kMGTPE", start=1)}
_SUFFIXES |= {f"{suffix}i": Decimal(2) ** (10 * power) for power, suffix in enumerate("KMGTPE", start=1)}
_QUANTITY = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+))([eE][+-]?\d+)?([numkMGTPE]|[KMGTPE]i)?$")


def parse(text: Any) -> Decimal:
    """The quantity as a number of its unit. Raises ValueError with Kubernetes' own words."""
    matched = _QUANTITY.match(str(text))
    if matched is None:
        raise ValueError("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")
    number, exponent, suffix = matched.groups()
    return Decimal(number + (exponent or "")) * _SUFFIXES[suffix or ""]


def percentage_or_number(value: int | str, of: int, *, round_up: bool) -> int:
    """An `IntOrString` such as `25%` or `1`, as a number of replicas."""
    if isinstance(value, int):
        return value
    share = int(value.removesuffix("%")) * of / 100
    return math.ceil(share) if round_up else math.floor(share)
