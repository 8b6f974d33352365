"""Wording of numbers in messages."""

from __future__ import annotations


def count_of(number: float, noun: str, nouns: str = "") -> str:
    """The number with its noun: "1 step", "2,000 steps". `nouns` is the plural, unless it ends in s."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun if number == 1 else nouns or noun + 's'}"
