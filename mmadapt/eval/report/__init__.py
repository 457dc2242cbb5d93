"""The report of a run: tables for the terminal, a self-contained page with pictures."""

from mmadapt.eval.report.page import ReportFiles, write_report
from mmadapt.eval.report.tables import Table, format_tables

__all__ = ["ReportFiles", "Table", "format_tables", "write_report"]
