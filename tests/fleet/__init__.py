"""Several hosts as one."""
