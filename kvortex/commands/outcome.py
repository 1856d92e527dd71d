"""What every command ends with: the exit statuses that scripts may rely on."""

OK = 0
FAILED = 1
"""It was tried, and did not work; or what was looked at is not as it should be."""
USAGE = 2
"""It was asked wrongly, or of what is in use; nothing was tried."""
INTERRUPTED = 130
