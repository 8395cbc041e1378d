"""From a plan of cells to one parquet file per cell."""
