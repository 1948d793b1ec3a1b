"""context-async-sqlalchemy, the fastest of the four libraries, at its best: no ping."""

from __future__ import annotations

from context_async_sqlalchemy_app import OPTIONS, app

OPTIONS["pool_pre_ping"] = False

__all__ = ["app"]
