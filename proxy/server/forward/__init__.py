"""A request through to an engine, and its answer back: routes, the model, the bytes.

Asks the pool for a lease and ends it.
"""
