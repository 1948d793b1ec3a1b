"""Durable dispatch: a task is a row in the transaction that wants it, and the broker only a doorbell."""
