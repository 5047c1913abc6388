"""Engines in podman's containers.

Only `runtime` is for others, and only the command names it.
"""
