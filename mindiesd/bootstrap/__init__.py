"""What runs inside the processes below ``mindiesd-run``, before the user's program.

This directory stands first on ``PYTHONPATH`` there, so it holds only names that nothing else uses:
``sitecustomize`` (found by Python itself), ``_mindiesd_start`` (the part needed at once), and the
parts of this package that are loaded when torch is.
"""
