"""Result files as one page, and as pictures."""
