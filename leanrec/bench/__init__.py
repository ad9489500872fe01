from leanrec.bench.experiment import Cell, Experiment, cells
from leanrec.bench.methods_page import write_methods_page
from leanrec.bench.run import bench, read_results
from leanrec.bench.table import write_plots, write_readme

__all__ = ["Cell", "Experiment", "bench", "cells", "read_results", "write_methods_page", "write_plots", "write_readme"]
