"""What every package uses: options, files, masking of secrets, ports, processes. It imports no torch."""
