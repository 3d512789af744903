"""What the battery counts while it runs; `conftest.py` prints it at the end."""

from __future__ import annotations

from collections import Counter, defaultdict

SECONDS: dict[str, float] = defaultdict(float)
COUNTS: Counter[str] = Counter()
NOTES: list[str] = []
