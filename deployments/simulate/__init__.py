"""Replaying recorded arrivals on a described cluster, to compare swap policies. Pure but for
``trace_file``, which reads; time is simulated and every random draw comes from the given seed.
"""
