"""Runtimes: how an engine is started, stopped, suspended, checkpointed and restored.

`base` is what the pool asks for; process and podman are the two there are. May not import pool or server.
"""
