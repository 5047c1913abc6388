"""For operators: status, commands, events, and the page.

Seen only by those whom `auth` lets pass.
"""
