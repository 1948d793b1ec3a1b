"""The whole of Chatdify on one machine: ``python -m example_app``."""
