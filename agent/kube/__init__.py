"""The cluster's API: connection, reflectors that follow it, Events that tell it."""
