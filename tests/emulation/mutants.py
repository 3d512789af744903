"""Small ways to break a kernel: each deletes a barrier, a fence or a wait, or nudges a number.

`mutate.py` tries them; nothing here runs anything.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# name, pattern, replacement. Deleted statements leave an empty one.
RULES = [
    ("no barrier", r"__syncthreads\(\);", ";"),
    ("no warp barrier", r"__syncwarp\([^)]*\);", ";"),
    ("no fence", r"__threadfence(_system)?\(\);", ";"),
    ("no copy wait", r"(ptx::)?cp_async_wait<[^>]*>\(\);", ";"),
    ("no commit", r"(ptx::)?cp_async_commit\(\);", ";"),
    ("no dependency wait", r"(ptx::)?grid_dependency_wait\(\);", ";"),
    ("< to <=", r" < (?=[\w(])", " <= "),
    ("<= to <", r" <= ", " < "),
    ("> to >=", r" > (?=[\w(])", " >= "),
    (">= to >", r" >= ", " > "),
    ("== to !=", r" == ", " != "),
    ("!= to ==", r" != ", " == "),
    ("&& to ||", r" && ", " || "),
    ("|| to &&", r" \|\| ", " && "),
    ("+ to -", r" \+ (?=[\w(])", " - "),
    ("- to +", r" - (?=[\w(])", " + "),
    ("+= to =", r" \+= ", " = "),
    ("% left out", r" % [\w.]+", ""),
    ("x to y", r"\.x\b", ".y"),
    ("z to w", r"\.z\b", ".w"),
    ("min to max", r"\bmin\(", "max("),
    ("max to min", r"\bmax\(", "min("),
    ("zero to one", r"(?<![\w.])0(?![\w.])", "1"),
]
LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"')
INTEGER = re.compile(r"(?<![\w.])(?:[2-9]|[1-9]\d+)(?![\w.])")
# Declarations, comments and what no thread runs.
SKIPPED = re.compile(
    r"^\s*(//|#|template|static_assert|namespace|using|case |\}|\*)|__launch_bounds__"
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed line of one file. Lines are known by their text: numbers move."""

    file: str  # relative to the root
    line: int  # from 1
    rule: str
    before: str
    text: str

    def name(self) -> str:
        return self.text.strip()

    def describe(self) -> str:
        return f"{self.file}:{self.line} ({self.rule}): {self.name()}"


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Every place of every rule, line by line. What a message says is no place."""
    for number, line in enumerate(source.splitlines(), 1):
        code = line.split("//")[0].rstrip()
        if not code or SKIPPED.search(code):
            continue
        places = LITERAL.sub(lambda literal: "\0" * len(literal[0]), code)
        for rule, pattern, replacement in RULES:
            for match in re.finditer(pattern, places):
                text = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                yield Mutant(file, number, rule, code, text)
        for match in INTEGER.finditer(places):
            halved = str(int(match[0]) // 2)
            text = code[: match.start()] + halved + code[match.end() :]
            yield Mutant(file, number, f"{match[0]} to {halved}", code, text)


def mutated(source: str, mutant: Mutant) -> str:
    """The file with the mutant's line."""
    lines = source.splitlines()
    lines[mutant.line - 1] = mutant.text
    return "\n".join(lines) + "\n"
