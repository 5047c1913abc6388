"""This host: facts, commands, processes, cgroups, files of warmpool's own, threads that may hang.

May import errors and tiers only.
"""
