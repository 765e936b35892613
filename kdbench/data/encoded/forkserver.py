"""Imported by the server that decoding processes are forked from: signals are the run's to answer.

Cluster managers send them to all processes of a run, and workers end with their server.
"""

from kdbench.signals import leave_to_the_run

leave_to_the_run()
