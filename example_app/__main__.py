"""``python -m example_app``."""

from __future__ import annotations

from example_app.demo.run import main

if __name__ == "__main__":
    main()
