"""Known cards, the present device, and the driver."""
