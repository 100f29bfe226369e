"""What cannot have an effect here is refused by name."""
