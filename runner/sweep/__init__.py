"""What a multirun adds to a run: many jobs that are checked, frozen, launched, taken up again and ranked."""
