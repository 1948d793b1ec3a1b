"""Random requests, and what the documentation says that becomes of them."""
