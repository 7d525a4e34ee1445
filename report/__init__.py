"""Reports as one self-contained page: figures, tables and texts in, ``report.html`` and its values as JSON out.

Knows nothing of runs, of Flower or of any program: who writes a report says what stands in it (``report.page``), with
charts out of plain rows (``report.charts``). Everything that is shown is taken for hostile, and escaped.
"""
