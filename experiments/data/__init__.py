"""Where samples come from: one data set per file."""
