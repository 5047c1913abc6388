"""What is said to an engine: health, warm-up, canary, sleep, requests of clients; and what runs inside vLLM.

Knows nothing of processes, containers or instances: may not import checkpoint, runtime or pool.
"""
