"""Which SQL counts as a plain read."""

from __future__ import annotations

import pytest
from sqlalchemy import Select, cast, exists, func, literal_column, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import aliased
from sqlalchemy.types import Numeric, String

from fastapi_chatdify_db.plain_reads import is_plain_read
from tests.models import Counter, Item

Other = aliased(Item)


def sql(statement: Select[*tuple[object, ...]]) -> str:
    return str(statement.compile(dialect=postgresql.asyncpg.dialect()))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "statement",
    [
        select(Item),
        select(Item.name).where(Item.id.in_([1, 2]), Item.name.is_not(None)).order_by(Item.id.desc()).limit(3),
        select(func.count()).select_from(Item).where((Item.id > 1) | (Item.id < 0)),
        select(func.coalesce(func.max(func.lower(Item.name)), "")).group_by(Item.id).having(func.count() > 1),
        select(Item, Counter).join(Counter, (Counter.id == Item.id) & (Counter.value > 0), isouter=True),
        select(Item).where(exists().where(Other.id == Item.id)),
        select(cast(Item.id, Numeric(10, 2)), cast(Item.name, String(20))),
        select(func.row_number().over(partition_by=Item.name, order_by=Item.id)),
        select(select(Item.id).subquery()),
        select(select(Item.id).cte("ids").c.id),
    ],
    ids=str,
)
def test_plain_read(statement: Select[*tuple[object, ...]]) -> None:
    """A select of rows, filtered, joined, grouped and sorted."""
    assert is_plain_read(sql(statement))


@pytest.mark.parametrize(
    "statement",
    [
        select(Item).with_for_update(),
        select(Item).with_for_update(read=True, key_share=True),
        select(func.nextval("s")),
        select(func.NEXTVAL("s")),
        select(Item).where(func.pg_advisory_lock(Item.id).is_not(None)),
        select(func.mine.count(Item.id)),
        select(func.unknown(func.lower(Item.name))),
        select(literal_column("write_item ( 1 )")),
        select(literal_column('"write_item"(1)')),
        select(literal_column("write_item/* */(1)")),
        select(literal_column("write_item -- \n (1)")),
        select(literal_column("current_timestamp")),
        select(func.now()),
    ],
    ids=str,
)
def test_not_a_plain_read(statement: Select[*tuple[object, ...]]) -> None:
    """Locks, functions that are not known to be harmless, and the transaction's own time."""
    assert not is_plain_read(sql(statement))


def test_long_statement_is_judged_in_linear_time() -> None:
    """A literal of 100,000 letters, for which a pattern that looks back at each would take minutes."""
    assert is_plain_read(f"SELECT 1 FROM item WHERE name = '{'x' * 100_000}'")
    assert not is_plain_read(f"SELECT f('{'x' * 100_000}')")
