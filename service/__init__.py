"""Answering, measuring, changing over: the daemon."""
