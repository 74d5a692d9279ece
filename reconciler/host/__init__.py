"""One adapter per thing outside this process; none knows another."""
