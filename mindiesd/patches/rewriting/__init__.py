"""Redirecting what has no name of its own: nested functions, statements and expressions.

A function is rewritten from its own source. The part to be redirected is outlined into a function,
the *original* of a replacement that follows the same law as every other: it takes the call where
the result is provably right, or calls the original with the original operands.

* :mod:`.source` reads a function's tree and proves that it is the source of the running code.
* :mod:`.pattern` compares trees with patterns and fingerprints.
* :mod:`.rules` is what is redirected, as data.
* :mod:`.rewrite` makes the new function; :mod:`.runs` finds what takes several statements.
* :mod:`.flow` knows what statements do with names.
* :mod:`.stub` stands in the target's place and rewrites at the first call.
"""
