"""What warmpool says of itself: metrics, logs, refusals, stages of a wake, what is overdue.

May import host, errors and tiers only.
"""
