"""The declarative base of the application's models."""

from __future__ import annotations

from typing import ClassVar, Final

from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase, MappedAsDataclass

# Alembic can only drop or alter a constraint whose name it knows:
# https://alembic.sqlalchemy.org/en/latest/naming.html
NAMING_CONVENTION: Final = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(MappedAsDataclass, DeclarativeBase, repr=False, eq=False):
    """Base class of the default database's models: typed dataclasses with named constraints.

    Without the dataclass's ``repr`` and ``eq``: they would load relationships, which async code cannot, and show what
    users typed in logs.

    A second database takes a base of its own::

        class ReportsBase(MappedAsDataclass, DeclarativeBase): ...

        reports = Database("reports", settings=..., base=ReportsBase)
    """

    metadata: ClassVar[MetaData] = MetaData(naming_convention=NAMING_CONVENTION)
