"""The relay's command line: ``python -m celery_ext.relay -A app run``. Needs the extra ``[relay]``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import typer
from celery import Celery
from celery.app.utils import find_app
from celery.exceptions import ImproperlyConfigured
from sqlalchemy.exc import OperationalError, ProgrammingError

from celery_ext.binding import database_of
from celery_ext.durable import administration
from celery_ext.durable.dispatch import check_dialect
from celery_ext.durable.relay import GRACE, Relay
from celery_ext.durable.table import MISSING, is_missing
from fastapi_chatdify_db.database import Database
from fastapi_chatdify_db.exceptions import ChatdifyDBError

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

cli: typer.Typer = typer.Typer(
    help="Send durable tasks to the broker, and look after them.", no_args_is_help=True, pretty_exceptions_enable=False
)


@cli.callback()
def _application(
    context: typer.Context,
    app: Annotated[str, typer.Option("--app", "-A", help="The Celery application, as for celery -A.")],
) -> None:
    try:
        context.obj = find_app(app)
    except (ImportError, AttributeError) as error:
        # For worker:missing, Celery's last error is that there is no module of that name.
        why = (":" in app and error.name == app and error.__context__) or error
        raise _failure(f"{app} cannot be imported: {type(why).__name__}: {why}") from None
    if not isinstance(context.obj, Celery):
        raise _failure(f"{app} is no Celery application, but {context.obj!r}")


def _database(context: typer.Context) -> Database:
    try:
        # As a worker does: what this runs may say where the database is.
        context.obj.finalize()
        context.obj.loader.import_default_modules()
    except (ImportError, ImproperlyConfigured) as error:
        raise _failure(f"the application cannot be loaded: {type(error).__name__}: {error}") from None
    try:
        database = database_of(context.obj)
        check_dialect(database)
    except ChatdifyDBError as error:
        raise _failure(str(error)) from None
    return database


@contextmanager
def _with_tables(context: typer.Context) -> Iterator[Database]:
    try:
        yield _database(context)
    except ProgrammingError as error:
        if not is_missing(error):
            raise
        raise _failure(MISSING) from None
    except OperationalError as error:
        raise _failure(f"the database cannot be asked: {error.orig}".partition("\n")[0]) from None


def _printable(line: str) -> str:
    """The line without newlines and control characters: an error may quote what anybody has written."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def _failure(line: str) -> typer.Exit:
    typer.echo(line, err=True)
    return typer.Exit(1)


@cli.command()
def run(
    context: typer.Context,
    grace: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds until a row that was sent is rung again; doubles.")
    ] = GRACE,
    loglevel: Annotated[
        LogLevel,
        typer.Option(
            "--loglevel", "-l", case_sensitive=False, help="Unless the application has a receiver of setup_logging."
        ),
    ] = "INFO",
) -> None:
    """Send rows that are due, until SIGTERM or SIGINT; any number of relays may run side by side."""
    database = _database(context)
    context.obj.log.setup(loglevel=loglevel)  # as a worker's: receivers of setup_logging come first
    relay = Relay(context.obj, database, grace=grace)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: relay.stop())
    typer.echo("relay ready", err=True)
    relay.run()


@cli.command()
def status(context: typer.Context) -> None:
    """How many tasks are pending, sent, rung again and failed, and how old the oldest pending one is."""
    with _with_tables(context) as database:
        figures = administration.figures(database)
    for name, value in figures.items():
        typer.echo(f"{name:20} {value}")


@cli.command()
def failed(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=0, max=1_000_000, help="Show no more than so many.")] = 50,
) -> None:
    """The tasks that failed for good, the newest first."""
    with _with_tables(context) as database:
        rows = administration.failed(database, limit)
    for row in rows:
        line = f"{row.finished_at:%Y-%m-%d %H:%M:%S}  {row.id}  {row.name}  retries={row.retries}  {row.error}"
        typer.echo(_printable(line))


@cli.command()
def retry(
    context: typer.Context,
    task_id: Annotated[str | None, typer.Argument(metavar="ID")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every task that failed.")] = False,
) -> None:
    """Run a failed task again, or all of them."""
    if (task_id is None) == (not all_):
        raise typer.BadParameter("name one task by its ID, or say --all")
    with _with_tables(context) as database:
        number = administration.retry(database, task_id)
    if task_id is not None and number == 0:
        raise _failure(f"{task_id} has not failed, or is not known")
    typer.echo(f"{number} to be run again")


@cli.command()
def cancel(context: typer.Context, task_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Do not run a pending task; one that is running goes on."""
    with _with_tables(context) as database:
        cancelled = administration.cancel(database, task_id)
    if not cancelled:
        raise _failure(f"{task_id} is not pending, or is running")
    typer.echo(f"{task_id} cancelled")


@cli.command()
def prune(
    context: typer.Context,
    days: Annotated[int, typer.Option(min=0, max=36_500, help="Keep what ended within so many days.")] = 30,
) -> None:
    """Delete done and cancelled rows, in batches."""
    with _with_tables(context) as database:
        number = administration.prune(database, days)
    typer.echo(f"{number} deleted")


if __name__ == "__main__":
    cli()
