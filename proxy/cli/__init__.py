"""The command `warmpool`, a file a group of commands. `main` wires the parts together.

The only package that names concrete runtimes. Nothing imports it.
"""
