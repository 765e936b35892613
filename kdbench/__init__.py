"""kdbench: online knowledge-distillation methods compared on identical schedules."""

__version__ = "0.1.0"
