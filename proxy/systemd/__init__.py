"""The service manager: its sockets, what it wants to hear, warmpool's units.

Knows the configuration and nothing of engines.
"""
