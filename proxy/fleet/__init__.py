"""Several hosts as one: what each offers, who knows of it, and which of them a request goes to.

Above the pool, below the server. A host decides about its own engines alone; what it knows of the others is soft state,
sent again and again by its one owner, which may be old or missing: a wrong guess costs a hop, never a wrong answer.
"""
