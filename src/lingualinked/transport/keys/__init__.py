"""Keys of users, clients and daemons."""
