"""What this process computes with: torch's settings, versions, memory."""
