"""The metrics of a run: measured on each rank, written to files, TensorBoard and Prometheus."""
