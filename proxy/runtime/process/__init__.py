"""Engines as local process trees.

Only `runtime` is for others, and only the command names it.
"""
