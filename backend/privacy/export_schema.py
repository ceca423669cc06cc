"""
The published JSON Schema (draft 2020-12) of an export, derived from the data map.

`additionalProperties` is false throughout, so that an export with anything more, less or of
another type does not validate.
"""

from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Column

from backend.privacy.data_map import DataMap
from backend.privacy.declarations import Personal
from backend.privacy.export import FORMAT_NAME, FORMAT_VERSION
from backend.privacy.mapped_tables import DataMapError, MappedTable

SCHEMA_ID: Final = f"urn:{FORMAT_NAME}:{FORMAT_VERSION}"

Schema = dict[str, Any]

_TEXT: Final = {"type": "string"}
_BOOLEAN: Final = {"type": "boolean"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_MOMENT: Final = {"type": "string", "format": "date-time"}
_DAY: Final = {"type": "string", "format": "date"}
_KINDS: Final[dict[type, Schema]] = {
    bool: _BOOLEAN,
    int: {"type": "integer"},
    float: {"type": "number"},
    str: _TEXT,
    Decimal: {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$"},
    date: _DAY,
    datetime: _MOMENT,
    UUID: {"type": "string", "format": "uuid"},
}


def schema(data_map: DataMap) -> Schema:
    """
    Return the schema of every export made with *data_map*.

    Raises:
        DataMapError: A column's type has no form in JSON.
    """
    tables = data_map.of_people
    names: Schema = {"enum": [mapped.name for mapped in tables]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "What is held about one person",
        **_object(
            format={"const": FORMAT_NAME},
            version={"const": FORMAT_VERSION},
            subject=_object(user_id=_or_null(_of(data_map.subject.key))),
            generated_at=_MOMENT,
            data=_object(**{mapped.name: _rows(data_map, mapped) for mapped in tables}),
            redactions=_list({"anyOf": [_redaction(mapped) for mapped in tables if _hides(mapped)]})
            if any(map(_hides, tables))
            else {"type": "array", "maxItems": 0},
            consents=_consents(data_map),
            requests=_list(_object(at=_MOMENT, action=_TEXT, outcome=_TEXT)),
            notice=_notice(names),
            counts=_object(**{mapped.name: _COUNT for mapped in tables}),
        ),
    }


def _rows(data_map: DataMap, mapped: MappedTable) -> Schema:
    may_be_left_out = _may_be_left_out(data_map, mapped)
    row = _object(
        **{
            str(column.name): _or_null(_of(column))
            if column.nullable or column.name in may_be_left_out
            else _of(column)
            for column in mapped.exported_columns
        }
    )
    return _list(row) | ({"maxItems": 1} if mapped is data_map.subject else {})


def _may_be_left_out(data_map: DataMap, mapped: MappedTable) -> set[str]:
    """The columns that are NULL in an export where they are about somebody else."""
    named = bool(mapped.identities) and mapped is not data_map.subject
    return {name for name, rule in mapped.personal_columns.items() if rule.third_party or named} - {
        str(key.name) for key in mapped.keys
    }


def _hides(mapped: MappedTable) -> bool:
    return bool(mapped.third_party_columns)


def _redaction(mapped: MappedTable) -> Schema:
    exported = {str(column.name) for column in mapped.exported_columns}
    personal = [n for n, rule in mapped.columns.items() if isinstance(rule, Personal)]
    return _object(
        table={"const": mapped.name},
        row=_object(**{str(key.name): _of(key) for key in mapped.keys}),
        columns=_list({"enum": [name for name in personal if name in exported]}) | {"minItems": 1},
        ground=_TEXT,
    )


def _consents(data_map: DataMap) -> Schema:
    state = _object(granted=_BOOLEAN, since=_or_null(_MOMENT), notice_version=_or_null(_TEXT))
    return _object(
        user_id=_or_null(_of(data_map.subject.key)),
        purposes={"type": "object", "additionalProperties": state},
        history=_list(
            _object(
                purpose=_TEXT,
                granted=_BOOLEAN,
                notice_version=_or_null(_TEXT),
                method=_TEXT,
                recorded_at=_MOMENT,
            )
        ),
    )


def _notice(names: Schema) -> Schema:
    table = _object(
        rows={"type": "integer", "minimum": 1},
        purpose=_TEXT,
        lawful_basis=_TEXT,
        categories=_list(_TEXT),
        recipients=_list(_TEXT),
        source=_TEXT,
        kept_for=_TEXT,
        last_due_on=_or_null(_DAY),
        kept_by_law=_or_null(_TEXT),
        kept_by_law_until=_or_null(_DAY),
        on_hold=_BOOLEAN,
        transfers=_or_null(_TEXT),
        automated_decisions=_or_null(_TEXT),
    )
    return _object(
        controller=_object(name=_TEXT, contact=_TEXT),
        tables={"type": "object", "propertyNames": names, "additionalProperties": table},
        nothing_held=_list(names),
        rights=_list(_object(right=_TEXT, article=_TEXT, how=_TEXT, tables=_list(names))),
        backups_expire_after_days=_COUNT,
    )


def _of(column: Column[Any]) -> Schema:
    kind = column.type.python_type
    if issubclass(kind, Enum):
        # A closed set of the model knows how the database spells its members.
        return {"enum": list(getattr(column.type, "enums", None) or [str(m) for m in kind])}
    if kind not in _KINDS:
        raise DataMapError(f"{column.table.name}.{column.name} has a type without a form in JSON")
    return _KINDS[kind]


def _or_null(one: Schema) -> Schema:
    if "enum" in one:
        return {"enum": [*one["enum"], None]}
    return {**one, "type": [one["type"], "null"]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(**properties: Schema) -> Schema:
    """Return an object that has all of *properties* and nothing else."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
