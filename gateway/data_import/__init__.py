"""Public benchmark files to a data-set folder for ``coe train`` and ``coe evaluate``."""
