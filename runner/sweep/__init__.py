"""What a multirun adds to a run: many jobs that are checked, saved, launched, resumed and ranked."""
