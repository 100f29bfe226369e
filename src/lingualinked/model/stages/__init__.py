"""One stage: its forward pass, and what is kept around it."""
