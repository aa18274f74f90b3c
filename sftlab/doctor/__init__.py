"""What is wrong here: checks of a machine, diagnosis of a run, known errors (notebook 13)."""

from sftlab.doctor.checks import examine, format_report
from sftlab.doctor.diagnosis import diagnose, format_lines
from sftlab.doctor.known_errors import hide, load_table

__all__ = ["diagnose", "examine", "format_lines", "format_report", "hide", "load_table"]
