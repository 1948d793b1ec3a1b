"""Chatdify: each file tests one promise of the application, over sockets."""
