"""Runtimes: how an engine is started, stopped, suspended, checkpointed and restored."""
