"""x."""

RECORDS: tuple = ()
