"""Checkpoint images: the store, the manifest, the format of CRIU's files, what an engine has read.

Knows the configuration and the host. May not import engine, runtime, pool or anything above them.
"""
