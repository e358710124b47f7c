"""Known cards, this machine's device, and the driver."""
