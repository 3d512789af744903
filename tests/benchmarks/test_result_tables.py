"""What tables are made of: lines and columns in, Markdown out."""

import pytest

import result_tables
from result_tables import NOTHING


def test_a_table_has_the_cells_that_its_lines_name() -> None:
    lines = [{"a": "1", "b": "2"}, {"a": "3", "c": "4"}]
    assert result_tables.table(lines).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        f"| 1 | 2 | {NOTHING} |",
        f"| 3 | {NOTHING} | 4 |",
    ]


def test_columns_that_say_nothing_are_left_out() -> None:
    columns = {"a": lambda row: str(row["x"]), "b": lambda _: NOTHING}
    assert result_tables.table_of(columns, [{"x": 1}]) == "| a |\n| --- |\n| 1 |"
    assert result_tables.table_of(columns, []) == ""
    assert result_tables.table([{"b": NOTHING}]) == ""


def test_only_what_stands_between_marks_is_replaced() -> None:
    text = "a\n<!-- rows: one -->\nold\n<!-- /rows -->\nb\n<!-- rows: two -->\n<!-- /rows -->\n"
    filled = result_tables.fill(text, {"one": "new\n", "two": ""})
    assert filled == text.replace("old", "new")
    with pytest.raises(KeyError, match="two"):
        result_tables.fill(text, {"one": ""})
