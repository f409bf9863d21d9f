"""Tables in Markdown, and the places that commands write in a document."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from sheets import Sheet, replaced, write_between

SHEET = Sheet("Speed", ["what", "m/s"], [["snail", "0.01"], ["meteor", "59000"]], "Not by us.")
DOCUMENT = "# Title\n\n<!-- x:begin -->\n<!-- x:end -->\n\nThe end.\n"


def test_markdown():
    assert SHEET.in_markdown() == (
        "**Speed**\n\n| what | m/s |\n| --- | --: |\n| snail | 0.01 |\n| meteor | 59000 |\n\nNot by us."
    )


def test_without_a_note_nothing_follows_the_table():
    assert Sheet("Speed", ["what"], [["snail"]]).in_markdown().endswith("| snail |")


def test_terminal():
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(SHEET.in_terminal())
    text = console.export_text()
    assert all(cell in text for cell in ("Speed", "meteor", "59000", "Not by us."))


def test_replacing_keeps_the_rest_and_is_idempotent():
    once = replaced(DOCUMENT, "x", "one\n\ntwo\n")
    assert once == "# Title\n\n<!-- x:begin -->\n\none\n\ntwo\n\n<!-- x:end -->\n\nThe end.\n"
    assert replaced(once, "x", "one\n\ntwo\n") == once
    assert replaced(replaced(once, "x", "other"), "x", "one\n\ntwo") == once


@pytest.mark.parametrize(
    "text",
    ["", "<!-- x:begin -->", "<!-- x:end --><!-- x:begin -->", DOCUMENT + DOCUMENT, DOCUMENT.replace("x:", "y:")],
)
def test_marks_must_be_there_once(text):
    with pytest.raises(ValueError, match="x:begin"):
        replaced(text, "x", "content")


def test_a_file_is_written_in_place(tmp_path):
    file = tmp_path / "document.md"
    file.write_text(DOCUMENT + "é\n", encoding="utf-8")
    write_between(file, "x", "content")
    assert file.read_text(encoding="utf-8") == replaced(DOCUMENT + "é\n", "x", "content")


@pytest.mark.parametrize("name", ["router-eval", "router-scale"])
def test_the_document_has_a_place_for_each_command(name):
    document = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
    assert replaced(document, name, "content") != document
