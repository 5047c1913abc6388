"""GPUs: their memory by NVML, and processes taken off them and brought back by the CUDA driver.

Knows host pids and nothing of engines.
"""
