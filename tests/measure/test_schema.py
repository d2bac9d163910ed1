from pathlib import Path

import pytest

from foveate.measure.schema import DOCUMENT, ROW, markdown, validate
from foveate.measure.store import Store, empty_row

DOCS = Path(__file__).parents[2] / "docs" / "results-schema.md"


def document(**row):
    store = Store(None, fingerprint={}, settings={})
    store.rows.append(empty_row("image", "a", "measured", forward_ms=1.0) | row)
    return store.document


def test_a_written_document_is_valid():
    assert validate(document()) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"forward_ms": "fast"}, "rows[0].forward_ms: expected number, got 'fast'"),
        ({"forward_ms": True}, "rows[0].forward_ms: expected number, got True"),
        ({"forward_ms": -1.0}, "rows[0].forward_ms: expected at least 0, got -1.0"),
        ({"forward_ms": float("nan")}, "rows[0].forward_ms: nan is not a JSON number"),
        ({"memory_bytes": 1.5}, "rows[0].memory_bytes: expected integer, got 1.5"),
        ({"status": "ok"}, "rows[0].status: expected one of measured, refused, failed, got 'ok'"),
        ({"mechanism": None}, "rows[0].mechanism: may not be null"),
        ({"speed": 3}, "rows[0].speed: not a field of schema version 1"),
        ({"forward_ms": None}, "rows[0]: measured, but without any figure"),
        ({"status": "failed"}, "rows[0]: failed without a reason"),
        ({"status": "refused", "reason": "no"}, "rows[0]: refused, but with figures"),
        ({"gate": {"ok": False}}, "rows[0]: measured although its correctness gate is red"),
    ],
)
def test_what_is_wrong_is_named(row, message):
    assert message in validate(document(**row))


def test_document_level_problems():
    assert validate([]) == ["results: expected an object, got list"]
    whole = document()
    del whole["fingerprint"]
    assert validate(whole) == ["results.fingerprint: missing"]
    whole = document()
    whole["rows"].append(whole["rows"][0])
    assert validate(whole) == ["rows[1]: a second row of image and a"]
    whole = document()
    whole["schema_version"] = 99
    assert "newer" in validate(whole)[0]


@pytest.mark.parametrize("field", [f.name for f in ROW if f.required])
def test_required_row_fields_are_missed(field):
    whole = document()
    del whole["rows"][0][field]
    assert f"rows[0].{field}: missing" in validate(whole)


def test_documentation_is_made_from_the_table():
    text = DOCS.read_text(encoding="utf-8")
    assert markdown() in text
    for field in (*DOCUMENT, *ROW):
        assert f"`{field.name}`" in text
