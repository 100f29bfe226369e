"""What comes in and goes out: senders checked, order of messages, errors reported."""
