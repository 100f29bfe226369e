"""Memory that two processes of a machine share, in place of a socket."""
