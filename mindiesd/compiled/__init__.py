"""The C library of the package: its sources, and what loads it. Nothing here needs torch."""
