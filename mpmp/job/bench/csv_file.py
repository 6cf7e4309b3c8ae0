"""Rows of a bench as a CSV file."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from typing import Any

from mpmp.errors import InputOutputError


def write_csv(path: str, kind: type[Any], rows: Sequence[Any]) -> None:
    """Write rows of a dataclass ``kind``, its fields first; InputOutputError where that fails."""
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in dataclasses.fields(kind)])
            writer.writerows(dataclasses.astuple(row) for row in rows)
    except OSError as error:
        raise InputOutputError(f"{path} cannot be written: {error.strerror}") from error
