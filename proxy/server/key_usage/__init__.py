"""What the holders of API keys have used: tokens and GPU seconds by key, model and day, kept over restarts.

Nothing here runs within a request. May not import what forwards them.
"""
