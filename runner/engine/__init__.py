"""One run, from preparation to summary."""
