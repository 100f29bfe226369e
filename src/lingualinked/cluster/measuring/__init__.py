"""What is measured of devices and links, and whether it can be trusted."""
