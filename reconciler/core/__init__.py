"""Values in, values out: no disk, no clock, no sockets, no randomness."""
