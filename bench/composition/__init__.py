"""Does the composition beat its parts? Questions, verifiers, scores and the report.

``python bench/composition.py`` runs it; see ``bench/composition/run.py``.
"""
