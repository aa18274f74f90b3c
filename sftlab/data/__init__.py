"""From files to a prepared data set: readers, rows, sources, cleaning, formats, masking, its report (notebooks 02 and 03)."""

from sftlab.data.dataset import load_prepared, prepare, split_rows

__all__ = ["load_prepared", "prepare", "split_rows"]
