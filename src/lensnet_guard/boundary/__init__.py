"""Between the caller and the raw module: what every run of it must pass. Moves with torch."""
