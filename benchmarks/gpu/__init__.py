"""What gpu_16gb.py is made of: who trains, on what, in how much memory, and the page."""
