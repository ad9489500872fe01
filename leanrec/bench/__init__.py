from leanrec.bench.experiment import Cell, Experiment, cells
from leanrec.bench.run import bench, read_results
from leanrec.bench.table import write_plots, write_readme

__all__ = ["Cell", "Experiment", "bench", "cells", "read_results", "write_plots", "write_readme"]
