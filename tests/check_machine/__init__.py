"""Checks of the machine, on the CPU and with simulated cards."""
