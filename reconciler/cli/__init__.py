"""The commands: text and JSON out, exit codes. No decisions."""
