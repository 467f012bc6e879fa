"""What is learnt: one task class per file."""
