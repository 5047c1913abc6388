"""The HTTP side: connections, who may do what, requests through to engines, the admin API and its page.

Asks the pool for leases and commands. Nothing but the command imports it.
"""
