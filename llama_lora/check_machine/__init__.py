"""What check_machine.py tries, and the screen that it ends with."""
