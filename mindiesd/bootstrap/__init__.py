"""What runs inside the processes below ``mindiesd-run``, before the user's program.

The directory ``path`` stands first on ``PYTHONPATH`` there: ``sitecustomize`` (found by Python
itself) and ``_mindiesd_start`` (the part needed at once). The rest is loaded when torch is.
"""
