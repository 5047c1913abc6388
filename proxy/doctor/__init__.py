"""What a host has and lacks for checkpoints, each with its fix, and a real checkpoint as the last word."""
