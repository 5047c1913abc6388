"""The one owner of instances: leases, the queue, decisions, wakes and steps down, adoption, accounting of memory.

Asks runtimes for work and knows no concrete one. May not import the server, the commands or doctor.
"""
