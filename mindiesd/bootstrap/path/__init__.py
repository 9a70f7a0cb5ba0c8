"""The directory that ``mindiesd-run`` puts first on PYTHONPATH.

It holds ``sitecustomize`` and what that needs under a name that nobody else has, and nothing else:
a Python that does not run ``sitecustomize`` (``-S``) keeps the directory on its path, where any
other name could hide a module of the user's.
"""
