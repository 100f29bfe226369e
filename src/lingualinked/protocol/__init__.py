"""What the caller and the workers say to each other.

Plain typed messages without behaviour; knows neither sockets nor how anything is computed.
"""
