"""The command `warmpool`, a file a group of commands; `main` has them all, `wiring` puts the parts together.

The only package that names concrete runtimes. Nothing imports it. A file that declares commands imports nothing large.
"""
