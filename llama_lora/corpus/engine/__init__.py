"""What runs a stage over a whole file: worker processes, output, accounts."""
