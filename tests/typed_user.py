"""A user's file, for the type checker: every public name, with the types that it is to have."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, assert_type

from fastapi import Depends, FastAPI
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Mapped, Session, mapped_column
from starlette.applications import Starlette
from starlette.middleware import Middleware

from fastapi_chatdify_db import (
    Base,
    Database,
    DatabaseSettings,
    DBSessionMiddleware,
    async_engine,
    create_db_tables,
    create_health_router,
    db,
    drop_db_tables,
    get_async_session,
    get_session,
    get_sync_session,
    health_router,
    sync_engine,
)


class Thing(Base):
    __tablename__ = "typed_thing"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    name: Mapped[str]


assert_type(async_engine, AsyncEngine)
assert_type(sync_engine, Engine)
assert_type(get_session(), AsyncGenerator[AsyncSession])

reports = Database("reports", settings=DatabaseSettings(database_url="sqlite://", db_pool_size=3), base=Base)
starlette = Starlette(middleware=[Middleware(DBSessionMiddleware, commit_on=lambda status: status < 500, retries=3)])
app = FastAPI(lifespan=db.lifespan)
app.add_middleware(DBSessionMiddleware, retries=2)
reports.init_app(starlette)
db.init_app(app, middleware=False)
assert_type(reports.async_engine, AsyncEngine)
assert_type(reports.sync_engine, Engine)
assert_type(reports.settings, DatabaseSettings)
app.include_router(health_router)
app.include_router(create_health_router(db, reports))


@app.get("/")
async def handler(session: Annotated[AsyncSession, Depends(get_session)]) -> list[str]:
    assert_type(db.session, AsyncSession)
    assert_type(reports.session, AsyncSession)
    thing = await db.session.get(Thing, 1)
    assert_type(thing, Thing | None)
    db.on_commit(lambda: print("plain"))
    db.on_commit(notify)
    db.rollback_only()
    assert_type(await db.release(), None)
    assert_type((await db.session.execute(select(Thing.name))).scalar_one(), str)
    return list(await session.scalars(select(Thing.name)))


@app.get("/def")
def plain_handler() -> str | None:
    assert_type(db.sync_session, Session)
    return db.sync_session.scalars(select(Thing.name)).first()


async def notify() -> int:
    return 1


async def script() -> None:
    await create_db_tables()
    await drop_db_tables()
    async with reports.transaction() as session:
        assert_type((await session.scalars(select(Thing.name))).one(), str)
    async with db.transaction() as session, get_async_session() as other:
        assert_type(session, AsyncSession)
        assert_type(other, AsyncSession)


def sync_script() -> None:
    with reports.sync_transaction() as session:
        assert_type(session.get(Thing, 1), Thing | None)
    with db.sync_transaction() as session, get_sync_session() as other:
        assert_type(session, Session)
        assert_type(other, Session)
