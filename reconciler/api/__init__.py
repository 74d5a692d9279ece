"""What others may ask of the hub and tell it, over HTTP."""
