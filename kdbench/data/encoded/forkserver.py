"""A module that makes the forkserver of the decoding workers ignore signals when it is imported.

Cluster managers send signals to all processes of a run. The run alone must handle them: if the
forkserver ended, its workers would end too.
"""

from kdbench.signals import ignore_stop_signals

ignore_stop_signals()
