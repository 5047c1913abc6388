"""Load tests for warmpool, and the engine they run against."""
