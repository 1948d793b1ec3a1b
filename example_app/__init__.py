"""A small application on fastapi_chatdify_db: ``python -m example_app``."""
