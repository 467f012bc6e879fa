"""From a plain dict to a `Job`: types, trust, construction."""
