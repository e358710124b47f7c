"""Whether a training fits, and how long it will take, told before it starts."""
