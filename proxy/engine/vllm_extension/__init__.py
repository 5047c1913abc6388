"""What runs inside engines, mounted into their containers; it knows nothing of the rest of the project."""
