"""Who asks, and what he may do: API keys, rate limits, the admin token, web pages.

Knows requests and nothing of engines.
"""
